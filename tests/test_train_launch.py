"""Trainings on Ray Train: errors come home under their names, lost workers are replaced, lost room is done without."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from ctc_ray.errors import ConfigError, CtcRayError, ResourceError, WeightsError, named_error
from ctc_ray.progress import Progress, Task
from ctc_ray.storage import StorageError
from ctc_ray.train_launch import Reports, Workers, _Board, launch


@dataclass(frozen=True)
class Plan:
    """What the workers of these tests do: leave a mark each time they start, then what `act` says."""

    folder: Path
    act: str


def work(plan: Plan, reports: Reports) -> None:
    import ray.train

    context = ray.train.get_context()
    (plan.folder / f"start-{time.time_ns()}-{context.get_world_rank()}").write_text(str(context.get_world_size()))
    starts = len(list(plan.folder.glob("start-*")))
    if plan.act == "error":
        raise WeightsError("weights are not weights")
    if plan.act == "die always" or (plan.act == "die once" and starts == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    reports.step(starts, f"start {starts}", now=True)
    reports.warn("mind the gap")


def run(folder: Path, act: str, workers: Workers) -> tuple[Task, list[str], list[str]]:
    """The task, the warnings, and the number of workers at each start of one."""
    warnings: list[str] = []
    folder.mkdir(exist_ok=True)
    with Progress(quiet=True).task("work", total=9) as task:
        launch(
            work,
            Plan(folder, act),
            workers,
            name="test",
            storage_path=str(folder / "ray"),
            task=task,
            warn=warnings.append,
        )
    return task, warnings, [path.read_text() for path in sorted(folder.glob("start-*"))]


@pytest.mark.parametrize("kind", [WeightsError, StorageError, ResourceError])
def test_error_is_found_by_its_name(kind: type[CtcRayError]) -> None:
    error = named_error(kind.__name__, "what and where")
    assert type(error) is kind
    assert "what and where" in str(error)


def test_unknown_error_becomes_a_resource_error() -> None:
    assert type(named_error("KeyError", "x")) is ResourceError


@pytest.mark.ray
def test_workers_that_end_bring_their_steps_and_warnings(ray_cluster: None, tmp_path: Path) -> None:
    task, warnings, starts = run(tmp_path, "end", Workers(num_workers=1))
    assert (task.done, warnings, starts) == (1, ["mind the gap"], ["1"])


@pytest.mark.ray
def test_error_of_ours_comes_home_under_its_name_and_is_not_tried_again(ray_cluster: None, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="not weights"):
        run(tmp_path, "error", Workers(num_workers=1, max_failures=2))
    assert len(list(tmp_path.glob("start-*"))) == 1


@pytest.mark.ray
@pytest.mark.slow
def test_killed_worker_is_started_again_as_often_as_max_failures_says(ray_cluster: None, tmp_path: Path) -> None:
    task, _, starts = run(tmp_path / "once", "die once", Workers(num_workers=1, max_failures=1))
    assert (task.done, starts) == (2, ["1", "1"])
    with pytest.raises(ResourceError, match=r"after 1 restarts.*run again"):
        run(tmp_path / "always", "die always", Workers(num_workers=1, max_failures=1))
    assert len(list((tmp_path / "always").glob("start-*"))) == 2


@pytest.mark.ray
def test_lost_board_costs_words_and_not_the_training(ray_cluster: None) -> None:
    import ray

    board = ray.remote(num_cpus=0)(_Board).remote()
    reports = Reports(board)
    reports.fail(WeightsError("weights are not weights"))
    assert reports.failed()
    ray.kill(board)
    assert not reports.failed()
    reports.step(1, "step 1", now=True)
    reports.warn("mind the gap")
    reports.fail(WeightsError("weights are not weights"))


@pytest.mark.ray
def test_workers_without_room_are_refused(ray_cluster: None) -> None:
    assert Workers(num_workers=2).require_room("pretrain") == 2
    assert Workers(num_workers=9).require_room("pretrain") == 4
    assert Workers(num_workers=4, num_cpus=2).require_room("pretrain") == 2
    assert Workers(num_workers=4).require_room("pretrain", spare_cpus=1) == 3
    with pytest.raises(ResourceError, match=r"4 processors.*room for 4.*9 are needed.*pretrain\.num_workers"):
        Workers(num_workers=9, min_workers=9).require_room("pretrain")
    with pytest.raises(ResourceError, match=r"0 GPUs.*pretrain\.use_gpu=false"):
        Workers(num_workers=1, use_gpu=True).require_room("pretrain")
    with pytest.raises(ConfigError, match=r"pretrain\.min_workers 3 is more"):
        Workers(num_workers=2, min_workers=3).require_room("pretrain")
