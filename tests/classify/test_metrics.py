"""F1 per cluster against scikit-learn, and both conventions for what is undefined."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, precision_score, recall_score

from ctc_ray.classify.metrics import ctc_scores, metrics_rows, metrics_table
from ctc_ray.errors import LabelError
from ctc_ray.schema import METRICS_SCHEMA

PAIRS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(-1, 3)), min_size=1, max_size=40)


@settings(max_examples=80, deadline=None)
@given(PAIRS)
def test_scores_agree_with_scikit_learn(pairs: list[tuple[int, int, int]]) -> None:
    truth, predicted, _ = (np.array(values) for values in zip(*pairs, strict=True))
    paper = ctc_scores(truth, predicted, convention="paper")
    strict = ctc_scores(truth, predicted)
    nothing = not truth.any() and not predicted.any()
    for name, function in (("f1", f1_score), ("recall", recall_score), ("precision", precision_score)):
        expected = function(truth, predicted, zero_division=0)
        assert paper[name] == pytest.approx(1.0 if nothing and name == "f1" else expected)
        assert strict[name] is None or strict[name] == pytest.approx(expected)
    assert (strict["reason"] is None) == (None not in (strict["f1"], strict["recall"], strict["precision"]))
    assert paper["reason"] is None


@settings(max_examples=40, deadline=None)
@given(PAIRS)
def test_rows_of_clusters_add_up_to_the_total(pairs: list[tuple[int, int, int]]) -> None:
    truth, predicted, clusters = (np.array(values) for values in zip(*pairs, strict=True))
    rows = metrics_rows("test", truth, predicted, clusters, all_clusters=range(-1, 4))
    assert [row["cluster"] for row in rows] == [None, -1, 0, 1, 2, 3]
    assert sum(row["num_cells"] for row in rows[1:]) == rows[0]["num_cells"] == len(pairs)
    assert sum(row["num_ctc"] for row in rows[1:]) == rows[0]["num_ctc"] == truth.sum()
    for row in rows[1:]:
        here = clusters == row["cluster"]
        assert row["f1"] == ctc_scores(truth[here], predicted[here])["f1"]
    table = metrics_table(rows)
    assert table.schema == METRICS_SCHEMA
    assert table.num_rows == 6


@pytest.mark.parametrize(
    ("truth", "predicted", "missing", "reason"),
    [
        ([], [], {"f1", "recall", "precision"}, "no labelled cell"),
        ([0, 0], [0, 0], {"f1", "recall", "precision"}, "no CTC labelled and none predicted"),
        ([0, 0], [0, 1], {"recall"}, "no CTC labelled"),
        ([0, 1], [0, 0], {"precision"}, "no CTC predicted"),
    ],
)
def test_undefined_scores_are_null_with_a_reason(
    truth: list[int], predicted: list[int], missing: set[str], reason: str
) -> None:
    scores = ctc_scores(np.array(truth, int), np.array(predicted, int))
    assert {name for name in ("f1", "recall", "precision") if scores[name] is None} == missing
    assert scores["reason"].startswith(reason)


def test_scores_of_odd_labels_or_lengths_are_refused() -> None:
    with pytest.raises(LabelError, match=r"truth hold \[2\]"):
        ctc_scores(np.array([0, 2]), np.array([0, 1]))
    with pytest.raises(LabelError, match="predictions"):
        ctc_scores(np.array([0, 1]), np.array([0]))
