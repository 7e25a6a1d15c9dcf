"""Whatever is lost on the way, a run ends with the weights that it would have had."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import polars as pl
import psutil
import pytest
import safetensors.torch
import torch
from cells_cohort import small_cohort
from killed_run import done_to_workers, run_and_kill
from small_runs import SMALL

from ctc_ray.cohort import Cohort
from ctc_ray.config import RunConfig, load_config
from ctc_ray.errors import WeightsError
from ctc_ray.pretrain.checkpoint import CheckpointFolder
from ctc_ray.pretrain.intensity import constants_from_histogram, fraction_histogram
from ctc_ray.pretrain.settings import settings_of
from ctc_ray.pretrain.slices import read_crops, share_of
from ctc_ray.pretrain.stage import run_pretrain
from ctc_ray.pretrain.trainer import DinoTrainer, ResidentCrops, fold_seed, train
from ctc_ray.progress import Progress
from ctc_ray.records import read_record
from ctc_ray.storage import StorageError

ROOT = Path(__file__).parents[2]
ROLES = {"007": "pretrain", "12": "pretrain"}


def config_of(*overrides: str) -> RunConfig:
    return load_config(None, [*SMALL, *overrides])


def run(config: RunConfig, cohort: Cohort) -> tuple[int, int]:
    result = run_pretrain(config, cohort, progress=Progress(quiet=True))
    return result.units_computed, result.units_reused


def published(cohort: Cohort) -> dict[str, torch.Tensor]:
    return dict(safetensors.torch.load(cohort.store.read_bytes("encoders/dino/encoder.safetensors")))


def metrics_of(cohort: Cohort) -> pl.DataFrame:
    frame = pl.from_arrow(cohort.store.read_table("encoders/dino/metrics.parquet"))
    assert isinstance(frame, pl.DataFrame)
    return frame


def checkpoint_steps(cohort: Cohort) -> list[int]:
    (folder,) = cohort.store.list_folders("encoders/dino/_train") or ["none"]
    return CheckpointFolder(cohort.store, f"encoders/dino/_train/{folder}/checkpoints", identity=folder).steps()


def has_checkpoint(cohort: Cohort) -> Callable[[], bool]:
    return lambda: bool(checkpoint_steps(cohort))


def plain_loop(config: RunConfig, cohort: Cohort) -> dict[str, torch.Tensor]:
    """The encoder of the same run without Ray, without interruption."""
    torch.set_num_threads(1)
    shards = {s: cohort.store.num_rows(s) for p in ROLES for s in cohort.shards(cohort.cells(p))}
    crops = read_crops(cohort.store, share_of(shards, 0, 1))
    section = config.pretrain
    low, high = section.intensity_percentiles
    rule = constants_from_histogram(
        fraction_histogram(crops, full_scale=255.0),
        low_percentile=low,
        high_percentile=high,
        compression=section.intensity_compression,
    )
    settings = settings_of(section, channels=crops.shape[1], precision="fp32")
    trainer = DinoTrainer(settings, rule)
    seed = fold_seed(settings.seed, "order", 0)
    train(trainer, ResidentCrops(crops, batch_size=settings.batch_size, seed=seed, full_scale=255.0))
    return dict(trainer.teacher.backbone.state_dict())


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


@pytest.mark.ray
@pytest.mark.slow
def test_killed_worker_is_replaced_and_the_weights_are_those_of_the_plain_loop(
    ray_cluster: None, tmp_path: Path
) -> None:
    cohort = small_cohort(tmp_path / "c", ROLES)
    config = config_of("pretrain.steps=100", "pretrain.num_workers=1", "pretrain.max_failures=1")
    with done_to_workers(psutil.Process.kill, has_checkpoint(cohort)) as killed:
        assert run(config, cohort) == (100, 0)
    assert len(killed) == 1
    metrics = metrics_of(cohort)
    assert metrics["step"].to_list() == list(range(1, 101))
    assert_equal(published(cohort), plain_loop(config, cohort))


@pytest.mark.ray
@pytest.mark.slow
def test_killed_driver_is_run_again_and_the_weights_are_those_of_the_plain_loop(
    ray_cluster: None, tmp_path: Path
) -> None:
    cohort = small_cohort(tmp_path / "c", ROLES)
    overrides = [*SMALL, "pretrain.steps=100", "pretrain.num_workers=1"]
    assert run_and_kill("pretrain", tmp_path / "c", overrides, has_checkpoint(cohort))
    assert read_record(cohort.store, "encoders/dino") is None
    config = load_config(None, overrides)
    computed, reused = run(config, cohort)
    assert 0 < reused < 100
    assert computed + reused == 100
    assert_equal(published(cohort), plain_loop(config, cohort))


@pytest.mark.ray
@pytest.mark.slow
def test_full_disk_and_damage_leave_a_checkpoint_from_which_fewer_workers_continue(
    ray_cluster: None, tmp_path: Path
) -> None:
    cohort = small_cohort(tmp_path / "c", ROLES)
    steps = "pretrain.steps=60"

    def fill(worker: psutil.Process) -> None:
        worker.rlimit(psutil.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))  # larger files find no room

    with done_to_workers(fill, has_checkpoint(cohort)) as full, pytest.raises(StorageError, match="free space"):
        run(config_of(steps, "pretrain.num_workers=2"), cohort)
    assert len(full) == 2
    *_, before, last = [0, *checkpoint_steps(cohort)]
    assert 0 < last < 60
    # No part of the checkpoint that found no room is left.
    folder = next((tmp_path / "c" / "encoders" / "dino" / "_train").glob("*/checkpoints"))
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    assert len(list(folder.iterdir())) == 2 * len(checkpoint_steps(cohort))

    newest = folder / f"step-{last:08d}.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    one = config_of(steps, "pretrain.num_workers=1")
    with pytest.raises(WeightsError, match=rf"step-{last:08d}\.json.*damaged.*delete"):
        run(one, cohort)
    newest.with_suffix(".json").unlink()
    assert run(one, cohort) == (60 - before, before)
    metrics = metrics_of(cohort)
    assert metrics["step"].to_list() == list(range(1, 61))
    assert metrics["workers"].to_list() == [2] * before + [1] * (60 - before)


@pytest.mark.ray
@pytest.mark.slow
def test_lost_machine_is_done_without(tmp_path: Path) -> None:
    """Two machines of one processor each; the one without the driver is lost, and nothing takes its place."""
    cohort = small_cohort(tmp_path / "c", ROLES)
    config = ["pretrain.steps=300", "pretrain.num_workers=2", "pretrain.min_workers=1", "pretrain.batch_size=5"]
    config.append("pretrain.max_failures=4")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
        "RAY_health_check_initial_delay_ms": "0",
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_failure_threshold": "25",  # seconds: a busy machine is not a lost one
    }
    script = ROOT / "tests" / "lost_machine.py"
    subprocess.run(
        [sys.executable, str(script), str(tmp_path / "c"), *SMALL, *config],
        env=environment,
        check=True,
        timeout=500,
    )
    metrics = metrics_of(cohort)
    assert metrics["step"].to_list() == list(range(1, 301))
    workers = metrics["workers"].to_list()
    assert workers[0] == 2
    assert workers[-1] == 1
    assert workers == sorted(workers, reverse=True)
