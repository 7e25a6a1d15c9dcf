"""Training by several processes, and by Ray Train: the same weights, whatever is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import safetensors.torch
import torch
from disc_images import TINY, disc_pair, short, write_pairs

from ctc_ray.config import RunConfig, load_config
from ctc_ray.errors import ConfigError, ResourceError, StaleOutputError
from ctc_ray.progress import Progress
from ctc_ray.segment.train_segmenter import TrainedSegmenter, run_train_segmenter
from ctc_ray.segment.training import train
from ctc_ray.segment.training_checkpoint import steps_done

ROOT = Path(__file__).parents[2]


class Thread:
    """One of several worlds that live in the threads of this process."""

    def __init__(self, rank: int, size: int, shared: list[object], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, size
        self._shared, self._barrier = shared, barrier

    def average(self, tensors: Sequence[torch.Tensor]) -> None:
        self._shared[self.rank] = [tensor.detach().clone() for tensor in tensors]
        self._barrier.wait()
        for index, tensor in enumerate(tensors):
            tensor.copy_(torch.stack([own[index] for own in self._shared]).mean(dim=0))  # type: ignore[index]
        self._barrier.wait()

    def share(self, data: bytes, device: torch.device) -> bytes:
        if self.rank == 0:
            self._shared[0] = data
        self._barrier.wait()
        given = self._shared[0]
        self._barrier.wait()
        assert isinstance(given, bytes)
        return given


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "weights.safetensors")


def assert_close(left: Path, right: Path, *, tolerance: float) -> None:
    one, other = weights_of(left), weights_of(right)
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=tolerance)


def test_two_processes_with_half_a_batch_each_train_as_one_with_the_whole(tmp_path: Path) -> None:
    pairs, held = [disc_pair(seed) for seed in range(3)], [disc_pair(9)]
    schedule = replace(short(12, precision="fp32"), batch_size=4)
    train(pairs, held, tmp_path / "start", schedule=short(1), network=TINY)
    settings = {"schedule": schedule, "network": TINY, "initial": tmp_path / "start"}
    train(pairs, held, tmp_path / "one", **settings)  # type: ignore[arg-type]
    shared: list[object] = [None, None]
    barrier = threading.Barrier(2, timeout=60)
    chosen: dict[int, object] = {}

    def work(rank: int) -> None:
        world = Thread(rank, 2, shared, barrier)
        own = held if rank == 0 else []
        chosen[rank] = train(pairs, own, tmp_path / "two", world=world, **settings)  # type: ignore[arg-type]

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert chosen[0] == chosen[1]
    assert_close(tmp_path / "one", tmp_path / "two", tolerance=1e-5)
    # The steps were large enough for the tolerance to mean something.
    with pytest.raises(AssertionError):
        assert_close(tmp_path / "one", tmp_path / "start", tolerance=1e-3)


def test_batch_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    world = Thread(0, 3, [None] * 3, threading.Barrier(1))
    with pytest.raises(ConfigError, match="divide among 3"):
        train([disc_pair(0)], [disc_pair(1)], tmp_path, schedule=short(2), network=TINY, world=world)


def overrides(steps: int, *more: str) -> list[str]:
    small = ["batch_size=2", "patch_size_px=64", "n_filter_base=4", "warmup_steps=2", "learning_rate=1e-3"]
    settings = [*small, f"steps={steps}", "checkpoint_every=4", "precision=fp32", "num_threads=1", *more]
    return [f"train_segmenter.{setting}" for setting in settings]


def run(config: RunConfig, data: Path, out: str, *, local: bool = False) -> TrainedSegmenter:
    quiet = Progress(quiet=True)
    return run_train_segmenter(config, data / "images", data / "masks", data / out, progress=quiet, local=local)


@pytest.mark.ray
@pytest.mark.slow
def test_ray_train_gives_the_weights_of_the_plain_loop(ray_cluster: None, tmp_path: Path) -> None:
    write_pairs(tmp_path, 4)
    config = load_config(None, overrides(12))
    local = run(config, tmp_path, "local", local=True)
    one = run(config, tmp_path, "one")
    assert (one.steps_now, one.thresholds) == (12, local.thresholds)
    assert_close(tmp_path / "local", tmp_path / "one", tolerance=0.0)
    run(load_config(None, overrides(12, "num_workers=2")), tmp_path, "two")
    assert_close(tmp_path / "local", tmp_path / "two", tolerance=1e-5)
    assert not (tmp_path / "two" / ".ray").exists()
    # Our own errors come through with their names, and are not tried again.
    with pytest.raises(StaleOutputError, match="another output folder"):
        run(load_config(None, overrides(12, "seed=1")), tmp_path, "one")


@pytest.mark.ray
def test_training_that_does_not_fit_the_cluster_is_refused(ray_cluster: None, tmp_path: Path) -> None:
    write_pairs(tmp_path, 3)
    with pytest.raises(ConfigError, match="does not divide"):
        run(load_config(None, overrides(4, "num_workers=3")), tmp_path, "out")
    with pytest.raises(ResourceError, match="processors"):
        run(load_config(None, overrides(4, "num_workers=2", "num_threads=3")), tmp_path, "out")
    with pytest.raises(ResourceError, match="GPUs"):
        run(load_config(None, overrides(4, "use_gpu=true")), tmp_path, "out")


def kill_when(done: Callable[[], bool], kill: Callable[[], None], *, timeout_s: float = 200.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if done():
            kill()
            return True
        time.sleep(0.02)
    return False


def own_training_workers() -> list[psutil.Process]:
    """Training processes of the cluster that this process started, and of no other."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:  # it ended while we looked
            continue
        if "RayTrainWorker" in title:
            found.append(process)
    return found


