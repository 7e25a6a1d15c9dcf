"""The paper's Table S1: SVM, logistic regression and nearest neighbours, each as it comes and tuned. Runs without Ray."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from ctc_ray.classify.labelled import SCORED_ROLES, TRAIN_ROLE
from ctc_ray.classify.metrics import Convention, ctc_scores

COMPARISON_FILE = "model_comparison.parquet"
_MAX_FOLDS = 5
_SCALES = (0.1, 0.3, 1.0, 3.0, 10.0)

MODELS: Mapping[str, Mapping[str, Sequence[Any]]] = {
    "svm": {"C": (0.1, 1.0, 10.0, 100.0), "gamma_scale": _SCALES},
    "logistic_regression": {"C": (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)},
    "nearest_neighbours": {"n_neighbors": (1, 3, 5, 11, 21, 51), "weights": ("uniform", "distance")},
}
"""Model -> grid that it is tuned on; `gamma_scale` multiplies scikit-learn's `scale`. The paper does not give its grid."""

_SCHEMA = pa.schema(
    [
        pa.field("model", pa.string(), nullable=False),
        pa.field("tuned", pa.bool_(), nullable=False),
        ("parameters", pa.string()),
        ("cv_f1", pa.float64()),
        ("num_folds", pa.int32()),
        ("split", pa.string()),
        ("f1", pa.float64()),
        ("recall", pa.float64()),
        ("precision", pa.float64()),
        ("num_cells", pa.int64()),
        ("num_ctc", pa.int64()),
        ("reason", pa.string()),
    ]
)

Fold = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]


@dataclass(frozen=True)
class Tuned:
    """Parameters and how they did on held-out training patients.

    Attributes:
        parameters: chosen from the grid.
        f1: of all held-out predictions together; None where it has no value.
    """

    parameters: Mapping[str, Any]
    f1: float | None


def compare_models(
    frame: pl.DataFrame, features_NP: npt.NDArray[np.floating], *, convention: Convention = "null", seed: int = 42
) -> list[dict[str, Any]]:
    """Fit each model on the training cells as it comes and tuned, and score it on validation and test cells.

    Args:
        frame: N labelled cells; columns patient, role, is_ctc are read.
        features_NP: (N, P) their PCA features.
        convention: of undefined scores, as in `metrics.ctc_scores`.
        seed: of the folds.

    Returns:
        Rows of the comparison: model, tuned, parameters (JSON), cv_f1 (held-out training patients), num_folds, split, f1, recall,
        precision, num_cells, num_ctc, reason. Where tuning is not possible its rows have null and say why.

    Source: paper, Table S1. Parameters are chosen by the F1 of held-out training patients (folds by patient; all held-out
    predictions together), never by validation or test cells. SVM and logistic regression weigh the classes evenly. All predict by their own
    `predict`, the SVM by the sign of its margin; the classifier's own metrics come from its calibrated probability.
    """
    is_train = (frame["role"] == TRAIN_ROLE).to_numpy()
    classes = frame["is_ctc"].to_numpy().astype(np.int64)
    features = np.asarray(features_NP, np.float64)
    train, truth = features[is_train], classes[is_train]
    folds = patient_folds(truth, frame["patient"].to_numpy()[is_train], seed)
    rows = []
    for model, grid in MODELS.items():
        for tuned in (False, True):
            best = tune(model, grid if tuned else {}, train, truth, folds)
            head = {"model": model, "tuned": tuned, "num_folds": len(folds), "cv_f1": best.f1 if best else None}
            if best is None:
                reason = "not tuned: it takes CTCs and other cells of at least two training patients"
                rows.append({**head, "reason": reason})
                continue
            fitted = build(model, best.parameters, train).fit(train, truth)
            head["parameters"] = json.dumps(dict(best.parameters), sort_keys=True)
            for split in SCORED_ROLES:
                here = (frame["role"] == split).to_numpy()
                if here.any():
                    scores = ctc_scores(
                        classes[here], fitted.predict(features[here]), convention=convention, is_cluster=False
                    )
                    rows.append({**head, "split": split, **scores})
    return rows


def build(model: str, parameters: Mapping[str, Any], train_NP: npt.NDArray[np.float64]) -> Any:
    """An unfitted scikit-learn model; parameters that are not given have scikit-learn's defaults."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.svm import SVC

    given = dict(parameters)
    if model == "svm":
        spread = train_NP.shape[1] * float(train_NP.var())
        factor = given.pop("gamma_scale", None)
        gamma = "scale" if factor is None or not spread else factor / spread
        return SVC(kernel="rbf", gamma=gamma, class_weight="balanced", cache_size=500, **given)
    if model == "logistic_regression":
        return LogisticRegression(class_weight="balanced", max_iter=5000, **given)
    given["n_neighbors"] = min(given.get("n_neighbors", 5), len(train_NP))
    return KNeighborsClassifier(**given)


def patient_folds(truth_N: npt.NDArray[np.integer], patients_N: npt.NDArray[np.generic], seed: int) -> tuple[Fold, ...]:
    """Folds that keep a patient's cells together, stratified as far as that allows.

    Returns:
        Pairs of row numbers (fitted on, held out); at most five, fewer with fewer patients; () for one patient. Folds with one
        class alone to fit on are left out.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    num = min(_MAX_FOLDS, len(np.unique(patients_N)), int(truth_N.sum()), int((truth_N == 0).sum()))
    if num < 2:
        return ()
    splits = StratifiedGroupKFold(num, shuffle=True, random_state=seed).split(truth_N, truth_N, patients_N)
    return tuple((fit, held) for fit, held in splits if len(held) and len(np.unique(truth_N[fit])) == 2)


def tune(
    model: str,
    grid: Mapping[str, Sequence[Any]],
    train_NP: npt.NDArray[np.float64],
    truth_N: npt.NDArray[np.integer],
    folds: Sequence[Fold],
) -> Tuned | None:
    """The parameters of a grid with the highest F1 of all held-out predictions together (equal: the first of the grid).

    Returns:
        An empty grid gives the model's defaults, with their F1 where there are folds; a grid without folds None.
    """
    if not folds:
        return None if grid else Tuned({}, None)
    held = np.concatenate([out for _, out in folds])
    best: Tuned | None = None
    for parameters in _combinations(grid):
        predicted = np.concatenate(
            [
                build(model, parameters, train_NP[fit]).fit(train_NP[fit], truth_N[fit]).predict(train_NP[out])
                for fit, out in folds
            ]
        )
        f1 = ctc_scores(truth_N[held], predicted, is_cluster=False)["f1"]
        if best is None or (f1 is not None and (best.f1 is None or f1 > best.f1)):
            best = Tuned(parameters, f1)
    return best


def _combinations(grid: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def comparison_table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Rows of `compare_models` as a table."""
    return pa.Table.from_pylist(list(rows), schema=_SCHEMA)
