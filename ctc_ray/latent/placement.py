"""Place new cells on a fitted UMAP plane, each on its own.

umap-learn's `transform` works on a batch: it scales the weights by the batch's largest and picks the number of epochs by the
batch's size, so that a cell's place depends on its company; and its fitted object can only be pickled. Here the same steps
(neighbours, fuzzy weights, weighted mean, stochastic gradient descent against the fixed fitted points) run for each cell
alone, from arrays. A cell gets the same place in any batch, on any worker, after any reload.

Source: umap-learn 0.5.12, `UMAP.transform`, `smooth_knn_dist` with local connectivity 0, `init_graph_transform` and
`optimize_layout_euclidean`. Departures: a cell's weights are scaled by its own largest, the number of epochs does not depend on
the batch, one random stream for every cell.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

NUM_EPOCHS = 100
"""umap-learn's number for batches of up to 10,000 cells; for larger ones it takes 30."""
_TOLERANCE = 1e-5
_MIN_SCALE = 1e-3


def neighbour_weights(distances_NK: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Fuzzy membership of each neighbour.

    Args:
        distances_NK: (N, K) distances to the K nearest fitted cells, nearest first.

    Returns:
        (N, K) weights in (0, 1]: exp(-d / s) with s such that the weights of all but the nearest sum to log2(K).
    """
    distances = distances_NK.astype(np.float64)
    target = np.log2(max(2, distances.shape[1]))
    low = np.zeros(len(distances))
    high = np.full(len(distances), np.inf)
    scale = np.ones(len(distances))
    rest = distances[:, 1:]
    for _ in range(64):
        total = np.exp(-rest / scale[:, None]).sum(axis=1)
        settled = np.abs(total - target) < _TOLERANCE
        too_wide = total > target
        high = np.where(too_wide, scale, high)
        low = np.where(too_wide, low, scale)
        with np.errstate(invalid="ignore"):
            following = np.where(np.isinf(high), scale * 2.0, (low + high) / 2.0)
        scale = np.where(settled, scale, following)
        if settled.all():
            break
    scale = np.maximum(scale, np.maximum(_MIN_SCALE * distances.mean(axis=1), np.finfo(np.float32).tiny))
    weights: npt.NDArray[np.float32] = np.exp(-distances / scale[:, None]).astype(np.float32)
    return weights


def settle(
    indices_NK: npt.NDArray[np.int32],
    weights_NK: npt.NDArray[np.float32],
    fitted_M2: npt.NDArray[np.float32],
    a: float,
    b: float,
    *,
    seed: int = 42,
    num_epochs: int = NUM_EPOCHS,
) -> npt.NDArray[np.float32]:
    """Move each cell from the weighted mean of its neighbours to where attraction and repulsion balance.

    Args:
        indices_NK: (N, K) neighbours, as indices into `fitted_M2`.
        weights_NK: (N, K) their weights.
        fitted_M2: (M, 2) places of the fitted cells; they do not move.
        a: kernel parameter.
        b: kernel parameter.
        seed: of the repulsion samples.
        num_epochs: steps of gradient descent.

    Returns:
        (N, 2) float32.
    """
    if not len(indices_NK):
        return np.empty((0, 2), np.float32)
    share = weights_NK / weights_NK.sum(axis=1, keepdims=True)
    places: npt.NDArray[np.float32] = np.einsum("nk,nkd->nd", share, fitted_M2[indices_NK]).astype(np.float32)
    same = weights_NK[:, 0] >= 1.0
    places[same] = fitted_M2[indices_NK[same, 0]]
    state = np.uint32((seed * 2654435761 + 1) % (2**32 - 1) + 1)
    _descent()(places, indices_NK, weights_NK, np.ascontiguousarray(fitted_M2), a, b, state, num_epochs)
    return places


@cache
def _descent() -> Any:
    """Compile the descent on first use: importing numba takes half a second, which light commands should not pay."""
    import numba

    return numba.njit(_descend)


def _descend(
    places: Any, indices: Any, weights: Any, fitted: Any, a: float, b: float, first_state: Any, num_epochs: int
) -> None:
    """umap-learn's `_optimize_layout_euclidean_single_epoch`, cell by cell, in place."""
    num_fitted = fitted.shape[0]
    num_neighbors = indices.shape[1]
    period = np.empty(num_neighbors, np.float64)
    due = np.empty(num_neighbors, np.float64)
    negative_due = np.empty(num_neighbors, np.float64)
    for cell in range(places.shape[0]):
        y, x = float(places[cell, 0]), float(places[cell, 1])
        largest = weights[cell].max()
        for edge in range(num_neighbors):
            weight = weights[cell, edge]
            period[edge] = largest / weight if weight * num_epochs >= largest else np.inf
            due[edge] = period[edge]
            negative_due[edge] = period[edge] / 5.0
        state = first_state
        step = 0.25
        for epoch in range(num_epochs):
            for edge in range(num_neighbors):
                if due[edge] > epoch:
                    continue
                other = indices[cell, edge]
                dy, dx = y - fitted[other, 0], x - fitted[other, 1]
                square = dy * dy + dx * dx
                pull = 0.0
                if square > 0.0:
                    pull = -2.0 * a * b * square ** (b - 1.0) / (a * square**b + 1.0)
                y += min(4.0, max(-4.0, pull * dy)) * step
                x += min(4.0, max(-4.0, pull * dx)) * step
                due[edge] += period[edge]
                negatives = int((epoch - negative_due[edge]) / (period[edge] / 5.0))
                for _ in range(negatives):
                    state ^= (state << np.uint32(13)) & np.uint32(0xFFFFFFFF)
                    state ^= state >> np.uint32(17)
                    state ^= (state << np.uint32(5)) & np.uint32(0xFFFFFFFF)
                    other = state % num_fitted
                    dy, dx = y - fitted[other, 0], x - fitted[other, 1]
                    square = dy * dy + dx * dx
                    if square > 0.0:
                        push = 2.0 * b / ((0.001 + square) * (a * square**b + 1.0))
                        y += min(4.0, max(-4.0, push * dy)) * step
                        x += min(4.0, max(-4.0, push * dx)) * step
                negative_due[edge] += negatives * (period[edge] / 5.0)
            step = 0.25 * (1.0 - epoch / num_epochs)
        places[cell, 0], places[cell, 1] = y, x
