"""Which cells the expert should look at next.

A strategy is a function from the state of the loop and a random generator to the positions of `state.count` cells of the
pool, each once (all of the pool where it is smaller). It looks at the state alone: features, clusters, the classifier and, where
it asks for them, scores per cluster. A new one is a function and a line in `STRATEGIES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ctc_ray.errors import ConfigError
from ctc_ray.hil.pools import Floats, Ints
from ctc_ray.hil.state import LoopState

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


def choose_margin(state: LoopState, rng: np.random.Generator) -> Ints:
    """Take the cells nearest to the classifier's border; ties in random order.

    Source: Tong and Koller, Support vector machine active learning, JMLR 2:45 (2001), "simple margin".
    """
    shuffled = rng.permutation(state.pool)
    if state.classifier is None:
        raise ConfigError("the margin strategy needs a fitted classifier in the state")
    distance = np.abs(state.classifier.decision_function(state.features[shuffled]))
    return shuffled[np.argsort(distance, kind="stable")[: state.count]]


def choose_cluster_f1(state: LoopState, rng: np.random.Generator) -> Ints:
    """Draw from clusters in proportion to 1 - F1, at random within a cluster.

    A cluster without any evidence counts as F1 0: it is looked at. One whose labels and predictions hold no CTC at all counts
    as right. What a short cluster cannot give goes to the others by their own 1 - F1, and no cell is drawn twice.

    Source: paper, Methods (cluster-specific sampling); departures: quotas by largest remainder, redistribution of a short
    cluster's rest, clusters without evidence (the reference repeats cells, can fail, and never draws the last kind).
    """
    members = {int(c): state.pool[state.clusters[state.pool] == c] for c in np.unique(state.clusters[state.pool])}
    deficits = np.array([cluster_deficit(state, cluster) for cluster in members])
    available = np.array([len(cells) for cells in members.values()])
    quotas = share_out(state.count, deficits, available)
    drawn = [rng.choice(cells, quota, replace=False) for cells, quota in zip(members.values(), quotas, strict=True)]
    return np.concatenate(drawn) if drawn else np.empty(0, np.int64)


def cluster_deficit(state: LoopState, cluster: int) -> float:
    """How wrong a cluster is, 0 to 1: 1 - F1; 1 without evidence; 0 where there are neither CTCs nor calls."""
    found = state.cluster_scores.get(cluster)
    if found is None or found.num_cells == 0:
        return 1.0
    return 1.0 - found.f1 if found.f1 is not None else 0.0


def share_out(count: int, weights: Floats, available: Ints) -> npt.NDArray[np.int64]:
    """Split a number of cells over clusters in proportion to weights, within what each has.

    Args:
        count: cells to give out; less is given where there are fewer in all.
        weights: (C,) not below zero.
        available: (C,) cells of each cluster.

    Returns:
        (C,) int64 quotas with sum min(count, available.sum()), each at most what is available. Once all clusters of weight
        above zero are empty, the rest is shared by what the others have.
    """
    quotas = np.zeros(len(available), np.int64)
    left = min(count, int(available.sum()))
    while left:
        room = available - quotas
        active = np.where(room > 0, weights, 0.0)
        if active.sum() <= 0:
            active = room.astype(np.float64)
        given = np.minimum(_largest_remainder(left, active / active.sum()), room)
        quotas += given
        left -= int(given.sum())
    return quotas


def _largest_remainder(count: int, shares: Floats) -> npt.NDArray[np.int64]:
    exact = count * shares
    whole = np.floor(exact).astype(np.int64)
    order = np.argsort(-(exact - whole), kind="stable")
    whole[order[: count - int(whole.sum())]] += 1
    return whole


STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Strategy("random", choose_random, False, "paper, Methods"),
        Strategy("cluster-f1", choose_cluster_f1, True, "paper, Methods, with the reference's faults mended"),
        Strategy("margin", choose_margin, False, "Tong and Koller, JMLR 2:45 (2001)"),
    )
}


def strategy_named(name: str) -> Strategy:
    """Look a strategy up.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in STRATEGIES:
        raise ConfigError(f"no strategy {name!r}: known are {', '.join(STRATEGIES)}")
    return STRATEGIES[name]