@pytest.mark.ray
@pytest.mark.slow
def test_training_whose_worker_is_killed_goes_on_to_the_same_weights(ray_cluster: None, tmp_path: Path) -> None:
    write_pairs(tmp_path, 4)
    config = load_config(None, overrides(200))
    run(config, tmp_path, "whole", local=True)
    killed: list[bool] = []

    def watch() -> None:
        def kill() -> None:
            for worker in own_training_workers():
                worker.kill()

        def half_done() -> bool:
            return 8 <= steps_done(tmp_path / "parts") < 150 and bool(own_training_workers())

        killed.append(kill_when(half_done, kill))

    thread = threading.Thread(target=watch)
    thread.start()
    assert run(config, tmp_path, "parts").steps_now == 200
    thread.join()
    assert killed == [True]
    assert_close(tmp_path / "whole", tmp_path / "parts", tolerance=0.0)


@pytest.mark.ray
@pytest.mark.slow
def test_training_whose_driver_is_killed_is_continued_to_the_same_weights(ray_cluster: None, tmp_path: Path) -> None:
    images, masks = write_pairs(tmp_path, 4)
    given = overrides(200)
    words = [str(images), str(masks), "--out", str(tmp_path / "parts")]
    words += [word for setting in given for word in ("--set", setting)]
    driver = subprocess.Popen(
        [sys.executable, "-m", "ctc_ray.cli", "train-segmenter", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert kill_when(lambda: steps_done(tmp_path / "parts") >= 8, lambda: driver.send_signal(signal.SIGKILL))
    finally:
        driver.kill()
        driver.wait()
    time.sleep(3.0)  # its workers notice and end; they may still finish a write, as on a real cluster
    done = steps_done(tmp_path / "parts")
    assert not (tmp_path / "parts" / "weights.safetensors").exists()
    config = load_config(None, given)
    assert run(config, tmp_path, "parts").steps_now == 200 - done < 200
    run(config, tmp_path, "whole", local=True)
    assert_close(tmp_path / "whole", tmp_path / "parts", tolerance=0.0)
