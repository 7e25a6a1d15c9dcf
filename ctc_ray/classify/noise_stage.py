"""The stage filter-noise: train the noise filter once, then score every embedded patient, slice by slice."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import polars as pl
import pyarrow as pa

from ctc_ray.classify.labelled import TRAIN_ROLE, labelled_cells
from ctc_ray.classify.noise_filter import MODEL_FILE, NoiseFilter, choose_cells
from ctc_ray.cohort import Cohort
from ctc_ray.config import FilterNoiseConfig, RunConfig
from ctc_ray.errors import MissingInputError, StaleOutputError
from ctc_ray.labels.consensus import digest_labels
from ctc_ray.labels.patients import process_identity, run_over
from ctc_ray.latent.by_unit import PatientJob, run_by_unit
from ctc_ray.latent.embeddings import Float32, embedded_patients, read_selected
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

STAGE = "filter-noise"
SUMMARY_FILE = "noise.json"


@dataclass(frozen=True)
class FilterPlan:
    """Which cells the filter is trained on, and its identity."""

    cells: pl.DataFrame
    inputs: dict[str, str]
    identity: str


def noise_folder(cohort: Cohort, name: str) -> str:
    """Folder of the noise filter of a classifier's name; below it one folder a patient."""
    return f"{cohort.classifier(name)}/noise"


