"""How well two clusterings of the same cells agree, and how well a plane keeps neighbours. Runs without Ray.

Two maps are compared through the table of how many cells each pair of their clusters shares: it is small however many cells
there are, and tables of shards add up.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ctc_ray.errors import SchemaError
from ctc_ray.latent.cluster import BACKGROUND

TRUST_NEIGHBORS = 30
TRUST_CELLS = 3000
"""Cells on which trustworthiness is worked out: it takes all their distances."""


@dataclass
class SharedCells:
    """Number of cells that each pair of clusters shares.

    Attributes:
        counts: (cluster of the first map, cluster of the second) -> cells.
    """

    counts: Counter[tuple[int, int]] = field(default_factory=Counter)

    def add(self, first_N: npt.NDArray[np.integer], second_N: npt.NDArray[np.integer]) -> None:
        """Count cells by their clusters (N,) on both maps; -1 is background.

        Raises:
            SchemaError: the lengths differ.
        """
        if len(first_N) != len(second_N):
            raise SchemaError(f"{len(first_N)} clusters and {len(second_N)}: give two of each cell, in the same order")
        pairs, numbers = np.unique(np.stack([first_N, second_N], axis=1), axis=0, return_counts=True)
        for (first, second), number in zip(pairs.tolist(), numbers.tolist(), strict=True):
            self.counts[(first, second)] += number

    @property
    def num_cells(self) -> int:
        """All cells counted."""
        return sum(self.counts.values())

    def table(self) -> tuple[list[int], list[int], npt.NDArray[np.int64]]:
        """Clusters of the first map (A), of the second (B), both ascending, and the cells they share (A, B)."""
        rows, columns = sorted({a for a, _ in self.counts}), sorted({b for _, b in self.counts})
        counts = np.zeros((len(rows), len(columns)), np.int64)
        for (first, second), number in self.counts.items():
            counts[rows.index(first), columns.index(second)] = number
        return rows, columns, counts

    def without_background(self) -> SharedCells:
        """The same for cells that neither map calls background."""
        return SharedCells(Counter({pair: n for pair, n in self.counts.items() if BACKGROUND not in pair}))


def adjusted_rand(counts_AB: npt.NDArray[np.integer]) -> float | None:
    """Adjusted Rand index of two partitions, from the table of shared cells.

    Args:
        counts_AB: (A, B) cells.

    Returns:
        1 for equal partitions, about 0 for unrelated ones; 1 where both have one group or both only single cells; None without cells.

    Source: Hubert and Arabie 1985; exact integers, so that a million cells do not overflow.
    """
    counts = [[int(value) for value in row] for row in np.asarray(counts_AB)]
    total = sum(map(sum, counts))
    if not total:
        return None
    pairs = sum(_pairs(value) for row in counts for value in row)
    first = sum(_pairs(sum(row)) for row in counts)
    second = sum(_pairs(sum(column)) for column in zip(*counts, strict=True))
    # Both sides of (pairs - expected) / (mean - expected) times the number of all pairs, doubled: integers until the end.
    expected, most = 2 * first * second, (first + second) * _pairs(total)
    if most == expected:
        return 1.0
    return (2 * pairs * _pairs(total) - expected) / (most - expected)


def _pairs(number: int) -> int:
    return number * (number - 1) // 2


def match_clusters(shared: SharedCells) -> dict[int, int]:
    """Cluster of the first map -> cluster of the second, each at most once, so that most cells are in matched clusters.

    Background goes with background alone; a cluster that shares no cell with its partner has none.
    """
    from scipy.optimize import linear_sum_assignment

    rows, columns, counts = shared.without_background().table()
    if not counts.size:
        return {BACKGROUND: BACKGROUND}
    first, second = linear_sum_assignment(counts, maximize=True)
    found = {rows[a]: columns[b] for a, b in zip(first, second, strict=True) if counts[a, b]}
    return {BACKGROUND: BACKGROUND, **found}


def equal_share(shared: SharedCells) -> float | None:
    """Share of the cells whose clusters on both maps are matched to each other; None without cells."""
    if not shared.num_cells:
        return None
    matched = match_clusters(shared)
    same = sum(number for (first, second), number in shared.counts.items() if matched.get(first) == second)
    return same / shared.num_cells


def trustworthiness(
    scores_NP: npt.NDArray[np.floating], places_N2: npt.NDArray[np.floating], num_neighbors: int = TRUST_NEIGHBORS
) -> float | None:
    """How far neighbours on the plane are neighbours among the PCA scores too.

    Args:
        scores_NP: (N, P); distances between all pairs are held, so give a sample.
        places_N2: (N, 2).
        num_neighbors: looked at on the plane; less for few cells.

    Returns:
        1 where all are, about 0.5 for places by chance; None for fewer than five cells.

    Source: Venna and Kaski 2001, as in scikit-learn.
    """
    from sklearn.manifold import trustworthiness as of_scikit_learn

    num = min(num_neighbors, (len(scores_NP) - 1) // 2)
    if len(scores_NP) < 5 or num < 1:
        return None
    return float(of_scikit_learn(scores_NP, places_N2, n_neighbors=num))


def summarise_agreement(shared: SharedCells) -> dict[str, float | int | None]:
    """Cells, clusters and background of both maps, adjusted Rand of all cells and of those that both cluster, equal share."""
    rows, columns, counts = shared.table()
    clustered = shared.without_background()
    return {
        "num_cells": shared.num_cells,
        "num_clusters": sum(name != BACKGROUND for name in rows),
        "num_clusters_other": sum(name != BACKGROUND for name in columns),
        "num_background": sum(number for (first, _), number in shared.counts.items() if first == BACKGROUND),
        "num_background_other": sum(number for (_, second), number in shared.counts.items() if second == BACKGROUND),
        "adjusted_rand": adjusted_rand(counts),
        "num_cells_clustered_by_both": clustered.num_cells,
        "adjusted_rand_of_clustered": adjusted_rand(clustered.table()[2]),
        "equal_share": equal_share(shared),
    }
