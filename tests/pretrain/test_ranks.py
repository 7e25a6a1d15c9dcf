"""Workers that see different crops hold one teacher, one student and one centre."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

ROOT = Path(__file__).parents[2]

_SCRIPT = """
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist

from ctc_ray.pretrain.augment import ViewGeometry
from ctc_ray.pretrain.intensity import IntensityRule
from ctc_ray.pretrain.settings import MARKER
from ctc_ray.pretrain.trainer import DinoTrainer, ResidentCrops, train
from ctc_ray.pretrain.worker import world_of

out, rank, batch_size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
dist.init_process_group("gloo", rank=rank, world_size=2)
settings = replace(
    MARKER, architecture="test_resnet", geometry=ViewGeometry(global_px=32, local_px=16, num_local=1), steps=20,
    batch_size=batch_size, prototypes=32, head_hidden=16, head_bottleneck=8, warmup_fraction=0.1, freeze_fraction=0.1,
)
world, own = world_of(rank, 2, batch_size)
crops = np.random.default_rng(rank).integers(0, 60 + 150 * rank, (12, 3, 48, 48)).astype(np.uint8)
trainer = DinoTrainer(settings, IntensityRule("constants", (0.0,) * 3, (1.0,) * 3, 3.0), world=world)
start = {f"start.{name}": value for name, value in trainer.tensors().items()}
rows = []
train(trainer, ResidentCrops(crops, batch_size=own, seed=rank), until=10, on_step=rows.append)
mean = world.average(torch.arange(batch_size, dtype=torch.float64)[rank * (batch_size // 2):][:own].mean().clone())
tensors = {**trainer.tensors(), **start, "losses": torch.tensor([row.loss for row in rows]), "mean": mean}
safetensors.torch.save_file(tensors, out / f"{rank}.safetensors")
dist.destroy_process_group()
"""


def both(folder: Path, batch_size: int) -> list[dict[str, torch.Tensor]]:
    """What two workers hold after ten steps."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", _SCRIPT, str(folder)]
    workers = [subprocess.Popen([*command, str(rank), str(batch_size)], env=environment) for rank in range(2)]
    assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
    return [safetensors.torch.load_file(folder / f"{rank}.safetensors") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [8, 5])
def test_after_ten_steps_teachers_and_centres_are_identical_across_ranks(tmp_path: Path, batch_size: int) -> None:
    """Five crops a step are two and three: each worker weighs what it has."""
    left, right = both(tmp_path, batch_size)
    assert left.keys() == right.keys()
    statistics = [name for name in left if name.startswith("teacher.backbone") and "running_var" in name]
    assert len(statistics) > 3
    for name, value in left.items():
        assert torch.equal(value, right[name]), name
    # They have moved, weights and buffers, so that equality says something.
    for name in [*statistics, "teacher.head.prototypes", "loss.centre"]:
        assert not torch.equal(left[name], left[f"start.{name}"]), name
    assert float(left["mean"]) == pytest.approx((batch_size - 1) / 2)
