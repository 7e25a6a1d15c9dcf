"""The paper's simulated experiments: which cells are labelled at the start, which can be drawn, and how many a loop.

A scenario is set up once for each strategy and seed; the arms of one seed start from the same labels. `limited-global`
starts with few labels from everywhere. `limited-local` lacks most labels of one cluster, the main cluster. `rare-positive` (in a module
of its own) searches one region for the cells that the classifier misses.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ctc_ray.errors import ConfigError
from ctc_ray.hil import faithful
from ctc_ray.hil.pools import Ints, Problem
from ctc_ray.hil.rare_positive import rare_positive
from ctc_ray.hil.settings import LoopSettings, Start

_START_STREAM = 0x73746172

SetUp = Callable[[Problem, str, int, int | None, LoopSettings], Start]


def limited_global(
    problem: Problem, strategy: str, seed: int, main_cluster: int | None, settings: LoopSettings
) -> Start:
    """Few labels from the whole training set; the rest is the pool.

    In corrected mode the last loop takes what is left where the pool is a little short; faithful mode demands all of it.

    Raises:
        ConfigError: a main cluster is given, or the training set is smaller than the initial draw and the loops need.

    Source: paper, simulated HiL scenario 1.
    """
    if main_cluster is not None:
        raise ConfigError("limited-global has no main cluster: leave --main-cluster out, or choose limited-local")
    num, needed = len(problem.train), settings.initial + settings.loops * settings.per_loop
    least = needed if settings.mode == "faithful" else needed - settings.per_loop + 1
    if num < least:
        raise ConfigError(
            f"{problem.train.name} has {num} labelled cells, but {settings.initial} initial labels and {settings.loops} loops of "
            f"{settings.per_loop} need {needed}: label more cells, or lower hil.initial, hil.per_loop or hil.loops"
        )
    if settings.keeps("reseeding"):
        labelled = faithful.sample(seed, range(num), settings.initial)
    else:
        labelled = _start_rng(seed).choice(num, settings.initial, replace=False).astype(np.int64)
    pool = np.setdiff1d(np.arange(num), labelled)
    counts = _counts(min(len(pool), settings.loops * settings.per_loop), settings.per_loop, settings.loops)
    return Start(problem.train_clusters_filled, labelled, pool, counts, strategy)


def limited_local(
    problem: Problem, strategy: str, seed: int, main_cluster: int | None, settings: LoopSettings
) -> Start:
    """One cluster has a fifth of its labels, the others four fifths; the strategies differ in where they may draw.

    `cluster-f1` draws at random from the main cluster's other four fifths. Every other strategy chooses from a mixed pool of
    equal parts of all clusters: as many of the main cluster as it has labels at the start, and the other clusters' last fifth.

    Raises:
        ConfigError: no main cluster is given, or the training set has too few cells in it.

    Source: paper, simulated HiL scenario 2.
    """
    clusters = problem.train.clusters
    known = [int(c) for c in np.unique(clusters)]
    if main_cluster is None or main_cluster not in known:
        raise ConfigError(
            f"limited-local needs --main-cluster, one of {', '.join(map(str, known))}, not {main_cluster}"
        )
    if np.sum(clusters == main_cluster) < 5:
        raise ConfigError(
            f"cluster {main_cluster} has {np.sum(clusters == main_cluster)} labelled training cells: limited-local needs at least 5; "
            "choose another --main-cluster"
        )
    large, rest = {}, {}
    reseeding = settings.keeps("reseeding")
    for cluster in known:
        large[cluster], rest[cluster] = _split(seed, np.flatnonzero(clusters == cluster), reseeding)
    others = [c for c in known if c != main_cluster]
    labelled = np.concatenate([rest[main_cluster], *(large[c] for c in others)])
    count = len(rest[main_cluster])
    main_pool = large[main_cluster]
    part = _sample(seed, main_pool, min(count, len(main_pool)), reseeding)
    mixed_pool = np.concatenate([part, *(rest[c] for c in others)])
    if len(main_pool) > len(mixed_pool):
        main_pool = _sample(42, main_pool, len(mixed_pool), reseeding)
        count = round(len(main_pool) / 4)
    targeted = strategy == "cluster-f1"
    pool = main_pool if targeted else mixed_pool
    total = min(len(main_pool), len(mixed_pool))
    within_pool = "random" if targeted else strategy
    return Start(clusters, labelled, pool, _counts(total, count, settings.loops), within_pool)


def _counts(total: int, count: int, loops: int) -> tuple[int, ...]:
    """Cells of each loop: `count`, and in the last loop all that is left."""
    first = [min(count, max(0, total - loop * count)) for loop in range(loops - 1)]
    return (*first, total - sum(first))


def _start_rng(seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, _START_STREAM])


def _sample(seed: int, candidates: Ints, count: int, reseeding: bool) -> Ints:
    if reseeding:
        return faithful.sample(seed, candidates, count)
    return _start_rng(seed).choice(candidates, count, replace=False)


def _split(seed: int, members: Ints, reseeding: bool) -> tuple[Ints, Ints]:
    if reseeding:
        return faithful.split_cluster(seed, members)
    shuffled = np.random.default_rng([seed, _START_STREAM, int(members[0])]).permutation(members)
    num_large = round(0.8 * len(members))
    return shuffled[:num_large], shuffled[num_large:]


SCENARIOS: dict[str, SetUp] = {
    "limited-global": limited_global,
    "limited-local": limited_local,
    "rare-positive": rare_positive,
}


def scenario_named(name: str) -> SetUp:
    """Look a scenario up.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in SCENARIOS:
        raise ConfigError(f"no scenario {name!r}: known are {', '.join(SCENARIOS)}")
    return SCENARIOS[name]
