"""The fast fits against scikit-learn's plain SVC."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.svm import SVC

from ctc_ray.hil import svm
from ctc_ray.hil.release import read_release
from ctc_ray.hil.svm import Classifier, gamma_scale, pairwise_squared_distances, squared_distances
from ctc_ray.storage import Store


def _blobs(seed: int, num: int = 90, width: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = (rng.random(num) < 0.4).astype(np.int8)
    labels[:2] = 0, 1
    return rng.normal(0, 1, (num, width)) + labels[:, None], labels


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(8, 120), st.integers(2, 12))
def test_classifier_any_blobs_predicts_as_svc(seed: int, num: int, width: int) -> None:
    features, labels = _blobs(seed, num, width)
    others = np.random.default_rng(seed + 1).normal(0.5, 1.2, (60, width))
    plain = SVC(class_weight="balanced").fit(features, labels)
    fast = Classifier.fit(features, labels)
    np.testing.assert_allclose(fast.decision_function(others), plain.decision_function(others), atol=1e-3)
    clear = np.abs(plain.decision_function(others)) > 1e-3
    assert np.array_equal(fast.predict(others)[clear], plain.predict(others)[clear])


def test_classifier_real_scores_predicts_bit_equal_to_svc(shared_data: Path) -> None:
    problem = read_release(Store(shared_data / "hil_release")).problem()
    rng = np.random.default_rng(5)
    for num in (100, 300, 500):
        rows = rng.choice(len(problem.train), num, replace=False)
        features, labels = problem.train.features[rows], problem.train.labels[rows]
        plain = SVC(class_weight="balanced").fit(features, labels)
        assert np.array_equal(
            Classifier.fit(features, labels).predict(problem.test.features), plain.predict(problem.test.features)
        )


def test_fit_without_the_low_level_function_gives_the_same_decisions(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = _blobs(3)
    fast = Classifier.fit(features, labels).decision_function(features)
    monkeypatch.setattr(svm, "_libsvm", None)
    np.testing.assert_allclose(Classifier.fit(features, labels).decision_function(features), fast, atol=1e-9)


@pytest.mark.parametrize("only", [0, 1])
def test_classifier_one_class_predicts_it_everywhere(only: int) -> None:
    features, _ = _blobs(4)
    fitted = Classifier.fit(features, np.full(len(features), only, np.int8))
    assert set(fitted.predict(features + 100)) == {only}


def test_squared_distances_agree_with_differences() -> None:
    a, b = _blobs(1)[0], _blobs(2)[0][:7]
    np.testing.assert_allclose(squared_distances(a, b), ((a[:, None] - b) ** 2).sum(-1), atol=1e-10)
    own = pairwise_squared_distances(a)
    assert np.all(np.diag(own) == 0.0)
    assert np.array_equal(own, own.T)


def test_gamma_scale_constant_features_is_one() -> None:
    assert gamma_scale(np.full((4, 3), 2.0)) == 1.0
    features = _blobs(1)[0]
    assert gamma_scale(features) == 1.0 / (features.shape[1] * features.var())
