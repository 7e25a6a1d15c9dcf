"""The reference implementation's own draws: all its faults for `mode: faithful`, single ones for `faults`.

In the reference all random numbers come from Python's Mersenne twister re-seeded with the run's seed before each draw, and what
is drawn are positions in the pool. `random.Random(seed)` gives the same numbers as re-seeding the module.

Source: reference implementation, `sim_hil_1_logic` and `sim_hil_2_logic`.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from ctc_ray.config import FaultName
from ctc_ray.errors import ConfigError
from ctc_ray.hil.pools import Floats, Ints
from ctc_ray.hil.quotas import cluster_deficit, largest_remainder, members_of, share_out
from ctc_ray.hil.state import LoopState

Draw = Callable[[list[int], int], list[int]]
"""Draws so many of the candidates without repeats."""


def sample(seed: int, candidates: Sequence[int] | Ints, count: int) -> Ints:
    """Re-seed and draw `count` of the candidates without repeats, in the order drawn."""
    return np.array(random.Random(seed).sample([int(c) for c in candidates], count), dtype=np.int64)


def choose_random(state: LoopState, rng: np.random.Generator) -> Ints:
    """Re-seed and draw from the pool (fault `reseeding`); the generator is not used."""
    del rng
    return sample(state.seed, state.pool, min(state.count, len(state.pool)))


def cluster_f1_keeping(*faults: FaultName) -> Callable[[LoopState, np.random.Generator], Ints]:
    """The strategy `cluster-f1` with these faults of the reference left in and the others mended.

    With `short-cluster`, cells can repeat. With `unscored-clusters`, fewer than `state.count` come where the clusters with a score
    have no more.

    Args:
        faults: `short-cluster` (fault 2), `rounding`, `unscored-clusters` (25), `reseeding`; others change nothing here. With none
            it chooses what `strategies.choose_cluster_f1` does, with all four what the reference does.

    Raises:
        ConfigError: when choosing, the reference would stop: every F1 is 1, its fallback runs past the end of the clusters, or
            rounding leaves the lowest cluster less than nothing.
    """
    return functools.partial(_choose_cluster_f1, faults=frozenset(faults))


def _choose_cluster_f1(state: LoopState, rng: np.random.Generator, faults: frozenset[FaultName]) -> Ints:
    names = _names(state, faults)
    deficits = np.array([cluster_deficit(state, name) for name in names])
    pool_clusters = state.clusters[state.pool]
    quotas = _quotas(state.count, deficits, np.array([int(np.sum(pool_clusters == name)) for name in names]), faults)
    left = list(deficits)  # one list for all clusters: the fallback shortens it for those that follow
    picked: list[int] = []  # positions in the pool
    for name, quota in zip(names, quotas.tolist(), strict=True):
        draw = _drawer(state.seed, rng, faults)
        taken = set(picked)
        candidates = [i for i in np.flatnonzero(pool_clusters == name).tolist() if i not in taken]
        if len(candidates) >= quota:
            picked += draw(candidates, quota)
            continue
        picked += candidates
        picked += _fallback(draw, quota - len(candidates), left, names, pool_clusters)
    return state.pool[np.array(picked, dtype=np.int64)]


def _names(state: LoopState, faults: frozenset[FaultName]) -> list[int]:
    """Clusters that get a quota, ascending: those of the pool; with `short-cluster` used up ones too."""
    scored = set(state.cluster_scores)
    names = set(members_of(state))
    if "short-cluster" in faults:
        names |= scored
    if "unscored-clusters" in faults:
        if not any(cluster_deficit(state, name) for name in scored):
            raise ConfigError(
                "cluster-f1: all clusters have F1 1, and the reference divides by zero here; use --mode corrected without "
                "--fault unscored-clusters"
            )
        names &= scored
    return sorted(names)


def _quotas(
    count: int, deficits: Floats, available: npt.NDArray[np.int64], faults: frozenset[FaultName]
) -> npt.NDArray[np.int64]:
    weights = deficits if deficits.sum() > 0 else available.astype(np.float64)
    if not faults & {"short-cluster", "rounding"} or weights.sum() == 0:
        return share_out(count, deficits, available)
    rule = rounded_quotas if "rounding" in faults else largest_remainder
    quotas = rule(count, weights / weights.sum())
    if "short-cluster" in faults:
        return quotas
    within = np.minimum(quotas, available)
    return within + share_out(count - int(within.sum()), deficits, available - within)


def rounded_quotas(count: int, shares: Floats) -> npt.NDArray[np.int64]:
    """Quotas of the reference: each share rounded, the whole difference to the largest.

    Args:
        count: cells to give out.
        shares: (C,) not below zero, sum 1.

    Raises:
        ConfigError: there are so many clusters for so few cells that the largest would get less than nothing.
    """
    quotas = np.array([int(np.round(count * share)) for share in shares], dtype=np.int64)
    largest = int(np.argmax(shares))
    quotas[largest] += count - int(quotas.sum())
    if quotas[largest] < 0:
        raise ConfigError(
            f"cluster-f1: {count} cells rounded over {len(shares)} clusters leave {quotas[largest]} for the lowest, and the reference "
            "stops here; raise hil.per_loop, or use --mode corrected without --fault rounding"
        )
    return quotas


def _drawer(seed: int, rng: np.random.Generator, faults: frozenset[FaultName]) -> Draw:
    """What a cluster's cells are drawn with: a generator of its own (fault `reseeding`), or that of the loop."""
    if "reseeding" in faults:
        return random.Random(seed).sample
    return lambda candidates, count: [int(i) for i in rng.choice(candidates, count, replace=False)]


def _fallback(draw: Draw, need: int, deficits: list[float], names: list[int], pool_clusters: Ints) -> list[int]:
    """What the reference does with a cluster that is too small: draw from the one listed after the lowest, again and again.

    Cells that are drawn already can come again. Positions that equal the name of a cluster are left out, as in the reference.
    """
    found: list[int] = []
    remedy = "use --mode corrected without --fault short-cluster"
    while need > 0:
        if not deficits:
            raise ConfigError(f"cluster-f1: the reference runs out of clusters here; {remedy}")
        lowest = int(np.argmax(deficits))
        deficits.pop(lowest)
        others = names[:lowest] + names[lowest + 1 :]
        if lowest >= len(others):
            raise ConfigError(
                f"cluster-f1: the lowest cluster is the last one, and the reference stops with an IndexError here; {remedy}"
            )
        candidates = [i for i in np.flatnonzero(pool_clusters == others[lowest]).tolist() if i not in names]
        drawn = draw(candidates, min(need, len(candidates)))
        found += drawn
        need -= len(drawn)
    return found


def split_cluster(seed: int, members: Ints) -> tuple[Ints, Ints]:
    """Split a cluster's positions into about 80 % and the rest, in the reference's orders.

    Args:
        seed: seed of the run.
        members: positions of the cluster, ascending.

    Returns:
        Positions of the 80 % as drawn, and the others in the order of a Python set.
    """
    shuffled = [int(i) for i in members]
    random.Random(seed).shuffle(shuffled)
    large = random.Random(seed).sample(shuffled, round(0.8 * len(shuffled)))
    rest = list(set(shuffled) - set(large))
    return np.array(large, dtype=np.int64), np.array(rest, dtype=np.int64)
