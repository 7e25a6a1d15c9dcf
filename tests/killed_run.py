"""Runs stages that lose their driver or a worker half way, as clusters do."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

_SCRIPT = """
import sys
from ctc_ray.cluster import connect
from ctc_ray.cohort import Cohort
from ctc_ray.config import RayConfig, load_config
from ctc_ray.progress import Progress

stage, folder, *overrides = sys.argv[1:]
config, cohort = load_config(None, overrides), Cohort.open(folder)
with connect(config=RayConfig(num_cpus=4, object_store_mb=200)):
    if stage == "pretrain":
        from ctc_ray.pretrain.stage import run_pretrain as run
    else:
        from ctc_ray.embed.stage import run_embed as run
    run(config, cohort, progress=Progress(quiet=True))
"""


def run_and_kill(
    stage: str, cohort: Path, overrides: list[str], when: Callable[[], bool], *, timeout_s: float = 400.0
) -> bool:
    """Start a stage, wait for a sign of half-done work, kill the driver; returns whether it was still running then."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, stage, str(cohort), *overrides],
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + timeout_s
    try:
        while process.poll() is None and time.monotonic() < deadline:
            if when():
                return True
            time.sleep(0.02)
        return False
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(3.0)  # its workers notice and end; they may still finish a write, as on a real cluster


def training_workers() -> list[psutil.Process]:
    """Training processes of the cluster that this process started, and of no other."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it ended while we looked
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


@contextlib.contextmanager
def done_to_workers(
    act: Callable[[psutil.Process], object], when: Callable[[], bool], *, timeout_s: float = 400.0
) -> Iterator[list[int]]:
    """While the block runs, do something to every training worker as soon as there is a sign of half-done work.

    Yields:
        The process ids that it was done to, filled in meanwhile.
    """
    done: list[int] = []
    stop = threading.Event()
    deadline = time.monotonic() + timeout_s

    def watch() -> None:
        while not stop.wait(0.02) and time.monotonic() < deadline:
            if when() and (workers := training_workers()):
                for worker in workers:
                    with contextlib.suppress(psutil.Error):  # it ended at this very moment
                        act(worker)
                        done.append(worker.pid)
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield done
    finally:
        stop.set()
        thread.join()
