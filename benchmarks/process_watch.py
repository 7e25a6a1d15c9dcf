"""Memory and processor time of this process and all below it, and what Ray's object store holds, sampled while a block runs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import psutil

_INTERVAL_S = 1.0
_MB = 2**20


@dataclass
class Watched:
    """What was seen; MB are 2^20 bytes.

    Attributes:
        driver_rss_mb: peak resident memory of this process, shared pages counted in.
        driver_uss_mb: peak of its own pages.
        driver_uss_mb_by_time: its own pages at every sample.
        worker_uss_mb: peak of own pages of the largest worker process.
        workers_uss_mb: peak of own pages of all worker processes together.
        store_mb: peak use of the object store.
        spilled_mb: spilled from the object store, in all.
    """

    driver_rss_mb: float = 0.0
    driver_uss_mb: float = 0.0
    driver_uss_mb_by_time: list[float] = field(default_factory=list)
    worker_uss_mb: float = 0.0
    workers_uss_mb: float = 0.0
    store_mb: float = 0.0
    spilled_mb: float = 0.0
    _cpu_s: dict[tuple[int, float, str], list[float]] = field(default_factory=dict)

    def cpu_seconds(self, kind: str | None = None) -> float:
        """Processor seconds of all processes, or of one kind: `driver`, `embed`, `read`, `worker`, `ray` (its own processes)."""
        spans = [(last - first) for (_, _, own), (first, last) in self._cpu_s.items() if kind in (None, own)]
        return sum(spans)

    def sample(self, *, memory: bool) -> None:
        """Look once; a process's time counts from the first look, or from its start where it began later."""
        began_late = bool(self._cpu_s)
        driver = psutil.Process()
        workers = 0.0
        for process in [driver, *driver.children(recursive=True)]:
            try:
                kind = "driver" if process.pid == driver.pid else _kind(process)
                times = process.cpu_times()
                key = (process.pid, process.create_time(), kind)
                # A worker takes the name of what it runs: its time goes to the last name that it had.
                former = next((k for k in self._cpu_s if k[:2] == key[:2]), None)
                first = self._cpu_s.pop(former)[0] if former else (0.0 if began_late else times.user + times.system)
                if former and former[2] != kind and kind == "worker":
                    key = former  # idle again
                self._cpu_s[key] = [first, times.user + times.system]
                if memory and kind != "ray":
                    own = process.memory_full_info()
                    if kind == "driver":
                        self.driver_rss_mb = max(self.driver_rss_mb, own.rss / _MB)
                        self.driver_uss_mb = max(self.driver_uss_mb, own.uss / _MB)
                        self.driver_uss_mb_by_time.append(round(own.uss / _MB, 1))
                    else:
                        workers += own.uss / _MB
                        self.worker_uss_mb = max(self.worker_uss_mb, own.uss / _MB)
            except psutil.Error:
                continue  # it ended while we looked
        self.workers_uss_mb = max(self.workers_uss_mb, workers)
        self._sample_store()

    def _sample_store(self) -> None:
        import ray

        if not ray.is_initialized():
            return
        from ray._private.internal_api import get_memory_info_reply, get_state_from_address

        stats = get_memory_info_reply(get_state_from_address(ray.get_runtime_context().gcs_address)).store_stats
        self.store_mb = max(self.store_mb, stats.object_store_bytes_used / _MB)
        self.spilled_mb = max(self.spilled_mb, stats.spilled_bytes_total / _MB)


def _kind(process: psutil.Process) -> str:
    title = " ".join(process.cmdline()[:1])
    if not title.startswith("ray::"):
        return "ray"
    if "EmbedUnits" in title:
        return "embed"
    return "read" if "read_units" in title else "worker"


@contextlib.contextmanager
def watched() -> Iterator[Watched]:
    """Sample every second while the block runs, memory maps every fifth time."""
    found, done = Watched(), threading.Event()
    found.sample(memory=True)

    def keep_looking() -> None:
        number = 0
        while not done.wait(_INTERVAL_S):
            number += 1
            found.sample(memory=number % 5 == 0)

    watcher = threading.Thread(target=keep_looking, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
        found.sample(memory=True)
