"""What is known of a classifier without looking at the test set: its predictions of labelled cells that it was not fitted to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ctc_ray.hil.pools import CellSet, Floats, Ints, Labels, Problem
from ctc_ray.hil.scores import monte_carlo
from ctc_ray.hil.settings import LoopSettings
from ctc_ray.hil.svm import Classifier


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Predictions of held-out cells.

    Attributes:
        truth: (P,) 0 or 1, as labelled.
        predictions: (P,) 0 or 1.
        clusters: (P,) cluster of the cell.
        rows: (P,) which cell it is; Monte-Carlo splits predict one many times.
        is_monte_carlo: whether they come from splits of the labelled cells.
    """

    truth: Labels
    predictions: Labels
    clusters: Ints
    rows: Ints
    is_monte_carlo: bool


def held_out_predictions(
    problem: Problem,
    classifier: Classifier,
    features_LD: Floats,
    answers: Labels,
    clusters: Ints,
    settings: LoopSettings,
) -> HeldOut:
    """Predictions of the validation cells where there are any, else (or with the fault `monte-carlo`) by Monte-Carlo splits.

    Args:
        problem: with or without validation cells.
        classifier: fitted to all labelled cells.
        features_LD: (L, D) of the labelled cells.
        answers: (L,) their labels.
        clusters: (L,) their clusters.
        settings: faults and number of splits.
    """
    validation = problem.validation
    if validation is not None and not settings.keeps("monte-carlo"):
        return _predicted(validation, classifier)
    pooled = monte_carlo(features_LD, answers, settings.mc_splits)
    return HeldOut(answers[pooled.rows], pooled.predictions, clusters[pooled.rows], pooled.rows, is_monte_carlo=True)


def predictions_of_test(problem: Problem, classifier: Classifier) -> HeldOut:
    """Predictions of the test cells, for the fault `test-target` alone."""
    return _predicted(problem.test, classifier)


def _predicted(cells: CellSet, classifier: Classifier) -> HeldOut:
    rows = np.arange(len(cells), dtype=np.int64)
    return HeldOut(cells.labels, classifier.predict(cells.features), cells.clusters, rows, is_monte_carlo=False)
