"""More like these: candidates among the unlabelled cells in one ranking, near the labelled CTCs and unlike each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import polars as pl

from ctc_ray.cohort import Cohort
from ctc_ray.config import RunConfig
from ctc_ray.errors import ConfigError, LabelError
from ctc_ray.index.search import NEIGHBOURS_SCHEMA, CellIndex, Mask, open_for_search
from ctc_ray.labels.consensus import CLASS_OF_LABEL, read_labels

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
_POOL = 4
"""Candidates looked at for each one wanted."""
_MIN_POOL = 200
_NEAREST_EXAMPLES = 3
_BLOCK = 4096


def similarities(left_AD: Float32, right_BD: Float32, metric: str) -> Float32:
    """Cosine of unit vectors, or negative Euclidean distance, (A, B)."""
    products = left_AD @ right_BD.T
    if metric == "cosine":
        return np.asarray(products, np.float32)
    squared = (left_AD**2).sum(1)[:, None] + (right_BD**2).sum(1)[None, :] - 2 * products
    return np.asarray(-np.sqrt(np.maximum(squared, 0)), np.float32)


def likeness(candidates_CD: Float32, examples_ED: Float32, metric: str) -> tuple[Float32, Int64]:
    """Likeness of candidates to a set of examples.

    Args:
        candidates_CD: vectors (C, D).
        examples_ED: vectors (E, D), at least one.
        metric: `cosine` or `l2`.

    Returns:
        Mean similarity (C,) to the three nearest examples (fewer where there are fewer), so that one odd example does not
        decide; and the nearest example (C,).
    """
    count = min(_NEAREST_EXAMPLES, len(examples_ED))
    means, nearest = [np.empty(0, np.float32)], [np.empty(0, np.int64)]
    for start in range(0, len(candidates_CD), _BLOCK):
        block = similarities(candidates_CD[start : start + _BLOCK], examples_ED, metric)
        means.append(np.partition(block, -count, axis=1)[:, -count:].mean(axis=1))
        nearest.append(block.argmax(axis=1).astype(np.int64))
    return np.concatenate(means), np.concatenate(nearest)


def diversify(vectors_CD: Float32, relevance_C: Float32, k: int, diversity: float, metric: str) -> Int64:
    """Choose candidates one after the other by maximal marginal relevance.

    Args:
        vectors_CD: candidates (C, D).
        relevance_C: what makes a candidate good, on the scale of the similarity.
        k: how many.
        diversity: 0: the most relevant; 1: the most relevant, then always the one farthest from those chosen; between: the
            next is the largest (1 - diversity) * relevance - diversity * similarity to the nearest chosen one.
        metric: `cosine` or `l2`.

    Returns:
        Indices (min(k, C),) in the order of choice; equal values by index.

    Source: Carbonell and Goldstein, "The use of MMR, diversity-based reranking" (1998), equation 1.
    """
    if not len(vectors_CD):
        return np.empty(0, np.int64)
    chosen = [int(relevance_C.argmax())]
    nearest = similarities(vectors_CD, vectors_CD[chosen], metric)[:, 0]
    free = np.ones(len(vectors_CD), bool)
    free[chosen] = False
    while len(chosen) < min(k, len(vectors_CD)):
        value = np.where(free, (1 - diversity) * relevance_C - diversity * nearest, -np.inf)
        best = int(value.argmax())
        chosen.append(best)
        free[best] = False
        nearest = np.maximum(nearest, similarities(vectors_CD, vectors_CD[[best]], metric)[:, 0])
    return np.array(chosen, np.int64)


def rank_candidates(
    index: CellIndex,
    positives: Int64,
    negatives: Int64,
    *,
    k: int,
    excluded: Mask,
    allowed: Mask | None = None,
    contrast: float = 0.0,
    diversity: float = 0.0,
) -> pl.DataFrame:
    """Rank cells of an index by their likeness to some and unlikeness to others; see `more_like`.

    Args:
        index: open.
        positives: positions to be like, at least one.
        negatives: positions to be unlike.
        k: how many.
        excluded: positions (N,) that do not count as candidates; whole physical cells are left out.
        allowed: positions (N,) to choose from; None: all.
        contrast: weight of the likeness to the negatives.
        diversity: see `diversify`.
    """
    physical = index.cells.physical
    candidates = ~np.isin(physical, np.unique(physical[excluded]))
    candidates = candidates if allowed is None else candidates & allowed
    pool_size = max(_POOL * k, _MIN_POOL)
    found, _ = index.nearest(index.vectors(positives), pool_size, allowed=candidates)
    pool = np.unique(found[found >= 0])
    vectors, examples = index.vectors(pool), index.vectors(positives)
    relevance, nearest = likeness(vectors, examples, index.metric)
    if contrast and len(negatives):
        relevance = relevance - contrast * likeness(vectors, index.vectors(negatives), index.metric)[0]
    best = np.argsort(-relevance, kind="stable")
    _, first = np.unique(physical[pool[best]], return_index=True)
    best = best[np.sort(first)][:pool_size]  # one detection of a physical cell, the most relevant
    order = best[diversify(vectors[best], relevance[best].astype(np.float32), k, diversity, index.metric)]
    queries = index.cells.at(positives[nearest[order]])["cell_id"]
    return (
        index.cells.at(pool[order])
        .with_columns(
            query=queries,
            rank=pl.Series(np.arange(1, len(order) + 1), dtype=pl.Int32),
            similarity=pl.Series(relevance[order], dtype=pl.Float32),
        )
        .select(list(NEIGHBOURS_SCHEMA))
    )


def more_like(
    config: RunConfig,
    cohort: Cohort,
    cell_ids: Sequence[str] | None = None,
    *,
    k: int = 50,
    patients: Sequence[str] | None = None,
    clusters: Sequence[int] | None = None,
    contrast: float = 0.0,
    diversity: float = 0.0,
) -> pl.DataFrame:
    """Rank the unlabelled cells by their likeness to labelled CTCs, in one list.

    Candidates are the nearest unlabelled cells of every example; their order is the mean cosine to the three nearest
    examples. No cell that has a label of any kind is a candidate, nor another detection of it, and of one physical cell only
    one detection is.

    Args:
        config: section `index`; `map.name` where clusters are given.
        cohort: indexed; labelled.
        cell_ids: examples; None: all cells that the labels call CTC.
        k: how many candidates.
        patients: search among the cells of these alone; None: all.
        clusters: search among the cells of these clusters of the latent map alone; None: all.
        contrast: weight from 0 with which the likeness to the nearest labelled cells that are no CTCs is subtracted.
        diversity: from 0 (the most alike) to 1 (the farthest from each other among the most alike); see `diversify`.

    Returns:
        Columns as of `similar`: query is the example nearest to the candidate, similarity what it is ranked by.

    Raises:
        LabelError: no indexed cell is labelled CTC, and no examples are given.
        MissingInputError: there is no index, or an example is not in it.
        ConfigError: k is below 1, or contrast or diversity is out of range.
    """
    if k < 1 or contrast < 0 or not 0 <= diversity <= 1:
        raise ConfigError(
            f"k = {k}, contrast = {contrast}, diversity = {diversity}: k is at least 1, contrast at least 0, diversity 0 to 1"
        )
    index, allowed = open_for_search(config, cohort, patients=patients, clusters=clusters)
    labels = read_labels(cohort)
    labelled = index.cells.positions_of(labels["cell_id"].to_list())
    classes = np.array([CLASS_OF_LABEL.get(label, -1) for label in labels["label"]], np.int64)
    if cell_ids:
        positives = index.positions_of(list(cell_ids))
    else:
        positives = labelled[(classes == 1) & (labelled >= 0)]
        if not len(positives):
            raise LabelError(
                f"{cohort.store.uri}: no indexed cell is labelled ctc: label some with `ctc-ray label`, or name cells to start from"
            )
    excluded = np.zeros(len(index), bool)
    excluded[labelled[labelled >= 0]] = True
    excluded[positives] = True
    negatives = labelled[(classes == 0) & (labelled >= 0)]
    return rank_candidates(
        index,
        positives,
        negatives,
        k=k,
        excluded=excluded,
        allowed=allowed,
        contrast=contrast,
        diversity=diversity,
    )