def run_filter_noise(
    config: RunConfig, cohort: Cohort, *, force: bool = False, progress: Progress | None = None
) -> StageResult:
    """Train the noise filter if there is none, and score the patients that it has not scored yet.

    Args:
        config: section `filter_noise`.
        cohort: embedded, with cells of training patients labelled `artefact` and others.
        force: replace a filter made with other settings, labels or embeddings, and scores of other embeddings.
        progress: where progress goes.

    Returns:
        Patients scored and reused; counts: cells scored, and cells of each class that the filter was trained on.

    Raises:
        LabelError: too few artefacts or too few other cells are labelled.
        MissingInputError: a labelled training patient is not embedded.
        StaleOutputError: the filter, or a patient's scores, were made otherwise, and `force` is not set.
        TooManyFailuresError: more patients than `filter_noise.max_failure_fraction` could not be scored; all others are.
    """
    started = time.monotonic()
    settings = config.filter_noise
    plan = plan_filter(settings, cohort)
    folder = noise_folder(cohort, settings.name)
    if require_fresh(cohort.store, folder, plan.identity, force=force) is not State.COMPLETE:
        call = (cohort.store, settings, plan.cells.to_arrow(), plan.inputs, plan.identity)
        list(run_over(fit_and_publish, [call], description="train the noise filter", progress=progress))
    units = _patients(settings, cohort, plan.identity)
    todo = [patient for patient, (_, state) in units.items() if state is not State.COMPLETE]
    stale = [patient for patient in todo if units[patient][1] is State.STALE]
    if stale and not force:
        raise StaleOutputError(
            f"patients {', '.join(stale)} were embedded anew since {cohort.store.describe(folder)} scored them: run again with --force"
        )
    scored = run_by_unit(
        cohort,
        [units[patient][0] for patient in todo],
        score_cells,
        (folder, plan.identity),
        unit_cells=settings.unit_cells,
        max_failure_fraction=settings.max_failure_fraction,
        description="score noise",
        progress=progress,
    )
    return StageResult(
        stage=STAGE,
        units_computed=len(todo) - len(scored.set_aside),
        units_reused=len(units) - len(todo),
        set_aside=len(scored.set_aside),
        counts={"cells": scored.cells, "trained_on_each": plan.cells.height // 2},
        paths=(folder,),
        seconds=time.monotonic() - started,
    )


def plan_filter_noise(config: RunConfig, cohort: Cohort) -> list[PlanRow]:
    """Say whether the filter would be trained and which patients it would score; raises as `run_filter_noise`, but for stale output."""
    settings = config.filter_noise
    plan = plan_filter(settings, cohort)
    state = state_of(cohort.store, noise_folder(cohort, settings.name), plan.identity)
    why = {
        State.ABSENT: f"not trained: {plan.cells.height // 2} artefacts and as many other cells",
        State.STALE: "trained with other settings, labels or embeddings: needs --force",
        State.COMPLETE: "trained on these labels",
    }
    rows = [PlanRow("filter", state, why[state])]
    reasons = {State.ABSENT: "not scored", State.STALE: "embedded anew: needs --force", State.COMPLETE: "scored"}
    for patient, (_, found) in _patients(settings, cohort, plan.identity).items():
        rows.append(PlanRow(patient, found, reasons[found]))
    return rows


def plan_filter(config: FilterNoiseConfig, cohort: Cohort) -> FilterPlan:
    """Choose the cells; the identity pins them, their labels and the embeddings of their patients; raises as `run_filter_noise`."""
    labelled = labelled_cells(cohort).of(TRAIN_ROLE)
    cells = choose_cells(labelled, per_class=config.per_class, seed=config.seed)
    inputs = {"labels": digest_labels(cells)}
    for patient in sorted(set(cells["patient"])):
        record = cohort.require(cohort.embeddings(config.encoder, patient), "embed")
        inputs[f"embeddings/{patient}"] = record.identity
    return FilterPlan(cells, inputs, identity_of(STAGE, config.identity(), inputs))


def fit_and_publish(
    store: Store, config: FilterNoiseConfig, cells: pa.Table, inputs: dict[str, str], identity: str
) -> None:
    """Read the chosen cells alone, fit, and write the filter. Runs on a worker.

    Raises:
        MissingInputError: a chosen cell has no embedding.
    """
    started = time.monotonic()
    cohort, frame = Cohort(store), pl.DataFrame(pl.from_arrow(cells))
    ids, vectors = read_selected(cohort, config.encoder, set(frame["patient"]), frame["cell_id"].to_list())
    if ids != frame["cell_id"].to_list():
        lost = sorted(set(frame["cell_id"]) - set(ids))
        raise MissingInputError(
            f"{len(lost)} labelled cells, the first {lost[0]}, have no embedding: run `ctc-ray embed {store.uri}`"
        )
    is_noise = frame["is_noise"].to_numpy()
    fitted = NoiseFilter.fit(
        vectors,
        is_noise,
        pca_dim=config.pca_dim,
        svm_c=config.svm_c,
        folds=config.calibration_folds,
        seed=config.seed,
    )
    counts = {"noise": int(is_noise.sum()), "clean": int((~is_noise).sum())}
    accuracy = float(np.mean((fitted.probability(vectors) >= 0.5) == is_noise))
    summary = {**counts, "pca_dim": len(fitted.classifier.pca.components), "accuracy_on_its_own_cells": accuracy}
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
    files = {
        MODEL_FILE: fitted.to_bytes(),
        SUMMARY_FILE: json.dumps(summary, indent=1, sort_keys=True).encode() + b"\n",
    }
    publish(store, noise_folder(cohort, config.name), files, record)


def _patients(config: FilterNoiseConfig, cohort: Cohort, identity: str) -> dict[str, tuple[PatientJob, State]]:
    """Embedded patient -> what to do and where it stands; scores of a former filter count as absent."""
    units = {}
    for patient, embedded in embedded_patients(cohort, config.encoder).items():
        inputs = {"filter": identity, "embeddings": embedded}
        record = Record(STAGE, patient, identity_of(f"{STAGE}-cells", {}, inputs), {}, inputs)
        output = f"{noise_folder(cohort, config.name)}/{patient}"
        state = state_of(cohort.store, output, record.identity)
        if state is State.STALE:
            former = read_record(cohort.store, output)
            if former is not None and former.inputs.get("filter") != identity:
                state = State.ABSENT
        units[patient] = (PatientJob(cohort.embeddings(config.encoder, patient), output, record), state)
    return units


@lru_cache(maxsize=1)
def _loaded(store_uri: str, folder: str, identity: str) -> NoiseFilter:
    """A worker loads a filter once; the identity makes one that was trained anew another one."""
    return read_noise_filter(Store(store_uri), folder)


def score_cells(
    store: Store, patient: str, cell_ids: list[str], vectors_ND: Float32, folder: str, identity: str
) -> pa.Table:
    """Score a slice of a patient's cells with the filter of a folder. Runs on a worker."""
    return _loaded(store.address, folder, identity).table(cell_ids, vectors_ND)


def read_noise_filter(store: Store, folder: str) -> NoiseFilter:
    """Read the filter of a folder; raises SchemaError where its file is damaged."""
    path = f"{folder}/{MODEL_FILE}"
    return NoiseFilter.from_bytes(store.read_bytes(path), store.describe(path))


def load_noise_filter(cohort: Cohort, name: str) -> NoiseFilter:
    """Load a trained noise filter by name.

    Raises:
        MissingInputError: it was not trained; the message names the command.
        SchemaError: its file is damaged.
    """
    folder = noise_folder(cohort, name)
    cohort.require(folder, STAGE)
    return read_noise_filter(cohort.store, folder)
