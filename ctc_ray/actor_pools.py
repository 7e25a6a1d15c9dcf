"""Sizes of the actor pools of a Ray Data plan, so that they fit the cluster and survive the loss of a machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ctc_ray.cluster import Wanted, bring_up, started_here
from ctc_ray.errors import ResourceError
from ctc_ray.progress import Progress

SPARE_CPUS = 1
"""Processors beside the pools, for reading and for finishing patients: without them a plan waits for ever."""


@dataclass(frozen=True)
class Pool:
    """A pool that a plan wants.

    Attributes:
        name: as messages call its actors.
        setting: that holds its size.
        size: actors at most.
        cpus: logical CPUs of an actor.
        gpus: GPUs of an actor, or the fraction of one.
    """

    name: str
    setting: str
    size: int
    cpus: float = 1
    gpus: float = 0


def sizes_that_fit(pools: Sequence[Pool], cpus: float, gpus: float, spare_cpus: float = SPARE_CPUS) -> list[int] | None:
    """Share a cluster among pools.

    Args:
        pools: of one plan.
        cpus: logical CPUs of the cluster.
        gpus: its GPUs.
        spare_cpus: processors to leave free.

    Returns:
        Actors of each pool, at most its size, grown in turns from one each while `spare_cpus` stay free; None where one actor
        each does not fit.
    """

    def fits(sizes: Sequence[int]) -> bool:
        return all(have >= need for have, need in zip((cpus, gpus), _needs(pools, sizes, spare_cpus), strict=True))

    sizes = [1] * len(pools)
    if not fits(sizes):
        return None
    growing = True
    while growing:
        growing = False
        for index, pool in enumerate(pools):
            trial = [size + (place == index) for place, size in enumerate(sizes)]
            if sizes[index] < pool.size and fits(trial):
                sizes, growing = trial, True
    return sizes


def _needs(pools: Sequence[Pool], sizes: Sequence[int], spare_cpus: float) -> tuple[float, float]:
    cpus = sum(pool.cpus * size for pool, size in zip(pools, sizes, strict=True))
    return cpus + spare_cpus, sum(pool.gpus * size for pool, size in zip(pools, sizes, strict=True))


def fitted_pools(
    stage: str,
    pools: Sequence[Pool],
    progress: Progress,
    *,
    spare_cpus: float = SPARE_CPUS,
    wait_s: float = 600.0,
) -> list[Any]:
    """Ray Data's description of each pool, as large as the cluster allows.

    A pool may shrink to one actor, so that a plan goes on where a machine is lost (a pool of fixed size then waits for ever),
    and grows up to its size again. A cluster that was not started here may add machines: it is asked for them where not even
    one actor a pool fits, and pools may grow with it.

    Args:
        stage: whose plan it is.
        pools: of the plan.
        progress: where to say that fewer actors than configured fit, or that machines are waited for.
        spare_cpus: processors that the rest of the plan needs.
        wait_s: how long to wait for machines.

    Returns:
        One `ray.data.ActorPoolStrategy` a pool.

    Raises:
        ResourceError: one actor a pool does not fit.
    """
    import ray

    sizes = _fit(pools, spare_cpus)
    least = _needs(pools, [1] * len(pools), spare_cpus)
    if sizes is None and not started_here():
        progress.say(
            f"  {stage}: {_described(least)} needed at least: asking the cluster, waiting up to {wait_s:.0f} s"
        )
        bring_up(Wanted(cpus=-int(-least[0] // 1), gpus=-int(-least[1] // 1), timeout_s=wait_s))
        sizes = _fit(pools, spare_cpus)
    if sizes is None:
        actors = ", ".join(f"1 {pool.name} of {pool.cpus:g} CPUs and {pool.gpus:g} GPUs" for pool in pools)
        raise ResourceError(
            f"{stage} needs at least {_described(least)} ({actors}, {spare_cpus:g} CPUs to read), the cluster has "
            f"{_described(_resources())}: use a larger one, or raise ray.num_cpus (logical CPUs of a cluster started here)"
        )
    for pool, size in zip(pools, sizes, strict=True):
        if size < pool.size:
            progress.say(f"  {stage}: {size} of {pool.size} {pool.name}s fit the cluster ({pool.setting})")
    return [
        ray.data.ActorPoolStrategy(min_size=1, max_size=size if started_here() else pool.size, initial_size=size)
        for pool, size in zip(pools, sizes, strict=True)
    ]


def _fit(pools: Sequence[Pool], spare_cpus: float) -> list[int] | None:
    return sizes_that_fit(pools, *_resources(), spare_cpus)


def _resources() -> tuple[float, float]:
    import ray

    total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]  # Ray does not type it
    return total.get("CPU", 0.0), total.get("GPU", 0.0)


def _described(amounts: tuple[float, float]) -> str:
    cpus, gpus = amounts
    return f"{cpus:g} logical CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
