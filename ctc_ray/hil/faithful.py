"""The reference implementation's own draws, faults included, for `mode: faithful`.

All random numbers come from Python's Mersenne twister re-seeded with the run's seed before each draw, and what is drawn are
positions in the pool. `random.Random(seed)` gives the same numbers as re-seeding the module.

Source: reference implementation, `sim_hil_1_logic` and `sim_hil_2_logic`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from ctc_ray.errors import ConfigError
from ctc_ray.hil.pools import Ints
from ctc_ray.hil.state import LoopState


def sample(seed: int, candidates: Sequence[int] | Ints, count: int) -> Ints:
    """Re-seed and draw `count` of the candidates without repeats, in the order drawn."""
    return np.array(random.Random(seed).sample([int(c) for c in candidates], count), dtype=np.int64)


def choose_random(state: LoopState, rng: np.random.Generator) -> Ints:
    """Re-seed and draw from the pool; the generator is not used."""
    del rng
    return sample(state.seed, state.pool, min(state.count, len(state.pool)))


def choose_cluster_f1(state: LoopState, rng: np.random.Generator) -> Ints:
    """Draw from clusters in proportion to 1 - F1 with the reference's fallback (fault 2): cells can repeat.

    The generator is not used. Clusters without a Monte-Carlo score are never drawn (fault 25).

    Raises:
        ConfigError: the reference would stop here: every F1 is 1, or its fallback runs past the end of the clusters.
    """
    del rng
    names = sorted(state.cluster_scores)
    f1 = [float(state.cluster_scores[name].f1 or 0.0) for name in names]
    quotas = _quotas(f1, state.count)
    pool_clusters = state.clusters[state.pool]
    scores = list(f1)  # one list for all clusters: the fallback shortens it for those that follow
    picked: list[int] = []  # positions in the pool
    for name, quota in zip(names, quotas, strict=True):
        generator = random.Random(state.seed)
        taken = set(picked)
        candidates = [i for i in range(len(state.pool)) if pool_clusters[i] == name and i not in taken]
        if len(candidates) >= quota:
            picked += generator.sample(candidates, quota)
            continue
        picked += candidates
        picked += _fallback(generator, quota - len(candidates), scores, names, pool_clusters)
    return state.pool[np.array(picked, dtype=np.int64)]


def _quotas(f1: list[float], count: int) -> list[int]:
    deficit = 1.0 - np.array(f1)
    if deficit.sum() == 0:
        raise ConfigError(
            "faithful mode: all clusters have F1 1, and the reference divides by zero here; use --mode corrected"
        )
    quotas = [int(np.round(count * part)) for part in deficit / deficit.sum()]
    quotas[int(np.argmin(f1))] += count - sum(quotas)
    return quotas


def _fallback(
    generator: random.Random, need: int, scores: list[float], names: list[int], pool_clusters: Ints
) -> list[int]:
    """What the reference does with a cluster that is too small: draw from the one listed after the lowest, again and again."""
    found: list[int] = []
    while need > 0:
        if not scores:
            raise ConfigError("faithful mode: the reference runs out of clusters here; use --mode corrected")
        lowest = int(np.argmin(scores))
        scores.pop(lowest)
        others = names[:lowest] + names[lowest + 1 :]
        if lowest >= len(others):
            raise ConfigError(
                "faithful mode: the lowest cluster is the last one, and the reference stops with an IndexError here; "
                "use --mode corrected"
            )
        candidates = [i for i in np.flatnonzero(pool_clusters == others[lowest]).tolist() if i not in names]
        drawn = generator.sample(candidates, min(need, len(candidates)))
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
