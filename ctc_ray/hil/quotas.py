"""How many cells of each cluster to look at: the cluster's deficit, and sharing a number out by weights."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ctc_ray.hil.pools import Floats, Ints
from ctc_ray.hil.state import LoopState

PRIOR_CELLS = 10.0
"""Weight of the error rate over all clusters in that of one, in cells; chosen before any study and not tuned."""


def cluster_deficit(state: LoopState, cluster: int) -> float:
    """How wrong a cluster is, 0 to 1: 1 - F1; 1 without evidence; 0 where there are neither CTCs nor calls."""
    found = state.cluster_scores.get(cluster)
    if found is None or found.num_cells == 0:
        return 1.0
    return 1.0 - found.f1 if found.f1 is not None else 0.0


def shrunken_error_rates(state: LoopState, clusters: list[int]) -> Floats:
    """Share of wrong predictions of each cluster, drawn towards that of all clusters where there is little evidence.

    Args:
        state: with `cluster_scores`.
        clusters: which.

    Returns:
        (C,) float64, 0 to 1: the mean of a Beta distribution whose prior has the overall rate and the weight of `PRIOR_CELLS` cells.
        Cells count once, however often Monte-Carlo splits predicted them.
    """
    found = [state.cluster_scores.get(cluster) for cluster in clusters]
    known = [score for score in state.cluster_scores.values() if score.num_cells]
    cells = sum(score.num_distinct for score in known)
    # Half a mistake in one cell more: no evidence at all, or no mistake, still leaves every cluster a chance.
    overall = (sum(score.error_rate * score.num_distinct for score in known) + 0.5) / (cells + 1.0)
    return np.array(
        [
            overall
            if score is None
            else (score.error_rate * score.num_distinct + PRIOR_CELLS * overall) / (score.num_distinct + PRIOR_CELLS)
            for score in found
        ]
    )


def members_of(state: LoopState) -> dict[int, Ints]:
    """Cells of the pool by cluster, clusters ascending, cells in the pool's order."""
    clusters = state.clusters[state.pool]
    return {int(c): state.pool[clusters == c] for c in np.unique(clusters)}


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
        given = np.minimum(largest_remainder(left, active / active.sum()), room)
        quotas += given
        left -= int(given.sum())
    return quotas


def largest_remainder(count: int, shares: Floats) -> npt.NDArray[np.int64]:
    """Whole numbers (C,) with sum `count`, each within one of its share (C,) of it; shares sum to 1."""
    exact = count * shares
    whole = np.floor(exact).astype(np.int64)
    order = np.argsort(-(exact - whole), kind="stable")
    whole[order[: count - int(whole.sum())]] += 1
    return whole
