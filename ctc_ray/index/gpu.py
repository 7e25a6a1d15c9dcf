"""Exact search on a GPU, where FAISS sees one: 1.3 million vectors of width 128 take 0.7 GB there."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ctc_ray.index.build import Metric, load_faiss

_BLOCK = 65_536


def num_gpus() -> int:
    """GPUs that FAISS can use; 0 with a build for processors alone."""
    faiss = load_faiss()
    return int(faiss.get_num_gpus()) if hasattr(faiss, "StandardGpuResources") else 0


class GpuFlat:
    """All vectors of an index on the first GPU, compared exactly.

    Args:
        index: FAISS index on the processor, of any kind; read in blocks.
        metric: `cosine` or `l2`.
    """

    def __init__(self, index: Any, metric: Metric) -> None:
        faiss = load_faiss()
        self._resources = faiss.StandardGpuResources()
        kind = faiss.GpuIndexFlatIP if metric == "cosine" else faiss.GpuIndexFlatL2
        self._index = kind(self._resources, index.d)
        for first in range(0, index.ntotal, _BLOCK):
            self._index.add(index.reconstruct_n(first, min(_BLOCK, index.ntotal - first)))

    def search(
        self, vectors_ND: npt.NDArray[np.float32], k: int
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Scores and positions (N, k) as FAISS gives them."""
        scores, positions = self._index.search(np.ascontiguousarray(vectors_ND, np.float32), k)
        return scores, positions
