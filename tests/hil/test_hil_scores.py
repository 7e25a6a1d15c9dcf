"""F1 per cluster under both conventions, and the Monte-Carlo estimate against a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, precision_score, recall_score
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

from ctc_ray.hil.pools import Problem
from ctc_ray.hil.scores import monte_carlo, monte_carlo_seeds, score, score_clusters

_binary = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(_binary)
def test_score_any_predictions_equals_sklearn(pairs: list[tuple[int, int]]) -> None:
    labels, predictions = np.array(pairs, dtype=np.int8).T
    found = score(labels, predictions, "paper", is_cluster=False)
    assert found.f1 == pytest.approx(f1_score(labels, predictions, zero_division=0))
    assert found.recall == pytest.approx(recall_score(labels, predictions, zero_division=0))
    assert found.precision == pytest.approx(precision_score(labels, predictions, zero_division=0))


def test_score_without_ctcs_is_null_or_one_by_convention() -> None:
    nothing = np.zeros(5, np.int8)
    assert score(nothing, nothing, "null", is_cluster=True).f1 is None
    assert score(nothing, nothing, "paper", is_cluster=True).f1 == 1.0
    assert score(nothing, nothing, "paper", is_cluster=False).f1 == 0.0


def test_score_missed_ctcs_is_zero_with_undefined_precision() -> None:
    found = score(np.ones(3, np.int8), np.zeros(3, np.int8), "null", is_cluster=True)
    assert (found.f1, found.recall, found.precision) == (0.0, 0.0, None)


def test_score_clusters_takes_each_cluster_alone_with_background_first() -> None:
    labels = np.array([1, 0, 1, 1], np.int8)
    predictions = np.array([1, 0, 0, 1], np.int8)
    found = score_clusters(labels, predictions, np.array([2, -1, 2, 0]), "null")
    assert list(found) == [-1, 0, 2]
    assert found[2].f1 == pytest.approx(2 / 3)
    assert found[0].f1 == 1.0
    assert found[-1].f1 is None


def test_monte_carlo_seeds_start_as_the_papers() -> None:
    assert monte_carlo_seeds(100)[:5] == [164, 29, 7, 190, 71]
    assert len(set(monte_carlo_seeds(400))) == 400


def test_monte_carlo_equals_a_plain_loop_over_train_test_split(problem: Problem) -> None:
    features, labels = problem.train.features[:83], problem.train.labels[:83]
    pooled = monte_carlo(features, labels, 12)
    rows, predictions = [], []
    for seed in monte_carlo_seeds(12):
        kept, held_out = train_test_split(np.arange(83), test_size=0.1, random_state=seed)
        model = SVC(class_weight="balanced").fit(features[kept], labels[kept])
        rows.append(held_out)
        predictions.append(model.predict(features[held_out]))
    assert np.array_equal(pooled.rows, np.concatenate(rows))
    assert np.array_equal(pooled.predictions, np.concatenate(predictions))


def test_monte_carlo_one_class_in_training_predicts_that_class(problem: Problem) -> None:
    labels = np.zeros(30, np.int8)
    labels[4] = 1  # whenever this row is held out, the rest has one class
    pooled = monte_carlo(problem.train.features[:30], labels, 40)
    assert 4 in pooled.rows
    assert set(pooled.predictions[pooled.rows == 4]) == {0}
