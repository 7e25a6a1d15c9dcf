"""What each process of a Ray Train run does: load its crops, continue from the last checkpoint, train.

State lives in the cohort, not in Ray: checkpoints, the plan of the run, its progress and its errors are files below
`encoders/<id>/_train/<identity>/`. A run that was killed, with its driver or alone, is continued by running it again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.train
import ray.train.torch as ray_torch
import torch

from ctc_ray.config import PretrainConfig
from ctc_ray.errors import CtcRayError, WeightsError
from ctc_ray.pretrain.checkpoint import CheckpointFolder
from ctc_ray.pretrain.encoder import DEFAULT_FOLDER, load_folder, same_architecture
from ctc_ray.pretrain.intensity import IntensityRule
from ctc_ray.pretrain.monitor import StepMetrics
from ctc_ray.pretrain.precision import Resolved
from ctc_ray.pretrain.settings import settings_of
from ctc_ray.pretrain.trainer import (
    BatchSource,
    DinoTrainer,
    ResidentCrops,
    StreamedCrops,
    World,
    fold_seed,
    train,
)
from ctc_ray.schema import unpack_pixels
from ctc_ray.storage import Store

STATUS_FILE: Final = "status.json"
ERROR_FILE: Final = "error.json"
_STATUS_INTERVAL_S: Final = 2.0
_METRIC_ROWS: Final = 2000
"""At most this many rows of metrics are kept, evenly over the run."""


@dataclass(frozen=True)
class RunPlan:
    """What all workers of a run share; fixed when the run starts and read again when it is continued.

    Attributes:
        store: of the cohort.
        folder: of the run's state, below the cohort.
        identity: of the run.
        section: its configuration.
        rule: intensity constants of the pretraining patients, as JSON values.
        channels: channels C of the crops.
        full_scale: count of a saturated pixel.
        precision: what `auto` resolved to.
    """

    store: Store
    folder: str
    identity: str
    section: PretrainConfig
    rule: dict[str, Any]
    channels: int
    full_scale: float
    precision: Resolved

    def checkpoints(self) -> CheckpointFolder:
        """The run's checkpoints."""
        return CheckpointFolder(self.store, f"{self.folder}/checkpoints", identity=self.identity)


def dataset_name(rank: int) -> str:
    """Name of the dataset that worker `rank` holds resident."""
    return f"crops-{rank}"


def train_worker(config: dict[str, RunPlan]) -> None:
    """Train as one worker of a Ray Train run.

    Args:
        config: the run's plan under the key `plan`.

    Raises:
        CtcRayError: bad crops, a damaged checkpoint, a loss that is not finite; also left in `error.json`, and a restarted
            worker that finds it ends at once, since our own errors would only come again.
    """
    plan = config["plan"]
    if plan.store.exists(f"{plan.folder}/{ERROR_FILE}"):
        return
    try:
        _train(plan)
    except CtcRayError as error:
        plan.store.write_json(f"{plan.folder}/{ERROR_FILE}", {"kind": type(error).__name__, "message": str(error)})
        raise


def _train(plan: RunPlan) -> None:
    context = ray.train.get_context()
    world = World(rank=context.get_world_rank(), size=context.get_world_size())
    device = ray_torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(1)
    settings = settings_of(plan.section, channels=plan.channels, precision=plan.precision)
    trainer = DinoTrainer(
        settings,
        IntensityRule.from_json(plan.rule),
        device=device,
        world=world,
        backbone_state=_initial_weights(plan.section),
    )
    metrics: list[dict[str, float | int]] = []
    checkpoints = plan.checkpoints()
    found = checkpoints.latest()
    if found is not None:
        trainer.load(found.tensors, found.step)
        metrics = list(found.details["metrics"])
    batch_size = settings.batch_size // world.size
    source = _source(plan, world, batch_size, settings.seed, device)
    every = max(1, settings.steps // _METRIC_ROWS)
    reporter = _Status(plan, settings.steps)

    def on_step(row: StepMetrics) -> None:
        if row.step % every == 0 or row.step == settings.steps:
            metrics.append(row.to_json())
        if world.rank == 0:
            reporter.step(row)

    def checkpoint(at: DinoTrainer) -> None:
        if world.rank == 0:
            checkpoints.save(at.step, at.tensors(), {"metrics": metrics})
        # Every rank reports equally often; the weights themselves are in the cohort already.
        ray.train.report(dict(metrics[-1]) if metrics else {})

    train(trainer, source, checkpoint=checkpoint, checkpoint_every=plan.section.checkpoint_every, on_step=on_step)


class _Status:
    """Leaves the step for the driver's progress bar, at most every two seconds."""

    def __init__(self, plan: RunPlan, steps: int) -> None:
        self._plan = plan
        self._steps = steps
        self._written = 0.0

    def step(self, row: StepMetrics) -> None:
        """Note a finished step."""
        now = time.monotonic()
        if now - self._written < _STATUS_INTERVAL_S and row.step < self._steps:
            return
        self._written = now
        self._plan.store.write_json(f"{self._plan.folder}/{STATUS_FILE}", row.to_json())


def _initial_weights(section: PretrainConfig) -> dict[str, torch.Tensor] | None:
    if section.init == "random":
        return None
    backbone, spec = load_folder(DEFAULT_FOLDER)
    if not same_architecture(spec.architecture, section.architecture):
        raise WeightsError(
            f"pretrain.init is `default`, and the shipped encoder is {spec.architecture}, not {section.architecture}: "
            "set pretrain.init=random, or leave pretrain.architecture at its default"
        )
    return dict(backbone.state_dict())


def _source(plan: RunPlan, world: World, batch_size: int, seed: int, device: torch.device) -> BatchSource:
    if plan.section.data == "streaming":
        return StreamedCrops(_stream(plan, world, batch_size, seed, device))
    return ResidentCrops(
        _resident_crops(world.rank),
        batch_size=batch_size,
        seed=fold_seed(seed, "order", world.rank),
        device=device,
        full_scale=plan.full_scale,
    )


def _resident_crops(rank: int) -> npt.NDArray[Any]:
    """All crops of this worker's dataset, in the order of their cell_id, whatever the order they came in."""
    shard = ray.train.get_dataset_shard(dataset_name(rank))
    tables = list(shard.iter_batches(batch_size=None, batch_format="pyarrow"))
    table = pa.concat_tables(tables).combine_chunks()
    crops = unpack_pixels(table["pixels"], table.schema.field("pixels"))
    return crops[np.argsort(table["cell_id"].to_numpy(zero_copy_only=False), kind="stable")]


def _stream(plan: RunPlan, world: World, batch_size: int, seed: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Batches of this worker's split, epoch after epoch, shuffled within a window of sixteen batches."""
    shard = ray.train.get_dataset_shard("crops")
    epoch = 0
    while True:
        empty = True
        for table in shard.iter_batches(
            batch_size=batch_size,
            batch_format="pyarrow",
            drop_last=True,
            local_shuffle_buffer_size=16 * batch_size,
            local_shuffle_seed=fold_seed(seed, "stream", epoch, world.rank) % 2**31,
        ):
            empty = False
            crops = unpack_pixels(table["pixels"], table.schema.field("pixels"))
            yield torch.from_numpy(crops.astype(np.float32)).to(device).div_(plan.full_scale)
        if empty:
            return
        epoch += 1


def plan_to_json(plan: RunPlan) -> dict[str, Any]:
    """The part of a plan that is fixed for the run's life, as JSON values."""
    values = asdict(plan)
    return {name: values[name] for name in ("identity", "rule", "channels", "full_scale", "precision")}
