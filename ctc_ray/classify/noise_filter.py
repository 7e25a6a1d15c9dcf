"""The noise filter: a classifier of its own that tells artefacts from all other cells. Runs without Ray."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from ctc_ray.classify.svm import THRESHOLD, Classifier
from ctc_ray.errors import LabelError
from ctc_ray.labels.labeller import unit_hash
from ctc_ray.latent.reduce import PrincipalComponents

MODEL_FILE = "noise.skops"
NOISE_LABEL = "artefact"
MIN_PER_CLASS = 10
"""Fewer artefacts, or fewer other cells, are refused."""
NOISE_SCHEMA = pa.schema([("cell_id", pa.string()), ("is_noise", pa.bool_()), ("probability", pa.float32())])
"""Rows of `classifiers/<name>/noise/<patient>/part-NNN.parquet`."""


@dataclass(frozen=True)
class NoiseFilter:
    """A fitted filter.

    Attributes:
        classifier: class 1 is noise; its PCA is the filter's own.
    """

    classifier: Classifier

    @classmethod
    def fit(
        cls,
        vectors_ND: npt.NDArray[np.floating],
        is_noise_N: npt.NDArray[np.bool_],
        *,
        pca_dim: int = 32,
        svm_c: float = 1.0,
        folds: int = 5,
        seed: int = 42,
    ) -> NoiseFilter:
        """Fit PCA and SVM to the same cells.

        Args:
            vectors_ND: (N, D) embeddings in a fixed order (sorted by cell_id).
            is_noise_N: (N,) whether a cell is an artefact; both kinds, at least two of each.
            pca_dim: components, fewer where there are fewer cells.
            svm_c: penalty of the SVM.
            folds: of the calibration.
            seed: of the folds.

        Raises:
            SchemaError: values that are not finite.

        Source: reference, `filter_noisy_images`: SVM on 400 noisy and 400 clean cells, PCA 32 fitted on those 800. Departures: the
        models are kept and applied to any patient, and the classifier's PCA is another object (the reference refits one for both).
        """
        pca = PrincipalComponents.fit(vectors_ND, pca_dim)
        features, classes = pca.transform(vectors_ND), np.asarray(is_noise_N).astype(np.int64)
        return cls(Classifier.fit(pca, features, classes, svm_c=svm_c, folds=folds, seed=seed))

    def probability(self, vectors_ND: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        """Calibrated probability (N,) that a cell is noise, from its embedding (N, D); raises as `Classifier.probability`."""
        return self.classifier.probability(vectors_ND)

    def table(self, cell_ids: list[str], vectors_ND: npt.NDArray[np.floating]) -> pa.Table:
        """Rows of `NOISE_SCHEMA` for cells and their embeddings (N, D); noise from a probability of 0.5."""
        probability = self.probability(vectors_ND)
        return pa.table([pa.array(cell_ids, pa.string()), probability >= THRESHOLD, probability], schema=NOISE_SCHEMA)

    def to_bytes(self) -> bytes:
        """The filter as one skops file; no pickle."""
        return self.classifier.to_bytes()

    @classmethod
    def from_bytes(cls, data: bytes, where: str = "the noise filter") -> NoiseFilter:
        """Read a skops file; raises as `Classifier.from_bytes`."""
        return cls(Classifier.from_bytes(data, where))


def choose_cells(labelled: pl.DataFrame, *, per_class: int, seed: int) -> pl.DataFrame:
    """Draw as many artefacts as other cells.

    Args:
        labelled: columns cell_id, patient, label; cells of training patients.
        per_class: of each at most.
        seed: of the draw, which does not depend on row order.

    Returns:
        Columns cell_id, patient, label, is_noise; sorted by cell_id.

    Raises:
        LabelError: fewer than ten artefacts or than ten other cells.
    """
    noise = labelled.filter(pl.col("label") == NOISE_LABEL)
    clean = labelled.filter(pl.col("label") != NOISE_LABEL)
    num = min(per_class, noise.height, clean.height)
    if num < MIN_PER_CLASS:
        raise LabelError(
            f"the noise filter needs at least {MIN_PER_CLASS} cells of training patients labelled {NOISE_LABEL!r} and as many others; "
            f"there are {noise.height} and {clean.height}: label more cells"
        )
    drawn = [_draw(frame, num, seed).with_columns(is_noise=pl.lit(frame is noise)) for frame in (noise, clean)]
    return pl.concat(drawn).select("cell_id", "patient", "label", "is_noise").sort("cell_id")


def _draw(frame: pl.DataFrame, num: int, seed: int) -> pl.DataFrame:
    order = [unit_hash(seed, "noise", name) for name in frame["cell_id"]]
    return frame.with_columns(order=pl.Series(order, dtype=pl.Float64)).sort("order", "cell_id").head(num)
