"""What each process of a Ray Train run of the segmenter does: read the images, train, report.

State lies in the output folder and not in Ray: checkpoint and history are files there. A training that was killed, with its
driver or alone, is continued by running it again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ray.train
import ray.train.torch as ray_torch
import torch

from ctc_ray.segment.network import NetworkConfig
from ctc_ray.segment.training import Schedule, train
from ctc_ray.segment.training_images import Pair, PairFiles, read_pair
from ctc_ray.segment.training_world import Alone, ProcessGroup
from ctc_ray.train_launch import Reports


@dataclass(frozen=True)
class TrainingPlan:
    """What all workers of a training share; paths are seen by every machine.

    Attributes:
        pairs: images to learn from, and their masks.
        held_out: images for progress figures and thresholds.
        page: of images with several pages.
        out: folder of the training.
        state: folder for Ray's own notes, below `out`.
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


def train_worker(plan: TrainingPlan, reports: Reports) -> None:
    """Train as one worker of a Ray Train run.

    Args:
        plan: what to train.
        reports: receives the steps.

    Raises:
        CtcRayError: what `train` raises.
    """
    device = ray_torch.get_device()
    if device.type == "cpu":
        # Ray counts logical processors; more threads than processors only wait for each other.
        torch.set_num_threads(min(plan.num_threads, os.cpu_count() or 1))
    context = ray.train.get_context()
    first = context.get_world_rank() == 0

    def on_step(step: int, loss: float) -> None:
        if first:
            reports.step(step, f"step {step}, loss {loss:.3f}", now=step == plan.schedule.steps)

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
