"""The train stage: fit the classifier on labelled training cells, score it in each cluster of the latent map."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from ctc_ray.classify.labelled import SCORED_ROLES, TRAIN_ROLE, LabelledCells, labelled_cells
from ctc_ray.classify.metrics import Convention, metrics_rows, metrics_table
from ctc_ray.classify.model_comparison import COMPARISON_FILE, compare_models, comparison_table
from ctc_ray.classify.svm import MODEL_FILE, THRESHOLD, Classifier
from ctc_ray.cohort import Cohort
from ctc_ray.config import RunConfig, TrainConfig
from ctc_ray.errors import MissingInputError
from ctc_ray.labels.patients import process_identity, run_over
from ctc_ray.latent.embeddings import vectors_of
from ctc_ray.latent.model import SUMMARY_FILE, load_pca
from ctc_ray.progress import Progress
from ctc_ray.records import (
    PlanRow,
    Record,
    StageResult,
    State,
    identity_of,
    publish,
    read_record,
    require_fresh,
    state_of,
)
from ctc_ray.storage import Store

STAGE = "train"
METRICS_FILE = "metrics.parquet"


@dataclass(frozen=True)
class TrainInputs:
    """What a classifier is made from, and its identity."""

    cells: LabelledCells
    inputs: dict[str, str]
    identity: str


def run_train(
    config: RunConfig, cohort: Cohort, *, force: bool = False, progress: Progress | None = None
) -> StageResult:
    """Train the classifier and score it on validation and test patients.

    Args:
        config: section `train`.
        cohort: mapped, with labels of training patients.
        force: replace a classifier made with other settings, labels or map.
        progress: where progress goes.

    Returns:
        One unit, computed or reused; counts of labelled cells by role.

    Raises:
        MissingInputError: no map, or a labelled patient is not on it.
        LabelError: no training labels, or fewer than two of a class.
        RoleLeakError: a physical cell is labelled in two roles.
        StaleOutputError: the classifier was made otherwise, and `force` is not set.
    """
    started = time.monotonic()
    settings = config.train
    found = train_inputs(settings, cohort)
    folder = cohort.classifier(settings.name)
    state = require_fresh(cohort.store, folder, found.identity, force=force)
    if state is State.COMPLETE and lacks_comparison(settings, cohort):
        state = State.ABSENT
    if state is not State.COMPLETE:
        call = (cohort.store, settings, found.cells.frame.to_arrow(), found.inputs, found.identity)
        list(run_over(train_and_publish, [call], description="train the classifier", progress=progress))
    computed = int(state is not State.COMPLETE)
    counts = {f"{role}_cells": found.cells.of(role).height for role in (TRAIN_ROLE, *SCORED_ROLES)}
    return StageResult(STAGE, computed, 1 - computed, 0, counts, (folder,), time.monotonic() - started)


def plan_train(config: RunConfig, cohort: Cohort) -> list[PlanRow]:
    """Say whether the classifier would be trained; raises as `run_train`, but for stale output."""
    found = train_inputs(config.train, cohort)
    state = state_of(cohort.store, cohort.classifier(config.train.name), found.identity)
    if state is State.COMPLETE and lacks_comparison(config.train, cohort):
        return [PlanRow(config.train.name, State.ABSENT, f"{COMPARISON_FILE} is not there: trained again, with it")]
    why = {
        State.ABSENT: f"not trained: {found.cells.of(TRAIN_ROLE).height} labelled training cells",
        State.STALE: "trained with other settings, labels or another map: needs --force",
        State.COMPLETE: "trained on these labels",
    }
    return [PlanRow(config.train.name, state, why[state])]


def lacks_comparison(config: TrainConfig, cohort: Cohort) -> bool:
    """Whether the comparison of models is wanted and a finished classifier has none; the same training then makes both."""
    record = read_record(cohort.store, cohort.classifier(config.name))
    return config.compare_models and (record is None or COMPARISON_FILE not in record.files)


def train_inputs(config: TrainConfig, cohort: Cohort) -> TrainInputs:
    """Labelled cells, and the identity that pins encoder, map and exactly their labels; raises as `run_train`."""
    folder = cohort.latent(config.encoder, config.map)
    cohort.require(folder, "map")
    cells = labelled_cells(cohort)
    inputs = {
        "encoder": config.encoder,
        "map": str(cohort.store.read_json(f"{folder}/{SUMMARY_FILE}")["models"]),
        "labels": cells.digest,
        "roles": _roles_digest(cells),
    }
    for patient in sorted(set(cells.frame["patient"])):
        placed = cohort.latent_cells(config.encoder, config.map, patient)
        inputs[f"placed/{patient}"] = cohort.require(placed, "map").identity
    return TrainInputs(cells, inputs, identity_of(STAGE, config.identity(), inputs))


def _roles_digest(cells: LabelledCells) -> str:
    rows = cells.frame.select("patient", "role").unique().sort("patient")
    return ",".join(f"{patient}={role}" for patient, role in rows.iter_rows())


def train_and_publish(
    store: Store, config: TrainConfig, cells: pa.Table, inputs: dict[str, str], identity: str
) -> dict[str, int]:
    """Fit, score and write one classifier. Runs on a worker; returns counts."""
    started = time.monotonic()
    cohort = Cohort(store)
    frame = features_of(cohort, config, pl.DataFrame(pl.from_arrow(cells)))
    train = frame.filter(pl.col("role") == TRAIN_ROLE)
    classifier = Classifier.fit(
        load_pca(store, cohort.latent(config.encoder, config.map)),
        _features(train),
        train["is_ctc"].to_numpy(),
        svm_c=config.svm_c,
        folds=config.calibration_folds,
        seed=config.seed,
    )
    predicted = (classifier.probability_of_features(_features(frame)) >= THRESHOLD).astype(np.int8)
    rows = score_rows(
        frame.with_columns(predicted=pl.Series(predicted)), _num_clusters(cohort, config), config.undefined
    )
    counts = {f"{role}_cells": int((frame["role"] == role).sum()) for role in (TRAIN_ROLE, *SCORED_ROLES)}
    counts["train_ctc"] = int(train["is_ctc"].sum())
    node, pid = process_identity()
    record = Record(
        stage=STAGE,
        unit=config.name,
        identity=identity,
        config=config.identity(),
        inputs=inputs,
        counts=counts,
        seconds=time.monotonic() - started,
        units_computed=1,
        workers=[{"node": node, "pid": pid, "units": 1}],
    )
    files = {MODEL_FILE: classifier.to_bytes(), METRICS_FILE: metrics_table(rows)}
    if config.compare_models:
        files[COMPARISON_FILE] = comparison_table(
            compare_models(frame, _features(frame), convention=config.undefined, seed=config.seed)
        )
    publish(store, cohort.classifier(config.name), files, record)
    return counts


def features_of(cohort: Cohort, config: TrainConfig, cells: pl.DataFrame) -> pl.DataFrame:
    """Add `pca` (P floats) and `cluster` of the latent map to labelled cells, sorted by cell_id.

    Raises:
        MissingInputError: a labelled cell is not on the map.
    """
    frames = []
    for (patient,), group in cells.group_by("patient"):
        folder = cohort.latent_cells(config.encoder, config.map, str(patient))
        table = cohort.read_columns(folder, ["cell_id", "pca", "cluster"])
        wanted = pl.DataFrame(pl.from_arrow(table)).join(group.select("cell_id"), on="cell_id", how="semi")
        frames.append(group.join(wanted, on="cell_id", how="left"))
    joined = pl.concat(frames).sort("cell_id")
    lost = joined.filter(pl.col("cluster").is_null())
    if lost.height:
        raise MissingInputError(
            f"{lost.height} labelled cells, the first {lost['cell_id'][0]} of patient {lost['patient'][0]}, are not on the map: "
            f"run `ctc-ray embed {cohort.store.uri}` and `ctc-ray map {cohort.store.uri}`"
        )
    return joined


def _features(frame: pl.DataFrame) -> np.ndarray:
    return vectors_of(frame.select("pca").to_arrow(), "the latent map", "pca")


def _num_clusters(cohort: Cohort, config: TrainConfig) -> int:
    summary = cohort.store.read_json(f"{cohort.latent(config.encoder, config.map)}/{SUMMARY_FILE}")
    return int(summary["num_clusters"])


def score_rows(frame: pl.DataFrame, num_clusters: int, convention: Convention = "null") -> list[dict[str, Any]]:
    """Metrics of each scored role that has labels; columns role, is_ctc, predicted, cluster are read.

    A cluster without a labelled cell has null in both conventions.
    """
    rows = []
    for role in SCORED_ROLES:
        part = frame.filter(pl.col("role") == role)
        if part.height:
            truth, predicted, clusters = (part[name].to_numpy() for name in ("is_ctc", "predicted", "cluster"))
            known = range(-1, num_clusters)
            rows += metrics_rows(role, truth, predicted, clusters, all_clusters=known, convention=convention)
    return rows
