"""Runs a stage in a process of its own and kills it with SIGKILL as soon as a file appears."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

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
