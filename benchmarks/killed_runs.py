"""Run a stage on emulated nodes, and kill some of its processes on the way."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

MARK = "CTC_RAY_SOAK"
"""Variable whose value tells the processes of one run from all others."""
NODES = 3
ROOT = Path(__file__).parents[1]


@dataclass
class Kill:
    """One kill and what became of it."""

    kind: str
    after_s: float
    """Seconds into the run."""
    share: float
    """Files there by then, of those of an uninterrupted run."""
    outcome: str = ""
    """`survived` (the run ended well all the same), `resumed` (a later one did), `hung`."""
    seconds_lost: float = 0.0


@dataclass
class Run:
    """One start of the command."""

    seconds: float
    exit_code: int | None
    """None: killed with its cluster, or hung."""
    gained: float
    """Share of the work that it did."""
    kills: list[Kill] = field(default_factory=list)
    hung: bool = False
    files: int = 0
    """Files there at its end, and those of unfinished patients that were there meanwhile."""
    first_file_s: float = 0.0


@dataclass(frozen=True)
class Job:
    """A stage on a cohort: how it is started, and where its files appear."""

    stage: str
    template: Path
    """Cohort as it is before the stage."""
    arguments: tuple[str, ...]
    outputs: tuple[str, ...]

    def command(self, cohort: Path) -> list[str]:
        """Command that runs the stage on emulated nodes."""
        nodes = [sys.executable, "-m", "benchmarks.emulated_nodes", str(NODES)]
        return [*nodes, sys.executable, "-m", "ctc_ray.cli", self.stage, str(cohort), *self.arguments]

    def files(self, cohort: Path) -> set[str]:
        """Parquet files below the outputs, those of unfinished patients among them."""
        found: set[str] = set()
        for output in self.outputs:
            for folder, _, names in os.walk(cohort / output):
                found.update(f"{folder}/{name}" for name in names if name.endswith(".parquet") and name[0] != ".")
        return found


def processes_of(mark: str) -> list[psutil.Process]:
    """Processes that were started with this mark, and theirs: Ray's workers write their title over their environment."""
    everyone, children, found = {}, defaultdict[int, list[int]](list), list[int]()
    for process in psutil.process_iter():
        try:
            everyone[process.pid] = process
            children[process.ppid()].append(process.pid)
            if process.environ().get(MARK) == mark:
                found.append(process.pid)
        except (psutil.Error, OSError):  # it ended, or belongs to someone else
            continue
    for parent in found:  # grows while it is gone through
        found += [child for child in children[parent] if child not in found]
    return [everyone[pid] for pid in found]


def victims(kind: str, mark: str, rng: np.random.Generator) -> list[psutil.Process]:
    """What one kill takes; nothing where there is no such process yet."""
    processes = processes_of(mark)
    if kind == "driver":
        return processes
    named = []
    for process in processes:
        try:
            line = process.cmdline()
        except psutil.Error:
            continue
        if not line:
            continue
        is_actor = line[0].startswith("ray::") and "MapWorker" in line[0]
        is_other_node = line[0].endswith("/raylet") and "--head" not in line
        if is_actor if kind == "actor" else is_other_node:
            named.append(process)
    if not named:
        return []
    chosen = named[int(rng.integers(len(named)))]
    return [chosen, *chosen.children(recursive=True)] if kind == "node" else [chosen]


def destroy(processes: Sequence[psutil.Process]) -> None:
    """SIGKILL all of them, and wait until they are gone; an exit code is left to whoever started the process."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    deadline = time.monotonic() + 30
    while any(is_alive(process) for process in processes) and time.monotonic() < deadline:
        time.sleep(0.02)


def is_alive(process: psutil.Process) -> bool:
    """Whether a process still runs; one that only waits for its exit code to be read does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@dataclass
class Watch:
    """What one run is given: when to kill what, how long to wait, where its files and words go."""

    job: Job
    cohort: Path
    expected: int
    """Files of an uninterrupted run."""
    startup_s: float
    """Until its first file."""
    timeout_s: float
    log: Path
    seen: set[str] = field(default_factory=set)
    """Files that were there at some moment of this round: parts go when their patient is finished."""


def run_once(watch: Watch, plan: Sequence[tuple[str, float]], rng: np.random.Generator) -> Run:
    """Start the command and carry out a plan of kills: (kind, share of all files; below zero: share of the start)."""
    mark = uuid.uuid4().hex
    environment = {**os.environ, MARK: mark, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    kills: list[Kill] = []
    before, started, moved, first_file_s = len(watch.seen), time.monotonic(), time.monotonic(), 0.0
    with watch.log.open("ab") as log:
        process = subprocess.Popen(
            watch.job.command(watch.cohort), env=environment, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
    waiting, hung = list(plan), False
    try:
        while process.poll() is None:
            new, now = watch.job.files(watch.cohort) - watch.seen, time.monotonic()
            watch.seen |= new
            moved = now if new else moved
            first_file_s = first_file_s or (now - started if new else 0.0)
            if now - moved > watch.timeout_s:
                hung = True
                break
            if waiting and due(waiting[0][1], len(watch.seen), now - started, watch):
                chosen = victims(waiting[0][0], mark, rng)
                destroy(chosen)
                if chosen:
                    kills.append(Kill(waiting.pop(0)[0], now - started, len(watch.seen) / max(watch.expected, 1)))
            time.sleep(0.05)
    finally:
        ended_s = time.monotonic() - started
        code = process.poll()
        destroy(processes_of(mark))
        process.wait()
    watch.seen |= watch.job.files(watch.cohort)
    gained = (len(watch.seen) - before) / max(watch.expected, 1)
    return Run(
        ended_s, code if code is not None and code >= 0 else None, gained, kills, hung, len(watch.seen), first_file_s
    )


def due(share: float, files: int, seconds: float, watch: Watch) -> bool:
    """Whether a kill's moment has come."""
    return seconds >= -share * watch.startup_s if share < 0 else files >= share * watch.expected
