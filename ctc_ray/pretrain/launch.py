"""Start Ray Train for a planned run, and watch it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray
import ray.train
from ray.train import DataConfig, FailureConfig, ScalingConfig
from ray.train import RunConfig as TrainRunConfig
from ray.train.torch import TorchConfig, TorchTrainer

from ctc_ray.config import PretrainConfig
from ctc_ray.errors import ConfigError, ResourceError, SchemaError
from ctc_ray.pretrain.measure import named_error
from ctc_ray.pretrain.slices import SLICE_ROWS, ReadCrops, Slice, slices_of
from ctc_ray.pretrain.worker import ERROR_FILE, STATUS_FILE, RunPlan, dataset_name, train_worker
from ctc_ray.progress import Progress
from ctc_ray.storage import Store

_POLL_S = 0.5


def check_resources(section: PretrainConfig, batch_size: int, num_crops: int) -> None:
    """Refuse a run that could not start, before Ray waits for it without a word.

    Raises:
        ConfigError: the batch does not divide among the workers.
        SchemaError: there are fewer crops than a batch.
        ResourceError: the cluster has too few processors or GPUs.
    """
    workers = section.num_workers
    if batch_size % workers:
        raise ConfigError(
            f"pretrain.batch_size {batch_size} does not divide among {workers} workers: change one of them"
        )
    if num_crops // workers < batch_size // workers:
        raise SchemaError(
            f"{num_crops} pretraining crops are fewer than one batch of {batch_size}: "
            "give more patients the role pretrain, or lower pretrain.batch_size"
        )
    available = ray.cluster_resources()  # type: ignore[no-untyped-call]  # Ray has no annotations there
    if available.get("CPU", 0) < workers + 1:
        raise ResourceError(
            f"the cluster has {available.get('CPU', 0):g} processors; {workers} training workers and a reader need "
            f"{workers + 1}: lower pretrain.num_workers"
        )
    if section.use_gpu and available.get("GPU", 0) < workers:
        raise ResourceError(
            f"the cluster has {available.get('GPU', 0):g} GPUs, {workers} training workers need one each: "
            "lower pretrain.num_workers or set pretrain.use_gpu=false"
        )


def _datasets(plan: RunPlan, shards: dict[str, int]) -> tuple[dict[str, Any], DataConfig]:
    """One dataset a worker, of fixed slices (resident), or one that Ray splits as it streams."""
    workers = plan.section.num_workers
    if plan.section.data == "streaming":
        parts = [slices_of(shards, SLICE_ROWS)]
        names, config = ["crops"], DataConfig(datasets_to_split="all")
    else:
        # Slices small enough that the workers' shares come out even.
        rows = int(np.clip(sum(shards.values()) // (16 * workers), 1, SLICE_ROWS))
        slices = slices_of(shards, rows)
        parts = [slices[rank::workers] for rank in range(workers)]
        names, config = [dataset_name(rank) for rank in range(workers)], DataConfig(datasets_to_split=[])
    return {name: _crops(plan.store, own) for name, own in zip(names, parts, strict=True)}, config


def _crops(store: Store, slices: list[Slice]) -> Any:
    rows = [part.to_row() for part in slices]
    dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), 200))
    return dataset.map_batches(ReadCrops(store).__call__, batch_size=None, batch_format="pyarrow", num_cpus=1)


def fit(plan: RunPlan, shards: dict[str, int]) -> None:
    """Run Ray Train to the last step; what it trains lies in the run's checkpoints.

    Raises:
        CtcRayError: what a worker reported.
        ResourceError: workers kept failing.
    """
    section = plan.section
    plan.store.delete(f"{plan.folder}/{ERROR_FILE}")
    datasets, data_config = _datasets(plan, shards)
    state = f"{plan.folder}/ray"
    resources = {"CPU": 1, "GPU": 1} if section.use_gpu else {"CPU": 1}
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"plan": plan},
        scaling_config=ScalingConfig(
            num_workers=section.num_workers, use_gpu=section.use_gpu, resources_per_worker=resources
        ),
        torch_config=TorchConfig(backend="nccl" if section.use_gpu else "gloo"),
        run_config=TrainRunConfig(
            # A name of its own for every attempt: Ray would take up its own state of an earlier one.
            name=f"{plan.identity}-{int(time.time() * 1000)}",
            storage_path=str(plan.store.local_path(state)) if plan.store.is_local else plan.store.describe(state),
            failure_config=FailureConfig(max_failures=section.max_failures),
        ),
        datasets=datasets,
        dataset_config=data_config,
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        _raise_reported(plan)
        raise ResourceError(
            f"training failed after {section.max_failures} restarts: {_first_cause(error)}. "
            "The last checkpoint is intact: run again to continue"
        ) from error
    _raise_reported(plan)


def _raise_reported(plan: RunPlan) -> None:
    path = f"{plan.folder}/{ERROR_FILE}"
    if plan.store.exists(path):
        reported = plan.store.read_json(path)
        plan.store.delete(path)
        raise named_error(reported["kind"], reported["message"])


def _first_cause(error: Exception) -> str:
    failures = getattr(error, "worker_failures", None) or {}
    cause = next(iter(failures.values()), error)
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(cause).__name__


@contextlib.contextmanager
def watched(plan: RunPlan, steps: int, done: int, progress: Progress) -> Iterator[None]:
    """Show the steps that the workers note in the run's folder, while the block runs."""
    stop = threading.Event()
    path = f"{plan.folder}/{STATUS_FILE}"
    plan.store.delete(path)
    with progress.task("pretrain: DINO steps", total=steps) as task:
        task.advance(done, note="starting workers")

        def poll() -> None:
            while not stop.wait(_POLL_S):
                if not plan.store.exists(path):
                    task.advance(0, note="starting workers")
                    continue
                with contextlib.suppress(OSError, SchemaError):  # replaced at this very moment: look again
                    row = plan.store.read_json(path)
                    note = f"loss {row['loss']:.3f}, {row['crops_per_second']:.0f} crops/s"
                    task.advance(max(0, int(row["step"]) - task.done), note=note)

        thread = threading.Thread(target=poll, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
