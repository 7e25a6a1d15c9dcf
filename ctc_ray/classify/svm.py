"""The classifier: PCA features, an RBF support vector machine, and a calibrated probability. Runs without Ray."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ctc_ray.cohort import Cohort
from ctc_ray.errors import LabelError, SchemaError
from ctc_ray.latent.reduce import PrincipalComponents
from ctc_ray.storage import Store

MODEL_FILE = "model.skops"
THRESHOLD = 0.5
_SCORING_CHUNK = 8192
_TRUSTED = (
    "sklearn.calibration.CalibratedClassifierCV",
    "sklearn.calibration._CalibratedClassifier",
    "sklearn.calibration._SigmoidCalibration",
    "sklearn.model_selection._split.StratifiedKFold",
    "sklearn.svm._classes.SVC",
)
"""The only types that a model file may hold beside arrays and numbers."""


@dataclass(frozen=True)
class Classifier:
    """A fitted classifier of embeddings.

    Attributes:
        pca: embeddings to features; the latent map's.
        model: fitted `CalibratedClassifierCV(SVC())` on those features.
    """

    pca: PrincipalComponents
    model: Any

    @classmethod
    def fit(
        cls,
        pca: PrincipalComponents,
        features_NP: npt.NDArray[np.floating],
        classes_N: npt.NDArray[np.integer],
        *,
        svm_c: float = 1.0,
        folds: int = 5,
        seed: int = 42,
    ) -> Classifier:
        """Fit to PCA features.

        Args:
            pca: what made the features; kept in the model.
            features_NP: (N, P) in a fixed order (sorted by cell_id).
            classes_N: (N,) 1 for CTC, 0 for all else.
            svm_c: penalty of the SVM.
            folds: of the calibration; fewer where the smaller class has fewer cells.
            seed: of the folds.

        Raises:
            LabelError: fewer than two cells of a class.

        Source: reference, SVC rbf, C 1, gamma scale, class_weight balanced. Departure: `CalibratedClassifierCV(ensemble=False)`
        with seeded folds in place of `probability=True`, which is unseeded and leaves scikit-learn in 1.11.
        """
        from sklearn.calibration import CalibratedClassifierCV
        from sklearn.model_selection import StratifiedKFold
        from sklearn.svm import SVC

        classes = np.asarray(classes_N).astype(np.int64)
        counts = {"ctc": int((classes == 1).sum()), "other": int((classes == 0).sum())}
        if min(counts.values()) < 2:
            raise LabelError(
                f"the classifier needs at least two labelled CTCs and two other cells of training patients; there are "
                f"{counts['ctc']} CTCs and {counts['other']} others: label more cells"
            )
        splits = StratifiedKFold(min(folds, *counts.values()), shuffle=True, random_state=seed)
        svm = SVC(C=svm_c, kernel="rbf", gamma="scale", class_weight="balanced", cache_size=500)
        model = CalibratedClassifierCV(svm, method="sigmoid", cv=splits, ensemble=False)
        return cls(pca, model.fit(np.asarray(features_NP, np.float64), classes))

    def probability(self, embeddings_ND: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        """Calibrated probability (N,) float32 that a cell is a CTC, from its embedding (N, D).

        Raises:
            SchemaError: another width than the encoder's, or values that are not finite.
        """
        embeddings = np.asarray(embeddings_ND)
        found = np.empty(len(embeddings), np.float32)
        for start in range(0, len(embeddings), _SCORING_CHUNK):
            block = self.pca.transform(embeddings[start : start + _SCORING_CHUNK])
            found[start : start + len(block)] = self.probability_of_features(block)
        return found

    def probability_of_features(self, features_NP: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        """Calibrated probability (N,) from PCA features (N, P)."""
        if not len(features_NP):
            return np.empty(0, np.float32)
        column = int(np.flatnonzero(self.model.classes_ == 1)[0])
        both = self.model.predict_proba(np.asarray(features_NP, np.float64))
        probability: npt.NDArray[np.float32] = both[:, column].astype(np.float32)
        return probability

    def predict(self, embeddings_ND: npt.NDArray[np.floating]) -> npt.NDArray[np.int8]:
        """Class (N,): 1 where the probability is at least 0.5.

        One rule for F1 and for candidates. Departure: the reference takes the sign of the SVM's margin for F1, which can
        disagree with its own probability.
        """
        return (self.probability(embeddings_ND) >= THRESHOLD).astype(np.int8)

    def to_bytes(self) -> bytes:
        """The model as one skops file; no pickle."""
        from skops.io import dumps

        pca = {"mean": self.pca.mean, "components": self.pca.components, "explained": self.pca.explained}
        data: bytes = dumps({"pca": pca, "model": self.model})
        return data

    @classmethod
    def from_bytes(cls, data: bytes, where: str = "the model") -> Classifier:
        """Read a skops file.

        Raises:
            SchemaError: it holds types beside those of a classifier, or is none.
        """
        from zipfile import BadZipFile

        from sklearn.calibration import CalibratedClassifierCV
        from skops.io import get_untrusted_types, loads
        from skops.io.exceptions import UntrustedTypesFoundException

        try:
            odd = sorted(set(get_untrusted_types(data=data)) - set(_TRUSTED))
            if odd:
                raise SchemaError(
                    f"{where} holds the types {', '.join(odd)}, which no classifier of ctc_ray has: not loaded"
                )
            values = loads(data, trusted=list(_TRUSTED))
            arrays = values["pca"]
            if not isinstance(values["model"], CalibratedClassifierCV):
                raise SchemaError(
                    f"{where} holds a {type(values['model']).__name__}, no calibrated SVM: not a classifier of ctc_ray"
                )
            return cls(PrincipalComponents(arrays["mean"], arrays["components"], arrays["explained"]), values["model"])
        except (BadZipFile, UntrustedTypesFoundException, KeyError, TypeError, ValueError) as error:
            if isinstance(error, SchemaError):
                raise
            raise SchemaError(
                f"{where} is not a classifier of ctc_ray: {error}. Run `ctc-ray train` with --force"
            ) from error


def load_classifier(cohort: Cohort, name: str) -> Classifier:
    """Load a trained classifier by name.

    Raises:
        MissingInputError: it was not trained; the message names the command.
        SchemaError: its file is damaged.
    """
    folder = cohort.classifier(name)
    cohort.require(folder, "train")
    return read_classifier(cohort.store, folder)


def read_classifier(store: Store, folder: str) -> Classifier:
    """Read the model file of a classifier's folder; raises as `load_classifier`."""
    path = f"{folder}/{MODEL_FILE}"
    return Classifier.from_bytes(store.read_bytes(path), store.describe(path))
