"""What each process of a Ray Train run does: load its crops, continue from the last checkpoint, train.

State lies in the cohort, not in Ray: checkpoints, metrics and the plan of the run are files below
`encoders/<id>/_train/<identity>/`. A run that was killed, with its driver or alone, is continued by running it again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

import numpy as np
import ray.train
import ray.train.torch as ray_torch
import torch

from ctc_ray.config import PretrainConfig
from ctc_ray.errors import WeightsError
from ctc_ray.pretrain.checkpoint import Checkpoint, CheckpointFolder
from ctc_ray.pretrain.encoder import DEFAULT_FOLDER, load_folder, same_architecture
from ctc_ray.pretrain.event_files import encode_events, event_file_name, event_file_step
from ctc_ray.pretrain.intensity import IntensityRule
from ctc_ray.pretrain.monitor import CollapseMonitor, StepMetrics
from ctc_ray.pretrain.precision import Resolved
from ctc_ray.pretrain.settings import settings_of
from ctc_ray.pretrain.slices import read_crops, share_of
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
from ctc_ray.train_launch import Reports

STREAM: Final = "crops"
"""Name of the dataset that Ray Data splits among the workers as it streams."""
TENSORBOARD: Final = "tensorboard"
"""Folder of the event files, below the run's folder while it lasts and below the encoder's after it."""
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
        shards: of the pretraining cells, path -> rows.
        rule: intensity constants of the pretraining patients, as JSON values.
        channels: channels C of the crops.
        full_scale: count of a saturated pixel.
        precision: what `auto` resolved to.
        data: what `auto` resolved to.
    """

    store: Store
    folder: str
    identity: str
    section: PretrainConfig
    shards: dict[str, int]
    rule: dict[str, Any]
    channels: int
    full_scale: float
    precision: Resolved
    data: Literal["resident", "streaming"] = "resident"

    def checkpoints(self) -> CheckpointFolder:
        """The run's checkpoints."""
        return CheckpointFolder(self.store, f"{self.folder}/checkpoints", identity=self.identity)

    def trainer(self, *, device: torch.device | None = None, world: World | None = None) -> DinoTrainer:
        """The trainer of the run at step 0.

        Raises:
            ConfigError: the backbone cannot be built.
            WeightsError: the shipped encoder has another architecture or number of channels.
        """
        return DinoTrainer(
            settings_of(self.section, channels=self.channels, precision=self.precision),
            IntensityRule.from_json(self.rule),
            device=device,
            world=world,
            backbone_state=initial_weights(self.section, self.channels),
        )


def initial_weights(section: PretrainConfig, channels: int) -> dict[str, torch.Tensor] | None:
    """Weights of the shipped encoder where `init` is `default`; None where the run starts from random ones.

    Args:
        section: of the run.
        channels: channels C of its crops.

    Raises:
        WeightsError: the shipped encoder has another architecture or number of channels.
    """
    if section.init == "random":
        return None
    backbone, spec = load_folder(DEFAULT_FOLDER)
    if not same_architecture(spec.architecture, section.architecture):
        raise WeightsError(
            f"pretrain.init is `default`, and the shipped encoder is {spec.architecture}, not {section.architecture}: "
            "set pretrain.init=random, or leave pretrain.architecture at its default"
        )
    if spec.channels != channels:
        raise WeightsError(
            f"pretrain.init is `default`, and the shipped encoder takes {spec.channels} channels; the pretraining cells have "
            f"{channels}: set pretrain.init=random"
        )
    return dict(backbone.state_dict())


def world_of(rank: int, size: int, batch_size: int) -> tuple[World, int]:
    """One worker among `size`, and how many crops of each batch are its own.

    The workers' crops add up to the batch whatever their number; where it does not divide, they differ by one.
    """
    own = (rank + 1) * batch_size // size - rank * batch_size // size
    return World(rank=rank, size=size, weight=own * size / batch_size), own


def train_worker(plan: RunPlan, reports: Reports) -> None:
    """Train as one worker of a Ray Train run.

    Args:
        plan: of the run.
        reports: receives steps and warnings.

    Raises:
        CtcRayError: bad crops, a damaged checkpoint, a checkpoint that cannot be written, a loss that is not finite.
    """
    context = ray.train.get_context()
    batch_size = settings_of(plan.section, channels=plan.channels, precision=plan.precision).batch_size
    world, own = world_of(context.get_world_rank(), context.get_world_size(), batch_size)
    device = ray_torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(1)
    trainer = plan.trainer(device=device, world=world)
    journal = Journal(plan, world, reports)
    found = plan.checkpoints().latest()
    journal.begin(found)
    if found is not None:
        trainer.load(found.tensors, found.step)

    def checkpoint(at: DinoTrainer) -> None:
        if world.rank == 0:
            journal.save(at)
        # Every rank reports equally often; the weights themselves are in the cohort already.
        ray.train.report({"step": at.step})

    train(
        trainer,
        _source(plan, world, own, device),
        checkpoint=checkpoint,
        checkpoint_every=plan.section.checkpoint_every,
        on_step=journal.step,
    )


