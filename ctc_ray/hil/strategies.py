"""Which cells the expert should look at next.

A strategy is a function from the state of the loop and a random generator to the positions of `state.count` cells of the
pool, each once (all of the pool where it is smaller). It looks at the state alone: features, clusters, the classifier and, where
it asks for them, scores per cluster. A new one is a function and a line in `STRATEGIES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ctc_ray.errors import ConfigError
from ctc_ray.hil.blended import (
    choose_badge,
    choose_cluster_herding,
    choose_cluster_margin,
    choose_random_mix,
    choose_uncertainty_herding,
)
from ctc_ray.hil.diverse import choose_k_center, choose_maxherding, choose_probcover, choose_typiclust
from ctc_ray.hil.pools import Ints
from ctc_ray.hil.quotas import cluster_deficit, members_of, share_out
from ctc_ray.hil.state import LoopState
from ctc_ray.hil.uncertain import choose_entropy, choose_margin, choose_qbc, choose_uncertainty_ensemble

Choose = Callable[[LoopState, np.random.Generator], Ints]


@dataclass(frozen=True)
class Strategy:
    """A way of choosing, and what it needs to be told.

    Attributes:
        name: as on the command line.
        choose: the function.
        needs_cluster_scores: whether `state.cluster_scores` must be filled.
        source: where it comes from.
    """

    name: str
    choose: Choose
    needs_cluster_scores: bool
    source: str


def choose_random(state: LoopState, rng: np.random.Generator) -> Ints:
    """Draw from the pool, every cell alike.

    Source: paper, Methods: the baseline of all experiments.
    """
    return rng.choice(state.pool, min(state.count, len(state.pool)), replace=False)


def choose_cluster_f1(state: LoopState, rng: np.random.Generator) -> Ints:
    """Draw from clusters in proportion to 1 - F1, at random within a cluster.

    A cluster without any evidence counts as F1 0: it is looked at. One whose labels and predictions hold no CTC at all counts
    as right. What a short cluster cannot give goes to the others by their own 1 - F1, and no cell is drawn twice.

    Source: paper, Methods (cluster-specific sampling); departures: quotas by largest remainder, redistribution of a short
    cluster's rest, clusters without evidence (the reference repeats cells, can fail, and never draws the last kind).
    """
    members = members_of(state)
    deficits = np.array([cluster_deficit(state, cluster) for cluster in members])
    available = np.array([len(cells) for cells in members.values()])
    quotas = share_out(state.count, deficits, available)
    drawn = [rng.choice(cells, quota, replace=False) for cells, quota in zip(members.values(), quotas, strict=True)]
    return np.concatenate(drawn) if drawn else np.empty(0, np.int64)


STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Strategy("random", choose_random, False, "paper, Methods"),
        Strategy("cluster-f1", choose_cluster_f1, True, "paper, Methods, with the reference's faults mended"),
        Strategy("margin", choose_margin, False, "Tong and Koller, JMLR 2:45 (2001)"),
        Strategy("entropy", choose_entropy, False, "Settles (2009), with probabilities by Platt (1999)"),
        Strategy("qbc", choose_qbc, False, "Abe and Mamitsuka, ICML 1998"),
        Strategy("k-center", choose_k_center, False, "Sener and Savarese, ICLR 2018"),
        Strategy("typiclust", choose_typiclust, False, "Hacohen et al., ICML 2022"),
        Strategy("probcover", choose_probcover, False, "Yehuda et al., NeurIPS 2022"),
        Strategy("maxherding", choose_maxherding, False, "Bae et al., ECCV 2024"),
        Strategy("uncertainty-herding", choose_uncertainty_herding, False, "Bae et al., ICLR 2025"),
        Strategy("cluster-margin", choose_cluster_margin, False, "Citovsky et al., NeurIPS 2021"),
        Strategy("badge", choose_badge, False, "Ash et al., ICLR 2020, with a linear head"),
        Strategy("random-mix", choose_random_mix, False, "half margin, half random"),
        Strategy("uncertainty-ensemble", choose_uncertainty_ensemble, False, "this project"),
        Strategy("cluster-herding", choose_cluster_herding, True, "this project"),
    )
}

RECOMMENDED = "uncertainty-ensemble"
"""For whoever does not want to choose. Source: `docs/hil_study.md`, by the rule of `benchmarks/hil_study.py`."""


def strategy_named(name: str) -> Strategy:
    """Look a strategy up.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in STRATEGIES:
        raise ConfigError(f"no strategy {name!r}: known are {', '.join(STRATEGIES)}")
    return STRATEGIES[name]
