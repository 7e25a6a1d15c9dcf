"""Strategies that spread the labels over the latent space, whatever the classifier says.

All take the state of the loop and a random generator and give positions of the pool, each once, the first choice first. Distances are those
of the features. Of a pool of more than `MOST_CANDIDATES` cells as many are drawn at random and looked at, since each pair counts.
"""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt
from sklearn.cluster import KMeans
from sklearn.neighbors import NearestNeighbors

from ctc_ray.hil.pools import Floats, Ints
from ctc_ray.hil.state import LoopState
from ctc_ray.hil.svm import gamma_scale, rbf_kernel, squared_distances

MOST_CANDIDATES = 5_000
TYPICAL_NEIGHBOURS = 20
"""Source: TypiClust, section 3.2."""
MOST_CLUSTERS = 500
"""Source: TypiClust, section 3.2."""
PURITY = 0.95
"""Source: ProbCover, section 4.2."""
_RADII = 40


def candidates(state: LoopState, rng: np.random.Generator) -> Ints:
    """The pool in random order, so that ties fall by chance; at most `MOST_CANDIDATES` of it, or as many as are wanted."""
    return rng.permutation(state.pool)[: max(MOST_CANDIDATES, state.count)]


def choose_k_center(state: LoopState, rng: np.random.Generator) -> Ints:
    """Take, one after another, the cell farthest from everything labelled or taken.

    Source: Sener and Savarese, Active learning for convolutional neural networks: a core-set approach, ICLR 2018 (greedy k-center).
    """
    cells = candidates(state, rng)
    features = state.features[cells]
    nearest = squared_distances(features, state.features[state.labelled]).min(axis=1, initial=np.inf)
    chosen: list[int] = []
    for _ in range(min(state.count, len(cells))):
        chosen.append(int(np.argmax(nearest)))
        distance = squared_distances(features, features[chosen[-1:]])[:, 0]
        nearest = np.minimum(nearest, distance)
        nearest[chosen] = -1.0  # zero would tie with a cell of the same features
    return cells[chosen]


def choose_typiclust(state: LoopState, rng: np.random.Generator) -> Ints:
    """Take the most typical cell of each cluster that has no labels yet, the largest cluster first.

    K-means makes as many clusters as there will be labels; where that is more than `MOST_CLUSTERS`, clusters with labels get
    their turn too, those with fewest first.

    Source: Hacohen, Dekel and Weinshall, Active learning on a budget, ICML 2022 (TP_C of K-means).
    """
    cells = candidates(state, rng)
    features = state.features[np.concatenate([state.labelled, cells])]
    num_labelled, count = len(state.labelled), min(state.count, len(cells))
    num_clusters = min(num_labelled + count, MOST_CLUSTERS, len(np.unique(features, axis=0)))
    seed = int(rng.integers(2**31))
    clusters = KMeans(num_clusters, n_init=1, random_state=seed).fit_predict(features)
    labels_in = np.bincount(clusters[:num_labelled], minlength=num_clusters)
    sizes = np.bincount(clusters, minlength=num_clusters)
    free = {int(c): _by_typicality(features, np.flatnonzero(clusters == c), num_labelled) for c in range(num_clusters)}
    chosen: list[int] = []
    for _ in range(count):
        open_clusters = [c for c, rows in free.items() if rows]
        cluster = min(open_clusters, key=lambda c: (labels_in[c], -sizes[c]))
        chosen.append(free[cluster].pop(0) - num_labelled)
        labels_in[cluster] += 1
    return cells[chosen]


def _by_typicality(features: Floats, members: Ints, num_labelled: int) -> list[int]:
    """Unlabelled rows among `members`, the most typical first: the smallest mean distance to neighbours in the cluster."""
    unlabelled = members[members >= num_labelled]
    if len(members) < 2 or len(unlabelled) == 0:
        return [int(row) for row in unlabelled]
    count = min(TYPICAL_NEIGHBOURS, len(members) - 1)
    distance, _ = NearestNeighbors(n_neighbors=count + 1).fit(features[members]).kneighbors(features[unlabelled])
    return [int(row) for row in unlabelled[np.argsort(distance.sum(axis=1), kind="stable")]]


