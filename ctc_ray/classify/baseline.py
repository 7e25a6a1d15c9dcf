"""The same classifier on raw pixels, to show what the encoder adds."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from ctc_ray.classify.labelled import SCORED_ROLES, TRAIN_ROLE
from ctc_ray.classify.metrics import metrics_table
from ctc_ray.classify.stage import METRICS_FILE, features_of, score_rows, train_inputs
from ctc_ray.classify.svm import THRESHOLD, Classifier
from ctc_ray.cohort import Cohort
from ctc_ray.config import RunConfig, TrainConfig
from ctc_ray.labels.crops import read_crops
from ctc_ray.labels.patients import process_identity, run_over
from ctc_ray.latent.model import SUMMARY_FILE
from ctc_ray.latent.reduce import PrincipalComponents
from ctc_ray.progress import Progress
from ctc_ray.records import Record, StageResult, State, identity_of, publish, require_fresh
from ctc_ray.storage import Store

NAME = "raw_pixels"
STAGE = "train-baseline"
DIM = 32
"""Principal components of the pixels: as many as the latent map keeps of the embeddings."""


def run_baseline(
    config: RunConfig, cohort: Cohort, *, force: bool = False, progress: Progress | None = None
) -> StageResult:
    """Train the SVM on PCA features of raw crops, with the labels, cells and clusters of the classifier.

    Args:
        config: section `train`.
        cohort: as for `run_train`.
        force: replace an earlier result of other settings or labels.
        progress: where progress goes.

    Returns:
        One unit; `classifiers/raw_pixels/metrics.parquet` holds rows of `METRICS_SCHEMA`. No model is kept.

    Raises:
        as `run_train`.
    """
    started = time.monotonic()
    found = train_inputs(config.train, cohort)
    inputs = {**found.inputs}
    for patient in sorted(set(found.cells.frame["patient"])):
        inputs[f"cells/{patient}"] = cohort.require(cohort.cells(patient), "segment").identity
    identity = identity_of(STAGE, config.train.identity(), inputs)
    folder = cohort.classifier(NAME)
    state = require_fresh(cohort.store, folder, identity, force=force)
    if state is not State.COMPLETE:
        call = (cohort.store, config.train, found.cells.frame.to_arrow(), inputs, identity)
        list(run_over(train_on_pixels, [call], description="train on raw pixels", progress=progress))
    computed = int(state is not State.COMPLETE)
    counts = {f"{role}_cells": found.cells.of(role).height for role in (TRAIN_ROLE, *SCORED_ROLES)}
    return StageResult(STAGE, computed, 1 - computed, 0, counts, (folder,), time.monotonic() - started)


def train_on_pixels(
    store: Store, config: TrainConfig, cells: pa.Table, inputs: dict[str, str], identity: str
) -> dict[str, int]:
    """Read the labelled crops alone, fit and score. Runs on a worker; returns counts."""
    started = time.monotonic()
    cohort = Cohort(store)
    frame = features_of(cohort, config, pl.DataFrame(pl.from_arrow(cells)))
    pixels = _pixels(cohort, frame)
    is_train = (frame["role"] == TRAIN_ROLE).to_numpy()
    pca = PrincipalComponents.fit(pixels[is_train], DIM)
    features = pca.transform(pixels)
    classifier = Classifier.fit(
        pca,
        features[is_train],
        frame["is_ctc"].to_numpy()[is_train],
        svm_c=config.svm_c,
        folds=config.calibration_folds,
        seed=config.seed,
    )
    predicted = (classifier.probability_of_features(features) >= THRESHOLD).astype(np.int8)
    summary = store.read_json(f"{cohort.latent(config.encoder, config.map)}/{SUMMARY_FILE}")
    rows = score_rows(
        frame.with_columns(predicted=pl.Series(predicted)), int(summary["num_clusters"]), config.undefined
    )
    counts = {f"{role}_cells": int((frame["role"] == role).sum()) for role in (TRAIN_ROLE, *SCORED_ROLES)}
    node, pid = process_identity()
    record = Record(
        stage=STAGE,
        unit=NAME,
        identity=identity,
        config=config.identity(),
        inputs=inputs,
        counts=counts,
        seconds=time.monotonic() - started,
        units_computed=1,
        workers=[{"node": node, "pid": pid, "units": 1}],
    )
    publish(store, cohort.classifier(NAME), {METRICS_FILE: metrics_table(rows)}, record)
    return counts


def _pixels(cohort: Cohort, frame: pl.DataFrame) -> npt.NDArray[np.float32]:
    """Pixels (N, C*48*48) float32 of the cells, in the order of the frame."""
    found: dict[str, npt.NDArray[np.generic]] = {}
    for (patient,), group in frame.group_by("patient"):
        names, crops = read_crops(cohort.store, cohort.shards(cohort.cells(str(patient))), group["cell_id"].to_list())
        found.update(zip(names, crops, strict=True))
    return np.stack([found[name].reshape(-1).astype(np.float32) for name in frame["cell_id"]])
