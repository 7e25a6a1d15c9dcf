"""Choose how much of an index a search reads, by the recall measured on its own vectors."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ctc_ray.index.build import load_faiss, vectors_at

Float32 = npt.NDArray[np.float32]
NUM_QUERIES = 256
NEAREST = 10
LENGTHS = (NEAREST, 50, 200)
"""Answers for which the depth is measured: longer ones come from more lists."""
_DEEPEST_GRAPH = 1024
_PATIENTS = 16
"""Patients that are left out in turn."""
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


@dataclass(frozen=True)
class Questions:
    """Cells of an index that are asked for their neighbours, as if the index did not hold them, or their patient."""

    vectors: Float32
    """(Q, D)."""
    own: npt.NDArray[np.int64]
    """Position (Q,) that is left out of the answer; -1: none."""
    spans: tuple[tuple[slice, tuple[int, int] | None], ...]
    """Questions (a slice), and positions first <= position < stop that none of them may find."""


def own_questions(index: Any, num: int, rng: np.random.Generator) -> Questions:
    """Some cells, each left out of its own answer."""
    positions = np.sort(rng.choice(index.ntotal, min(num, index.ntotal), replace=False)).astype(np.int64)
    return Questions(vectors_at(index, positions), positions, ((slice(0, len(positions)), None),))


def foreign_questions(
    index: Any, num: int, spans: Sequence[tuple[int, int]], rng: np.random.Generator
) -> Questions | None:
    """Cells of some patients, asked among the cells of all others: what a new patient's cells meet.

    Args:
        index: FAISS index.
        num: questions in all, at most.
        spans: positions first <= position < stop of each patient.
        rng: which patients and cells.

    Returns:
        None where no patient leaves enough others.
    """
    fit = [span for span in spans if index.ntotal - (span[1] - span[0]) >= LENGTHS[-1]]
    if not fit:
        return None
    chosen = [fit[i] for i in np.sort(rng.permutation(len(fit))[:_PATIENTS])]
    each, asked, slices, first = max(1, num // len(chosen)), [], [], 0
    for start, stop in chosen:
        drawn = np.sort(rng.choice(stop - start, min(each, stop - start), replace=False)).astype(np.int64) + start
        asked.append(drawn)
        slices.append((slice(first, first + len(drawn)), (start, stop)))
        first += len(drawn)
    positions = np.concatenate(asked)
    return Questions(vectors_at(index, positions), np.full(len(positions), -1, np.int64), tuple(slices))


def tune(
    index: Any,
    target: float,
    *,
    spans: Sequence[tuple[int, int]] = (),
    num_queries: int = NUM_QUERIES,
    seed: int = _SEED,
) -> dict[str, Any]:
    """Smallest number of lists (IVF) or depth (HNSW) that reaches a recall, for answers of each of `LENGTHS` cells.

    Args:
        index: FAISS IndexIVFFlat, whose own answer from all lists is the truth, or IndexHNSWFlat.
        target: recall that the mean less two standard errors has to reach, for cells of the index and for cells of patients
            that are left out.
        spans: positions first <= position < stop of each patient; without them only the former are asked.
        num_queries: cells of each kind.
        seed: which cells.

    Returns:
        Of the nearest ten: `depth` (lists read, or efSearch), `recall_at_10` of cells of the index, `recall_of_new_patients`
        (None where none could be left out), `lower_bound` of the lower one, `compared` (vectors that a query is compared with,
        centres of lists among them). `queries`; `depths`: length of the answer (text) to depth; `trials`: length, depth,
        recalls and milliseconds a query of everything tried.
    """
    rng = np.random.default_rng(seed)
    own, foreign = own_questions(index, num_queries, rng), foreign_questions(index, num_queries, spans, rng)
    asked = {"recall": own} if foreign is None else {"recall": own, "recall_of_new_patients": foreign}
    lengths = sorted({min(length, index.ntotal - 1) for length in LENGTHS})
    exact = {name: _exact(index, questions, lengths[-1]) for name, questions in asked.items()}
    depth = 1 if hasattr(index, "nlist") else 16
    trials: list[dict[str, float]] = []
    depths, first, bound = {}, 0, 0.0
    for length in lengths:
        wanted = {name: scores[:, :length] for name, scores in exact.items()}
        depth, lower, tried = _tune_one(index, target, asked, wanted, depth)
        depths[str(length)] = depth
        trials += tried
        if length == lengths[0]:
            first, bound = len(trials) - 1, lower
    return {
        "depth": depths[str(lengths[0])],
        "depths": depths,
        "recall_at_10": trials[first]["recall"],
        "recall_of_new_patients": trials[first].get("recall_of_new_patients"),
        "lower_bound": round(bound, 5),
        "compared": round(_compared(index, own.vectors, depths[str(lengths[0])]), 1),
        "queries": sum(len(questions.vectors) for questions in asked.values()),
        "trials": trials,
    }


def _tune_one(
    index: Any, target: float, asked: dict[str, Questions], exact: dict[str, Float32], depth: int
) -> tuple[int, float, list[dict[str, float]]]:
    """Depth from `depth` on that finds `exact` (Q, nearest) of all questions; the lower bound; what was tried."""
    nearest = exact["recall"].shape[1]
    least, limit = (1, index.nlist) if hasattr(index, "nlist") else (nearest + 1, max(_DEEPEST_GRAPH, nearest + 1))
    trials: list[dict[str, float]] = []
    while True:
        depth = min(max(depth, least), limit)
        trial: dict[str, float] = {"nearest": nearest, "depth": depth}
        bounds, started = [], time.perf_counter()
        for name, questions in asked.items():
            found = _search(index, questions, nearest, depth)
            recalls = recall_of(found, exact[name]) if nearest else np.ones(1)
            trial[name] = round(float(recalls.mean()), 5)
            bounds.append(float(recalls.mean() - 2 * recalls.std() / max(len(recalls), 1) ** 0.5))
        num = sum(len(questions.vectors) for questions in asked.values())
        trials.append({**trial, "ms_a_query": round(1e3 * (time.perf_counter() - started) / num, 4)})
        if min(bounds) >= target or depth >= limit:
            return depth, min(bounds), trials
        depth = max(depth + 1, int(depth * 1.5))


def search_parameters(index: Any, depth: int, selector: Any = None) -> Any:
    """FAISS parameters of a search that reads `depth` lists, or keeps `depth` candidates in the graph."""
    faiss = load_faiss()
    if hasattr(index, "nlist"):
        return faiss.SearchParametersIVF(sel=selector, nprobe=min(depth, index.nlist))
    if hasattr(index, "hnsw"):
        return faiss.SearchParametersHNSW(sel=selector, efSearch=depth)
    return faiss.SearchParameters(sel=selector)


def _exact(index: Any, questions: Questions, nearest: int) -> Float32:
    if hasattr(index, "nlist"):
        return _search(index, questions, nearest, index.nlist)
    return _search(load_faiss().downcast_index(index.storage), questions, nearest, 0)


def _search(index: Any, questions: Questions, nearest: int, depth: int) -> Float32:
    """Similarities (Q, nearest) of what is found, larger is nearer."""
    faiss, found = load_faiss(), []
    for rows, span in questions.spans:
        hidden = faiss.IDSelectorRange(*span) if span else None
        selector = faiss.IDSelectorNot(hidden) if hidden is not None else None
        parameters = search_parameters(index, depth, selector)
        scores, positions = index.search(questions.vectors[rows], nearest + 1, params=parameters)
        found.append(_similarities(index, scores, positions, questions.own[rows], nearest))
    return np.concatenate(found)


def _similarities(
    index: Any, scores: Float32, found: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], nearest: int
) -> Float32:
    """Similarities (Q, nearest), larger is nearer, without the query itself."""
    larger = scores if index.metric_type == 0 else -scores
    larger = np.where((found < 0) | (found == positions[:, None]), -np.inf, larger)
    return -np.sort(-larger, axis=1)[:, :nearest].astype(np.float32)


def _compared(index: Any, queries: Float32, depth: int) -> float:
    """Mean number of vectors that a query is compared with."""
    if hasattr(index, "nlist"):
        _, lists = index.quantizer.search(queries, min(depth, index.nlist))
        sizes = np.array([index.invlists.list_size(number) for number in range(index.nlist)])
        return float(index.nlist + sizes[lists].sum(axis=1).mean())
    statistics = load_faiss().cvar.hnsw_stats
    statistics.reset()
    index.search(queries, NEAREST, params=search_parameters(index, depth))
    return float(statistics.ndis / len(queries))
