"""F1, recall and precision of a set and of its clusters, and their Monte-Carlo estimate from labelled cells alone."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ctc_ray.hil.pools import Floats, Ints, Labels
from ctc_ray.hil.svm import decide, fit, gamma_scale, pairwise_squared_distances, rbf_kernel

Convention = Literal["null", "paper"]
"""`null`: what has no value has none. `paper`: zero; the F1 alone is 1 for a cluster with non-CTC labels and predictions only."""


@dataclass(frozen=True)
class Score:
    """Binary scores with CTC as the positive class; None where undefined.

    Attributes:
        f1: 2 TP / (2 TP + FP + FN).
        recall: TP / (TP + FN).
        precision: TP / (TP + FP).
        num_cells: cells (or predictions, where each cell is predicted many times) behind the scores.
        error_rate: share of wrong predictions; 0 without cells.
        num_distinct: different cells behind the scores.
    """

    f1: float | None
    recall: float | None
    precision: float | None
    num_cells: int
    error_rate: float = 0.0
    num_distinct: int = 0


def score(
    labels: Labels, predictions: Labels, convention: Convention, *, is_cluster: bool, rows: Ints | None = None
) -> Score:
    """Score predictions.

    Args:
        labels: (N,) 0 or 1.
        predictions: (N,) 0 or 1.
        convention: what an undefined score is.
        is_cluster: whether the cells are one cluster; the paper's 1 for clear clusters holds for those alone.
        rows: (N,) which cell each prediction is of, where one can be predicted more than once; None: all are different.

    Source: reference implementation; departure under `null`: an F1 without true or predicted CTCs is no number.
    """
    true_positive = int(np.sum((labels == 1) & (predictions == 1)))
    positive, called, num = int(np.sum(labels == 1)), int(np.sum(predictions == 1)), len(labels)
    wrong = (positive + called - 2 * true_positive) / num if num else 0.0
    distinct = num if rows is None else len(np.unique(rows))
    if convention == "paper":
        if is_cluster and positive == 0 and called == 0:
            return Score(1.0, 0.0, 0.0, num, wrong, distinct)
        f1 = 2 * true_positive / (positive + called) if positive + called else 0.0
        recall = true_positive / positive if positive else 0.0
        return Score(f1, recall, true_positive / called if called else 0.0, num, wrong, distinct)
    return Score(
        2 * true_positive / (positive + called) if positive + called else None,
        true_positive / positive if positive else None,
        true_positive / called if called else None,
        num,
        wrong,
        distinct,
    )


def score_clusters(
    labels: Labels,
    predictions: Labels,
    clusters: Ints,
    convention: Convention,
    cluster_ids: Sequence[int] | None = None,
    rows: Ints | None = None,
) -> dict[int, Score]:
    """Score each cluster.

    Args:
        labels: (N,) 0 or 1.
        predictions: (N,) 0 or 1.
        clusters: (N,) cluster of each cell.
        convention: what an undefined score is.
        cluster_ids: clusters to score; None: those that occur, ascending.
        rows: as in `score`.
    """
    wanted = [int(c) for c in np.unique(clusters)] if cluster_ids is None else list(cluster_ids)
    found = {}
    for cluster in wanted:
        inside = clusters == cluster
        inside_rows = None if rows is None else rows[inside]
        found[cluster] = score(labels[inside], predictions[inside], convention, is_cluster=True, rows=inside_rows)
    return found


def monte_carlo_seeds(num_splits: int) -> list[int]:
    """Seeds of the Monte-Carlo splits, the same in every loop and run.

    Source: reference implementation: seed 42, `sample(range(1, 200), 100)`; the range grows where more splits are wanted.
    """
    return random.Random(42).sample(range(1, max(200, num_splits + 1)), num_splits)


@dataclass(frozen=True, eq=False)
class PooledPredictions:
    """Predictions of held-out rows, all splits one after another.

    Attributes:
        rows: (P,) int64 row of the labelled set that was predicted.
        predictions: (P,) int8.
    """

    rows: Ints
    predictions: Labels


def monte_carlo(features: Floats, labels: Labels, num_splits: int, test_fraction: float = 0.1) -> PooledPredictions:
    """Predict held-out tenths of the labelled cells with classifiers fitted on the rest.

    Args:
        features: (N, D) of the labelled cells, N at least 2.
        labels: (N,) as the labeller gave them.
        num_splits: number of unstratified random splits.
        test_fraction: share of held-out rows, rounded up.

    Returns:
        Pooled predictions. A split whose training part has one class predicts that class (the reference stops there).

    Source: paper, Methods (Monte-Carlo cross-validation); the splits are those of `train_test_split(arange(N),
    test_size=0.1, random_state=r)`.
    """
    num = len(labels)
    num_held_out = math.ceil(test_fraction * num)
    squared = pairwise_squared_distances(features)
    kernel = np.empty(
        (num - num_held_out, num)
    )  # rows: kept cells; one buffer, since fresh pages cost more than the numbers
    training = np.empty((num - num_held_out, num - num_held_out))
    rows, predictions = [], []
    for seed in monte_carlo_seeds(num_splits):
        order = np.random.RandomState(seed).permutation(num)  # the published splits come from this generator
        held_out, kept = order[:num_held_out], order[num_held_out:]
        gamma = gamma_scale(features[kept])
        np.take(squared, kept, axis=0, out=kernel, mode="clip")
        rbf_kernel(kernel, gamma, out=kernel)
        np.take(kernel, kept, axis=1, out=training, mode="clip")
        decision = fit(training, labels[kept], gamma)
        values = decide(kernel[np.ix_(decision.support, held_out)].T, decision)
        rows.append(held_out)
        predictions.append((values > 0).astype(np.int8))
    return PooledPredictions(np.concatenate(rows), np.concatenate(predictions))
