"""What each process of a Ray Train run of the segmenter does: read the images, train, report.

State lies in the output folder and not in Ray: checkpoint, history, progress and errors are files there. A training that
was killed, with its driver or alone, is continued by running it again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import ray.train
import ray.train.torch as ray_torch
import torch

from ctc_ray.errors import CtcRayError
from ctc_ray.segment.atomic_file import write_atomic
from ctc_ray.segment.network import NetworkConfig
from ctc_ray.segment.training import Schedule, train
from ctc_ray.segment.training_images import Pair, PairFiles, read_pair
from ctc_ray.segment.training_world import Alone, ProcessGroup

STATUS_FILE: Final = "status.json"
ERROR_FILE: Final = "error.json"
_STATUS_INTERVAL_S: Final = 1.0


@dataclass(frozen=True)
class TrainingPlan:
    """What all workers of a training share; paths are seen by every machine.

    Attributes:
        pairs: images to learn from, and their masks.
        held_out: images for progress figures and thresholds.
        page: of images with several pages.
        out: folder of the training.
        state: folder for progress and errors, below `out`.
        schedule: length, rates, seed, precision.
        network: architecture.
        initial: weights to start from, or None.
        num_threads: of one worker on a CPU.
    """

    pairs: tuple[PairFiles, ...]
    held_out: tuple[PairFiles, ...]
    page: int
    out: Path
    state: Path
    schedule: Schedule
    network: NetworkConfig
    initial: str | None
    num_threads: int

    def read(self, files: Sequence[PairFiles]) -> list[Pair]:
        """The images; which of them are usable was decided before.

        Raises:
            CartridgeError: a file changed since, or this machine does not see it.
        """
        return [read_pair(one, page=self.page, allow_empty=True) for one in files]


def train_worker(config: dict[str, TrainingPlan]) -> None:
    """Train as one worker of a Ray Train run.

    Args:
        config: the plan under the key `plan`.

    Raises:
        CtcRayError: what `train` raises; also left in `error.json`, and a restarted worker that finds it ends at once, since
            our own errors would only come again.
    """
    plan = config["plan"]
    if (plan.state / ERROR_FILE).exists():
        return
    try:
        _train(plan)
    except CtcRayError as error:
        reported = {"kind": type(error).__name__, "message": str(error)}
        write_atomic(plan.state / ERROR_FILE, json.dumps(reported).encode())
        raise


def _train(plan: TrainingPlan) -> None:
    device = ray_torch.get_device()
    if device.type == "cpu":
        # Ray counts logical processors; more threads than processors only wait for each other.
        torch.set_num_threads(min(plan.num_threads, os.cpu_count() or 1))
    context = ray.train.get_context()
    first = context.get_world_rank() == 0
    status = _Status(plan.state / STATUS_FILE)

    def on_step(step: int, loss: float) -> None:
        if first:
            status.write(step, loss, last=step == plan.schedule.steps)

    train(
        plan.read(plan.pairs),
        plan.read(plan.held_out) if first else [],
        plan.out,
        schedule=plan.schedule,
        network=plan.network,
        initial=plan.initial,
        device=device,
        world=ProcessGroup() if context.get_world_size() > 1 else Alone(),
        on_step=on_step,
        # Every rank reports equally often; the weights themselves lie in the output folder already.
        on_checkpoint=lambda step: ray.train.report({"step": step}),
    )


class _Status:
    """Leaves step and loss for the driver's progress bar, about once a second."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written = 0.0

    def write(self, step: int, loss: float, *, last: bool) -> None:
        now = time.monotonic()
        if last or now - self._written >= _STATUS_INTERVAL_S:
            self._written = now
            write_atomic(self._path, json.dumps({"step": step, "loss": loss}).encode())
