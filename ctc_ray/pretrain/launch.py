"""Start Ray Train for a planned run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ray

from ctc_ray.config import PretrainConfig
from ctc_ray.errors import ConfigError, SchemaError
from ctc_ray.pretrain.slices import SLICE_ROWS, ReadCrops, slices_of
from ctc_ray.pretrain.worker import STREAM, RunPlan, train_worker
from ctc_ray.progress import Progress
from ctc_ray.train_launch import Workers, launch

_MIN_CROPS_PER_WORKER = 2
"""Batch statistics need two crops."""


def workers_of(section: PretrainConfig) -> Workers:
    """The workers that a configuration asks for."""
    return Workers(
        num_workers=section.num_workers,
        min_workers=section.min_workers,
        use_gpu=section.use_gpu,
        max_failures=section.max_failures,
    )


def check_resources(plan: RunPlan, batch_size: int) -> Workers:
    """Refuse a run that could not start, before Ray waits for it without a word.

    Returns:
        The workers to start: as configured, and as many fewer as the stream of crops needs processors for itself.

    Raises:
        ConfigError: the batch is too small for the workers, or their fewest are more than their number.
        SchemaError: there are fewer crops than a batch.
        ResourceError: the cluster has too few processors or GPUs for the fewest workers.
    """
    section, num_crops = plan.section, sum(plan.shards.values())
    if batch_size < _MIN_CROPS_PER_WORKER * section.num_workers:
        raise ConfigError(
            f"pretrain.batch_size {batch_size} gives {section.num_workers} workers fewer than {_MIN_CROPS_PER_WORKER} crops "
            "each, which their batch statistics need: raise it, or lower pretrain.num_workers"
        )
    if num_crops < batch_size:
        raise SchemaError(
            f"{num_crops} pretraining crops are fewer than one batch of {batch_size}: "
            "give more patients the role pretrain, or lower pretrain.batch_size"
        )
    workers = workers_of(section)
    if plan.data == "resident":
        workers.require_room("pretrain")
        return workers
    # Ray Data reads beside the workers: if they took every processor, both would wait for ever.
    room = workers.require_room("pretrain", spare_cpus=1)
    return replace(workers, num_workers=room)


def fit(plan: RunPlan, workers: Workers, steps: int, done: int, progress: Progress) -> None:
    """Run Ray Train to the last step; what it trains lies in the run's checkpoints.

    Args:
        plan: of the run.
        workers: from `check_resources`.
        steps: of the whole run.
        done: those of the newest checkpoint.
        progress: where to show steps and warnings.

    Raises:
        CtcRayError: what a worker reported.
        ResourceError: workers kept failing.
    """
    room = workers.room()
    if room < workers.num_workers:
        progress.say(
            f"  pretrain: the cluster has room for {room} of {workers.num_workers} workers: training with {room}"
        )
    state = f"{plan.folder}/ray"
    with progress.task("pretrain: DINO steps", total=steps) as task:
        task.advance(done, note=f"continuing from step {done}" if done else "starting workers")
        launch(
            train_worker,
            plan,
            workers,
            name=plan.identity,
            storage_path=str(plan.store.local_path(state)) if plan.store.is_local else plan.store.describe(state),
            task=task,
            warn=lambda text: progress.say(f"  WARNING: {text}"),
            datasets={STREAM: _stream(plan)} if plan.data == "streaming" else None,
        )


def _stream(plan: RunPlan) -> Any:
    """All crops, read slice by slice as Ray Data's workers get to them."""
    rows = [part.to_row() for part in slices_of(plan.shards, SLICE_ROWS)]
    dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), 200))
    return dataset.map_batches(ReadCrops(plan.store).__call__, batch_size=None, batch_format="pyarrow", num_cpus=1)
