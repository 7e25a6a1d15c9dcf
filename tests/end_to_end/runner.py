"""Run `ctc-ray` as a user does, in a process of its own, and kill it where a test says so."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CTC_RAY = (sys.executable, "-m", "ctc_ray.cli")


@dataclass(frozen=True)
class Finished:
    """How one command ended."""

    code: int
    out: str
    err: str
    seconds: float


@dataclass(frozen=True)
class Demo:
    """A finished demo: read it, never write into it."""

    out: Path
    run: Finished

    @property
    def cohort(self) -> Path:
        return self.out / "cohort"

    @property
    def cartridges(self) -> Path:
        return self.out / "cartridges"

    def copy(self, target: Path) -> Path:
        """A copy of the cohort that a test may change."""
        shutil.copytree(self.cohort, target)
        return target


def ctc_ray(*words: str, timeout_s: float = 900) -> Finished:
    """Run the command in a process of its own."""
    started = time.monotonic()
    done = subprocess.run([*CTC_RAY, *words], capture_output=True, text=True, timeout=timeout_s, check=False)
    return Finished(done.returncode, done.stdout, done.stderr, time.monotonic() - started)


def kill_when(ready: Callable[[], bool], *words: str, timeout_s: float = 300) -> None:
    """Start the command, SIGKILL it once `ready` says so, and wait until its workers are gone too."""
    process = subprocess.Popen(
        [*CTC_RAY, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + timeout_s
    try:
        while not ready():
            assert process.poll() is None, f"the command ended with {process.returncode} before it could be killed"
            assert time.monotonic() < deadline, "the command never reached the point where it should be killed"
            time.sleep(0.02)
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
    time.sleep(5)  # Ray's processes notice that their driver is gone


def record(folder: Path) -> dict[str, Any]:
    """The record of one output folder."""
    values: dict[str, Any] = json.loads((folder / "_record.json").read_text())
    return values
