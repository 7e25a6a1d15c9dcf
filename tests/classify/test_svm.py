"""The classifier: seeded, saved without pickle, loaded back the same."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier
from skops.io import dumps

from ctc_ray.classify.svm import Classifier
from ctc_ray.errors import LabelError, SchemaError
from ctc_ray.latent.reduce import PrincipalComponents


def labelled(num: int = 120, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    classes = (rng.uniform(size=num) < 0.3).astype(np.int64)
    return (rng.normal(0, 1, (num, 10)) + 1.2 * classes[:, None]).astype(np.float32), classes


def fitted(seed: int = 42, svm_c: float = 1.0) -> Classifier:
    vectors, classes = labelled()
    pca = PrincipalComponents.fit(vectors, 5)
    return Classifier.fit(pca, pca.transform(vectors), classes, seed=seed, svm_c=svm_c)


def test_probability_separates_the_classes_and_matches_predict() -> None:
    classifier = fitted()
    vectors, classes = labelled(seed=1)
    probability = classifier.probability(vectors)
    assert probability.dtype == np.float32
    assert probability.min() >= 0
    assert probability.max() <= 1
    assert probability[classes == 1].mean() > probability[classes == 0].mean() + 0.4
    np.testing.assert_array_equal(classifier.predict(vectors), probability >= 0.5)
    assert classifier.probability(vectors[:0]).shape == (0,)


def test_probability_does_not_depend_on_the_batch() -> None:
    classifier = fitted()
    vectors, _ = labelled(seed=1)
    parts = [classifier.probability(vectors[i : i + 7]) for i in range(0, len(vectors), 7)]
    np.testing.assert_allclose(np.concatenate(parts), classifier.probability(vectors), atol=1e-6)


def test_same_seed_gives_the_same_classifier_and_other_settings_another() -> None:
    vectors, _ = labelled(seed=1)
    np.testing.assert_array_equal(fitted().probability(vectors), fitted().probability(vectors))
    assert not np.array_equal(fitted().probability(vectors), fitted(svm_c=0.1).probability(vectors))
    assert not np.array_equal(fitted().probability(vectors), fitted(seed=1).probability(vectors))


def test_saved_classifier_comes_back_identical() -> None:
    classifier = fitted()
    vectors, _ = labelled(seed=1)
    loaded = Classifier.from_bytes(classifier.to_bytes())
    np.testing.assert_array_equal(loaded.probability(vectors), classifier.probability(vectors))
    np.testing.assert_array_equal(loaded.pca.components, classifier.pca.components)


def test_file_of_another_kind_is_not_loaded() -> None:
    with pytest.raises(SchemaError, match="not a classifier of ctc_ray"):
        Classifier.from_bytes(b"no model at all", "x/model.skops")
    forest = RandomForestClassifier(2).fit([[0.0], [1.0]], [0, 1])
    with pytest.raises(SchemaError, match=r"holds the types sklearn\.tree"):
        Classifier.from_bytes(dumps({"pca": {}, "model": forest}))
    with pytest.raises(SchemaError, match="not a classifier of ctc_ray"):
        Classifier.from_bytes(dumps({"pca": {"mean": 0, "components": 0, "explained": 0}, "model": [1, 2]}))
    with pytest.raises(SchemaError, match=r"holds the types.*eval"):
        Classifier.from_bytes(dumps({"pca": {}, "model": eval}))


@pytest.mark.parametrize("num_ctc", [0, 1])
def test_one_class_alone_is_refused(num_ctc: int) -> None:
    vectors, _ = labelled()
    pca = PrincipalComponents.fit(vectors, 5)
    classes = np.zeros(len(vectors), int)
    classes[:num_ctc] = 1
    with pytest.raises(LabelError, match=f"there are {num_ctc} CTCs"):
        Classifier.fit(pca, pca.transform(vectors), classes)


def test_two_cells_of_a_class_are_enough() -> None:
    vectors, _ = labelled()
    pca = PrincipalComponents.fit(vectors, 5)
    classes = np.zeros(len(vectors), int)
    classes[:2] = 1
    probability = Classifier.fit(pca, pca.transform(vectors), classes).probability(vectors)
    assert np.isfinite(probability).all()
