"""Run one function over many units as Ray tasks, a few at a time, and hand back small rows as they finish."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any


def fan_out(function: Callable[..., Any], units: Sequence[tuple[Any, ...]], *, num_cpus: float = 1) -> Iterator[Any]:
    """Call a function once a unit, on the workers of the connected cluster.

    Tasks that are lost with their machine are repeated by Ray; an exception of the function itself ends the run, so functions
    that may set a unit aside return that as a row.

    Args:
        function: importable by the workers.
        units: positional arguments of each call; small, since they travel with the task.
        num_cpus: logical CPUs of one task.

    Yields:
        What the calls return, in the order in which they finish.
    """
    import ray

    if not units:
        return
    remote = ray.remote(num_cpus=num_cpus, max_retries=3)(function)
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    limit = max(2, 2 * int(resources.get("CPU", 1) / num_cpus))
    waiting = list(reversed(units))
    running: list[Any] = []
    while waiting or running:
        while waiting and len(running) < limit:
            running.append(remote.remote(*waiting.pop()))
        finished, running = ray.wait(running, num_returns=1)
        yield ray.get(finished[0])
