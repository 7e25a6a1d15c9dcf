"""Exact nearest neighbours in a few dozen dimensions, in bounded memory."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_CHUNK_VALUES = 4_000_000
"""Differences held at a time while distances are worked out: 32 MB of float64."""
_SPARE = 8
"""Candidates beyond k: among distances that are equal in float32 the float64 ones decide."""


def nearest(
    queries_ND: npt.NDArray[np.floating], points_MD: npt.NDArray[np.floating], k: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Find the k nearest points of each query by Euclidean distance.

    Args:
        queries_ND: (N, D) finite.
        points_MD: (M, D) finite, M >= k.
        k: neighbours, at least 1.

    Returns:
        Indices (N, k) and distances (N, k), nearest first; equal distances by smaller index. Candidates come from FAISS, which
        compares with every point in float32; their distances are then computed in float64 from differences, so that
        they do not depend on how many queries are asked at once.
    """
    import faiss

    points = np.ascontiguousarray(points_MD, np.float32)
    queries = np.ascontiguousarray(queries_ND, np.float32)
    index = faiss.IndexFlatL2(points.shape[1])
    index.add(points)
    candidates = min(k + _SPARE, len(points))
    indices = np.empty((len(queries), k), np.int32)
    distances = np.empty((len(queries), k), np.float32)
    step = max(1, _CHUNK_VALUES // (candidates * points.shape[1]))
    for start in range(0, len(queries), step):
        block = queries[start : start + step]
        _, near = index.search(block, candidates)
        near.sort(axis=1)
        exact = points[near].astype(np.float64) - block[:, None, :]
        length = np.sqrt(np.einsum("nkd,nkd->nk", exact, exact))
        order = np.argsort(length, axis=1, kind="stable")[:, :k]
        indices[start : start + step] = np.take_along_axis(near, order, axis=1)
        distances[start : start + step] = np.take_along_axis(length, order, axis=1)
    return indices, distances