class Journal:
    """What the first worker of a run writes down: metrics, event files and checkpoints; the others write nothing.

    Args:
        plan: of the run.
        world: the worker that holds the journal.
        reports: receives steps and warnings.
    """

    def __init__(self, plan: RunPlan, world: World, reports: Reports) -> None:
        settings = settings_of(plan.section, channels=plan.channels, precision=plan.precision)
        steps = settings.steps
        self.metrics: list[dict[str, Any]] = []
        self._plan, self._world, self._steps, self._reports = plan, world, steps, reports
        self._every = max(1, steps // _METRIC_ROWS)
        self._saved = 0
        self._monitor = CollapseMonitor(settings.prototypes, grace_steps=steps // 5)

    def begin(self, found: Checkpoint | None) -> None:
        """Go on from a checkpoint, or begin afresh without one; event files of steps that will be done again are removed.

        Raises:
            WeightsError: the checkpoint holds no metrics.
        """
        step = 0
        if found is not None:
            step, rows = found.step, found.details.get("metrics")
            if not isinstance(rows, list):
                raise WeightsError(
                    f"the checkpoint of step {step} in {self._plan.store.describe(self._plan.folder)} holds no metrics: "
                    "delete it to continue from the one before it"
                )
            self.metrics = list(rows)
            self._saved = len(rows)
        if self._world.rank:
            return
        folder = f"{self._plan.folder}/{TENSORBOARD}"
        for path in self._plan.store.list_files(folder):
            if (event_file_step(path.rsplit("/", 1)[-1]) or 0) > step:
                self._plan.store.delete(path)
        if step:
            self._reports.step(step, f"continuing from step {step}", now=True)

    def step(self, row: StepMetrics) -> None:
        """Note a finished step."""
        if self._world.rank:
            return
        collapse, warning = self._monitor.see(row)
        if warning is not None:
            self._reports.warn(f"encoder {self._plan.section.encoder_id}: {warning}")
        if row.step % self._every == 0 or row.step == self._steps:
            own = {"collapse": collapse or "", "workers": self._world.size, "unix_time_s": round(time.time(), 3)}
            self.metrics.append({**row.to_json(), **own})
        text = f"loss {row.loss:.3f}, {row.crops_per_second:.0f} crops/s"
        if self._world.size != self._plan.section.num_workers:
            text += f", {self._world.size} of {self._plan.section.num_workers} workers"
        self._reports.step(row.step, text, now=row.step == self._steps)

    def save(self, trainer: DinoTrainer) -> None:
        """Write the event file of the rows since the checkpoint before, then a checkpoint.

        Raises:
            StorageError: there is no room; earlier checkpoints are intact.
            WeightsError: weights are not finite.
        """
        rows = self.metrics[self._saved :]
        if rows:
            path = f"{self._plan.folder}/{TENSORBOARD}/{event_file_name(trainer.step)}"
            self._plan.store.write_bytes(path, encode_events(rows))
        self._plan.checkpoints().save(trainer.step, trainer.tensors(), {"metrics": self.metrics})
        self._saved = len(self.metrics)


def _source(plan: RunPlan, world: World, own: int, device: torch.device) -> BatchSource:
    seed = plan.section.seed
    if plan.data == "streaming":
        return StreamedCrops(_stream(plan, world, own, device))
    return ResidentCrops(
        read_crops(plan.store, share_of(plan.shards, world.rank, world.size)),
        batch_size=own,
        seed=fold_seed(seed, "order", world.rank),
        device=device,
        full_scale=plan.full_scale,
    )


def _stream(plan: RunPlan, world: World, own: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Batches of this worker's split, epoch after epoch, shuffled within a window of sixteen batches."""
    shard = ray.train.get_dataset_shard(STREAM)
    batch_size = settings_of(plan.section, channels=plan.channels, precision=plan.precision).batch_size
    # All workers take rows at one rate, or one would wait for a new epoch while another waits for its gradient.
    rows = -(-batch_size // world.size)
    epoch = 0
    while True:
        empty = True
        for table in shard.iter_batches(
            batch_size=rows,
            batch_format="pyarrow",
            drop_last=True,
            local_shuffle_buffer_size=16 * rows,
            local_shuffle_seed=fold_seed(plan.section.seed, "stream", epoch, world.rank) % 2**31,
        ):
            empty = False
            crops = unpack_pixels(table["pixels"], table.schema.field("pixels"))[:own]
            yield torch.from_numpy(crops.astype(np.float32)).to(device).div_(plan.full_scale)
        if empty:
            return
        epoch += 1


def plan_to_json(plan: RunPlan) -> dict[str, Any]:
    """The part of a plan that is fixed for the run's life, as JSON values."""
    values = asdict(plan)
    return {name: values[name] for name in ("identity", "rule", "channels", "full_scale", "precision", "data")}
