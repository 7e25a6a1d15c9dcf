"""Run one function over many patients: as Ray tasks where Ray is connected, one after the other where it is not."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from ctc_ray.progress import Progress, Task

Result = TypeVar("Result")


def run_over(
    function: Callable[..., Result],
    arguments: Sequence[tuple[Any, ...]],
    *,
    description: str,
    progress: Progress | None = None,
    names: Sequence[str] = (),
    num_gpus: int = 0,
) -> Iterator[tuple[int, Result]]:
    """Call `function(*arguments[i])` for every i, in other processes where Ray is connected.

    Args:
        function: a module-level function of picklable arguments; it reads and writes its own files and returns little.
        arguments: one tuple a call.
        description: what the progress line says.
        progress: where progress goes; None: nowhere.
        names: what each call works on, for the progress line.
        num_gpus: GPUs that Ray gives each call; the cluster must have as many, or the calls wait for ever.

    Yields:
        (i, result) as calls finish. An error of the function ends the iteration, with the remaining calls cancelled.
    """
    with (progress or Progress(quiet=True)).task(description, len(arguments)) as task:
        results = _in_ray(function, arguments, num_gpus) if ray_is_connected() else _here(function, arguments)
        for index, result in results:
            _advance(task, names, index)
            yield index, result


def ray_is_connected() -> bool:
    """Whether this process has a Ray cluster; does not load Ray where nobody has."""
    module = sys.modules.get("ray")
    return module is not None and bool(module.is_initialized())


def _advance(task: Task, names: Sequence[str], index: int) -> None:
    task.advance(note=names[index] if names else "")


def _here(function: Callable[..., Result], arguments: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Result]]:
    for index, values in enumerate(arguments):
        yield index, function(*values)


def _single_threaded(function: Callable[..., Result], *values: Any) -> Result:
    """Call with one BLAS and OpenMP thread, as Ray counts this task for one CPU."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        return function(*values)


def _in_ray(
    function: Callable[..., Result], arguments: Sequence[tuple[Any, ...]], num_gpus: int
) -> Iterator[tuple[int, Result]]:
    """Ray tasks of one CPU each, so many in flight as the cluster has CPUs (and two more, so that none waits)."""
    import ray
    from ray.exceptions import RayTaskError

    remote = ray.remote(num_cpus=1, num_gpus=num_gpus, max_retries=3)(_single_threaded)
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    limit = int(resources.get("CPU", 1)) + 2
    waiting = list(enumerate(arguments))[::-1]
    running: dict[Any, int] = {}
    try:
        while waiting or running:
            while waiting and len(running) < limit:
                index, values = waiting.pop()
                running[remote.remote(function, *values)] = index
            done, _ = ray.wait(list(running), num_returns=1)
            for reference in done:
                index = running.pop(reference)
                try:
                    yield index, ray.get(reference)
                except RayTaskError as error:
                    cause = error.cause
                    raise (cause if isinstance(cause, Exception) else error) from None
    finally:
        for reference in running:
            ray.cancel(reference, force=False)


def process_identity() -> tuple[str, int]:
    """Node and process id for records; `local` where Ray is not connected."""
    if not ray_is_connected():
        return "local", os.getpid()
    from ctc_ray.cluster import worker_identity

    return worker_identity()
