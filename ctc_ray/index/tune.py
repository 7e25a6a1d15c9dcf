"""Choose how much of an index a search reads, by the recall measured on its own vectors."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt

from ctc_ray.index.build import load_faiss, vectors_at

NUM_QUERIES = 256
NEAREST = 10
LENGTHS = (NEAREST, 50, 200)
"""Answers for which the depth is measured: longer ones come from more lists."""
_DEEPEST_GRAPH = 1024
_SEED = 0
_TIE = 1e-6
"""Scores closer than this are one score: copies of a cell are as good as each other."""


def recall_of(found_QK: npt.NDArray[np.float32], exact_QK: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Share of the exact nearest that each query (Q,) found, by score.

    Args:
        found_QK: similarities (larger is nearer), any order; -inf where fewer were found.
        exact_QK: similarities of the true K nearest.
    """
    last = exact_QK.min(axis=1, keepdims=True)
    hits = (found_QK >= last - _TIE).sum(axis=1)
    share: npt.NDArray[np.float64] = np.minimum(hits / exact_QK.shape[1], 1.0)
    return share


def tune(index: Any, target: float, *, num_queries: int = NUM_QUERIES, seed: int = _SEED) -> dict[str, Any]:
    """Smallest number of lists (IVF) or depth (HNSW) that reaches a recall, for answers of each of `LENGTHS` cells.

    Args:
        index: FAISS IndexIVFFlat, whose own answer from all lists is the truth, or IndexHNSWFlat.
        target: recall that the mean less two standard errors has to reach.
        num_queries: cells drawn from the index; each is left out of its own answer.
        seed: which cells.

    Returns:
        Of the nearest ten: `depth` (lists read, or efSearch), `recall_at_10`, `lower_bound`, `compared` (vectors that a query is
        compared with, centres of lists among them). `queries`; `depths`: length of the answer (text) to depth; `trials`:
        length, depth, recall and milliseconds a query of everything tried.
    """
    rng = np.random.default_rng(seed)
    positions = np.sort(rng.choice(index.ntotal, min(num_queries, index.ntotal), replace=False)).astype(np.int64)
    queries = vectors_at(index, positions)
    lengths = sorted({min(length, index.ntotal - 1) for length in LENGTHS})
    exact = _exact(index, queries, positions, lengths[-1])
    depth = 1 if hasattr(index, "nlist") else 16
    trials: list[dict[str, float]] = []
    depths, recalls = {}, {}
    for length in lengths:
        depth, recalls[length], tried = _tune_one(index, target, queries, positions, exact[:, :length], depth)
        depths[str(length)] = depth
        trials += tried
    shortest = lengths[0]
    mean, bound = recalls[shortest]
    return {
        "depth": depths[str(shortest)],
        "depths": depths,
        "recall_at_10": round(mean, 5),
        "lower_bound": round(bound, 5),
        "compared": round(_compared(index, queries, depths[str(shortest)]), 1),
        "queries": len(queries),
        "trials": trials,
    }


def _tune_one(
    index: Any,
    target: float,
    queries: npt.NDArray[np.float32],
    positions: npt.NDArray[np.int64],
    exact: npt.NDArray[np.float32],
    depth: int,
) -> tuple[int, tuple[float, float], list[dict[str, float]]]:
    """Depth from `depth` on that finds `exact` (Q, nearest); mean recall and its lower bound; what was tried."""
    nearest = exact.shape[1]
    limit = index.nlist if hasattr(index, "nlist") else max(_DEEPEST_GRAPH, nearest + 1)
    trials = []
    while True:
        depth = min(max(depth, 1 if hasattr(index, "nlist") else nearest + 1), limit)
        started = time.perf_counter()
        found = _search(index, queries, positions, nearest, depth)
        milliseconds = 1e3 * (time.perf_counter() - started) / len(queries)
        recalls = recall_of(found, exact) if nearest else np.ones(1)
        mean, error = float(recalls.mean()), float(recalls.std() / max(len(recalls), 1) ** 0.5)
        trial = {"nearest": nearest, "depth": depth, "recall": round(mean, 5), "ms_a_query": round(milliseconds, 4)}
        trials.append(trial)
        if mean - 2 * error >= target or depth >= limit:
            return depth, (mean, mean - 2 * error), trials
        depth = max(depth + 1, int(depth * 1.5))


def search_parameters(index: Any, depth: int, selector: Any = None) -> Any:
    """FAISS parameters of a search that reads `depth` lists, or keeps `depth` candidates in the graph."""
    faiss = load_faiss()
    if hasattr(index, "nlist"):
        return faiss.SearchParametersIVF(sel=selector, nprobe=min(depth, index.nlist))
    if hasattr(index, "hnsw"):
        return faiss.SearchParametersHNSW(sel=selector, efSearch=depth)
    return faiss.SearchParameters(sel=selector)


def _exact(
    index: Any, queries: npt.NDArray[np.float32], positions: npt.NDArray[np.int64], nearest: int
) -> npt.NDArray[np.float32]:
    if hasattr(index, "nlist"):
        return _search(index, queries, positions, nearest, index.nlist)
    flat = load_faiss().downcast_index(index.storage)
    scores, found = flat.search(queries, nearest + 1)
    return _similarities(flat, scores, found, positions, nearest)


def _search(
    index: Any,
    queries: npt.NDArray[np.float32],
    positions: npt.NDArray[np.int64],
    nearest: int,
    depth: int,
) -> npt.NDArray[np.float32]:
    scores, found = index.search(queries, nearest + 1, params=search_parameters(index, depth))
    return _similarities(index, scores, found, positions, nearest)


def _similarities(
    index: Any,
    scores: npt.NDArray[np.float32],
    found: npt.NDArray[np.int64],
    positions: npt.NDArray[np.int64],
    nearest: int,
) -> npt.NDArray[np.float32]:
    """Similarities (Q, nearest), larger is nearer, without the query itself."""
    larger = scores if index.metric_type == 0 else -scores
    larger = np.where((found < 0) | (found == positions[:, None]), -np.inf, larger)
    return -np.sort(-larger, axis=1)[:, :nearest].astype(np.float32)


def _compared(index: Any, queries: npt.NDArray[np.float32], depth: int) -> float:
    """Mean number of vectors that a query is compared with."""
    if hasattr(index, "nlist"):
        _, lists = index.quantizer.search(queries, min(depth, index.nlist))
        sizes = np.array([index.invlists.list_size(number) for number in range(index.nlist)])
        return float(index.nlist + sizes[lists].sum(axis=1).mean())
    statistics = load_faiss().cvar.hnsw_stats
    statistics.reset()
    index.search(queries, NEAREST, params=search_parameters(index, depth))
    return float(statistics.ndis / len(queries))