def choose_probcover(state: LoopState, rng: np.random.Generator) -> Ints:
    """Take, one after another, the cell with most cells around it that no label is near to.

    "Near" is the largest radius at which 95 % of the cells have only cells of their own latent cluster around them. Once all is covered,
    the rest is drawn at random.

    Source: Yehuda et al., Active learning through a covering lens, NeurIPS 2022. Departure: the latent clusters of the map stand for its
    K-means clusters, of which a two-class problem would have two.
    """
    cells = candidates(state, rng)
    everything = np.concatenate([state.labelled, cells])
    squared = squared_distances(state.features[everything], state.features[everything])
    near = squared <= covering_radius(squared, state.clusters[everything]) ** 2
    num_labelled = len(state.labelled)
    open_cells = ~near[:num_labelled].any(axis=0)
    gains = near[num_labelled:][:, open_cells].sum(axis=1)
    chosen: list[int] = []
    for _ in range(min(state.count, len(cells))):
        gains[chosen] = -1
        best = int(np.argmax(gains))  # of cells that cover nothing more the first, which is a random one
        newly = near[num_labelled + best] & open_cells
        open_cells &= ~newly
        gains -= near[num_labelled:][:, newly].sum(axis=1)
        chosen.append(best)
    return cells[chosen]


def covering_radius(squared: Floats, clusters: Ints) -> float:
    """Largest of forty radii at which `PURITY` of the balls hold one cluster only; the smallest where none does.

    Args:
        squared: (N, N) squared distances.
        clusters: (N,) clusters.
    """
    other = clusters[:, None] != clusters[None, :]
    nearest_other = np.sqrt(np.where(other, squared, np.inf).min(axis=1))
    distances = np.sqrt(squared[np.triu_indices(len(squared), 1)])
    positive = distances[distances > 0]
    if len(positive) == 0:
        return 0.0
    radii = np.quantile(positive, np.linspace(0.0, 0.5, _RADII))
    pure = [float(radius) for radius in radii if np.mean(nearest_other > radius) >= PURITY]
    return max(pure, default=float(radii[0]))


def choose_maxherding(state: LoopState, rng: np.random.Generator) -> Ints:
    """Take, one after another, the cell that most raises the mean likeness of all cells to their nearest labelled one.

    Source: Bae, Noh and Sutherland, Generalized coverage for more robust low-budget active learning, ECCV 2024. Departure: the kernel
    is that of the classifier, on features as they are (the source scales them to unit length).
    """
    cells = candidates(state, rng)
    gamma = gamma_scale(state.features[np.concatenate([state.labelled, cells])])
    everything = np.concatenate([state.labelled, cells])
    return cells[herd(state, cells, gamma, np.ones(len(everything)), min(state.count, len(cells)))]


def herd(state: LoopState, cells: Ints, gamma: float, weights: Floats, count: int) -> npt.NDArray[np.int64]:
    """Rows of `cells` that greedily raise the weighted mean of every cell's kernel value to its nearest labelled or taken cell.

    Args:
        state: of the loop.
        cells: (P,) positions to choose from; they and the labelled cells are what should be covered.
        gamma: width of the Gaussian kernel.
        weights: (L + P,) of the labelled cells and of `cells`, not below zero.
        count: how many, at most P.

    Returns:
        (count,) rows, the first choice first; equal gains go to the lower row.

    A gain never grows as more is taken, so that only the most promising ones are worked out again (lazy greedy; Minoux 1978).
    """
    everything = state.features[np.concatenate([state.labelled, cells])]
    kernel = rbf_kernel(squared_distances(state.features[cells], everything), gamma)
    seen = rbf_kernel(squared_distances(everything, state.features[state.labelled]), gamma)
    covered = seen.max(axis=1, initial=0.0)
    gains = np.array([np.maximum(row - covered, 0.0) @ weights for row in kernel])
    queue = [(-float(gain), row) for row, gain in enumerate(gains)]
    heapq.heapify(queue)
    chosen: list[int] = []
    while len(chosen) < count:
        _, row = heapq.heappop(queue)
        gain = float(np.maximum(kernel[row] - covered, 0.0) @ weights)
        if queue and (-gain, row) > queue[0]:
            heapq.heappush(queue, (-gain, row))
            continue
        chosen.append(row)
        covered = np.maximum(covered, kernel[row])
    return np.array(chosen, dtype=np.int64)
