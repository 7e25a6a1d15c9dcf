"""Exact nearest neighbours in a few dozen dimensions, in bounded memory."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_CHUNK_VALUES = 8_000_000
"""Distances held at a time: 32 MB of float32."""


def nearest(
    queries_ND: npt.NDArray[np.floating], points_MD: npt.NDArray[np.floating], k: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Find the k nearest points of each query by Euclidean distance.

    Args:
        queries_ND: (N, D) finite.
        points_MD: (M, D) finite, M >= k.
        k: neighbours, at least 1.

    Returns:
        Indices (N, k) and distances (N, k), nearest first; equal distances by smaller index. Candidates come from a float32
        matrix product, their distances are then computed in float64 from differences, so that they do not depend on
        how many queries are asked at once.
    """
    points = np.ascontiguousarray(points_MD, np.float32)
    queries = np.ascontiguousarray(queries_ND, np.float32)
    squares = np.einsum("md,md->m", points, points)
    indices = np.empty((len(queries), k), np.int32)
    distances = np.empty((len(queries), k), np.float32)
    step = max(1, _CHUNK_VALUES // max(1, len(points)))
    for start in range(0, len(queries), step):
        block = queries[start : start + step]
        scores = squares[None, :] - 2.0 * (block @ points.T)
        near = np.argpartition(scores, k - 1, axis=1)[:, :k] if k < len(points) else _all_columns(scores)
        near.sort(axis=1)
        exact = points[near].astype(np.float64) - block[:, None, :]
        length = np.sqrt(np.einsum("nkd,nkd->nk", exact, exact))
        order = np.argsort(length, axis=1, kind="stable")
        indices[start : start + step] = np.take_along_axis(near, order, axis=1)
        distances[start : start + step] = np.take_along_axis(length, order, axis=1)
    return indices, distances


def _all_columns(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.intp]:
    return np.tile(np.arange(scores.shape[1], dtype=np.intp), (len(scores), 1))
