"""Table S1: the models, tuned on held-out training patients alone."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC

from ctc_ray.classify.model_comparison import MODELS, Tuned, compare_models, comparison_table, patient_folds, tune

SMALL = {"svm": {"C": (0.1, 10.0), "gamma_scale": (1.0,)}, "nearest_neighbours": {"n_neighbors": (1, 9)}}


def cells(num: int = 160, train_patients: int = 4, seed: int = 0) -> tuple[pl.DataFrame, np.ndarray]:
    rng = np.random.default_rng(seed)
    is_ctc = (rng.uniform(size=num) < 0.4).astype(np.int8)
    role = np.repeat(["train", "test", "validation"], [num // 2, num // 4, num - num // 2 - num // 4])
    patient = np.where(role == "train", [f"T{i % train_patients}" for i in range(num)], role)
    features = rng.normal(0, 1, (num, 5)) + 1.1 * is_ctc[:, None]
    return pl.DataFrame({"patient": patient, "role": role, "is_ctc": is_ctc}), features.astype(np.float32)


@pytest.fixture(autouse=True)
def small_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    grids = {**SMALL, "logistic_regression": {"C": (0.01, 1.0)}}
    monkeypatch.setattr("ctc_ray.classify.model_comparison.MODELS", {name: grids[name] for name in MODELS})


def test_untuned_models_are_those_of_scikit_learn() -> None:
    frame, features = cells()
    rows = comparison_table(compare_models(frame, features)).to_pylist()
    train, test = ((frame["role"] == role).to_numpy() for role in ("train", "test"))
    truth = frame["is_ctc"].to_numpy()
    plain = {
        "svm": SVC(class_weight="balanced"),
        "logistic_regression": LogisticRegression(class_weight="balanced"),
        "nearest_neighbours": KNeighborsClassifier(),
    }
    for name, model in plain.items():
        predicted = model.fit(features[train].astype(np.float64), truth[train]).predict(features[test])
        (row,) = [r for r in rows if (r["model"], r["tuned"], r["split"]) == (name, False, "test")]
        assert row["f1"] == pytest.approx(f1_score(truth[test], predicted))
        assert row["parameters"] == "{}"
    assert [(r["model"], r["tuned"], r["split"]) for r in rows] == [
        (name, tuned, split) for name in MODELS for tuned in (False, True) for split in ("validation", "test")
    ]


def test_tuned_parameters_are_those_with_the_best_f1_on_held_out_patients() -> None:
    frame, features = cells()
    frame, features = frame.filter(pl.col("role") == "train"), features[(frame["role"] == "train").to_numpy()]
    truth, patients = frame["is_ctc"].to_numpy().astype(np.int64), frame["patient"].to_numpy()
    folds = patient_folds(truth, patients, 42)
    found = tune("nearest_neighbours", {"n_neighbors": (1, 9, 21)}, features.astype(np.float64), truth, folds)
    scores = {}
    for k in (1, 9, 21):
        predicted = np.full(len(truth), -1)
        for fit, held in folds:
            predicted[held] = KNeighborsClassifier(k).fit(features[fit], truth[fit]).predict(features[held])
        scores[k] = f1_score(truth, predicted)
    assert found is not None
    assert found.parameters == {"n_neighbors": max(scores, key=lambda k: scores[k])}
    assert found.f1 == pytest.approx(max(scores.values()))


def test_folds_keep_patients_together_and_hold_every_cell_out_once() -> None:
    frame, _ = cells(train_patients=7)
    train = frame.filter(pl.col("role") == "train")
    truth, patients = train["is_ctc"].to_numpy(), train["patient"].to_numpy()
    folds = patient_folds(truth, patients, 42)
    assert len(folds) == 5
    for fit, held in folds:
        assert not set(patients[fit]) & set(patients[held])
    assert sorted(np.concatenate([held for _, held in folds])) == list(range(train.height))
    assert patient_folds(truth, np.full(train.height, "one"), 42) == ()


def test_scored_cells_do_not_influence_what_is_chosen() -> None:
    frame, features = cells()
    changed = features.copy()
    changed[(frame["role"] != "train").to_numpy()] += 50
    for row, other in zip(compare_models(frame, features), compare_models(frame, changed), strict=True):
        assert (row["parameters"], row["cv_f1"]) == (other["parameters"], other["cv_f1"])


def test_one_training_patient_leaves_tuned_rows_null_with_a_reason() -> None:
    frame, features = cells(train_patients=1)
    rows = comparison_table(compare_models(frame, features)).to_pylist()
    tuned = [row for row in rows if row["tuned"]]
    assert len(tuned) == len(MODELS)
    assert all(row["f1"] is None and "two training patients" in row["reason"] for row in tuned)
    assert all(row["f1"] is not None for row in rows if not row["tuned"])
    assert tune("svm", {}, features.astype(np.float64), frame["is_ctc"].to_numpy(), ()) == Tuned({}, None)


def test_parameters_are_readable_as_json() -> None:
    rows = compare_models(*cells())
    assert json.loads(next(row["parameters"] for row in rows if row["model"] == "svm" and row["tuned"])).keys() == {
        "C",
        "gamma_scale",
    }
