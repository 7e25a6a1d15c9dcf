"""Stage `detect`: candidates of each patient, one Ray task and one record a patient."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import polars as pl
import pyarrow as pa

from ctc_ray.cluster import connect, worker_identity
from ctc_ray.cohort import Cohort
from ctc_ray.config import DetectConfig, RunConfig
from ctc_ray.detect.candidates import (
    SCORES_SCHEMA,
    ScoresEmbeddings,
    candidates_table,
    join_cells,
    score_shards,
    select_candidates,
)
from ctc_ray.detect.fan_out import fan_out
from ctc_ray.errors import ConfigError, CtcRayError, MissingInputError, SchemaError, TooManyFailuresError
from ctc_ray.progress import Progress
from ctc_ray.records import (
    FailureRow,
    PlanRow,
    Record,
    StageResult,
    State,
    identity_of,
    publish,
    require_fresh,
    state_of,
    write_failures,
)
from ctc_ray.schema import check_columns
from ctc_ray.storage import Store

STAGE = "detect"
_POSITIONS = ["cell_id", "patient", "field", "row", "col", "global_row", "global_col", "diameter_um"]


@dataclasses.dataclass(frozen=True)
class DetectUnit:
    """One patient to search: where from, with what, and the identity of the result."""

    patient: str
    encoder: str
    map_name: str
    inputs: dict[str, str]
    identity: str


@dataclasses.dataclass(frozen=True)
class PatientStatus:
    """What a task reports about its patient; no cells."""

    patient: str
    counts: dict[str, int]
    seconds: float
    failure: FailureRow | None = None


def patient_folder(cohort: Cohort, name: str, patient: str) -> str:
    """Folder of one patient's candidates."""
    return f"{cohort.detection(name)}/{patient}"


def detected_patients(cohort: Cohort, name: str) -> list[str]:
    """Patients of a detection run whose candidates are complete, sorted."""
    folders = cohort.store.list_folders(cohort.detection(name))
    return [patient for patient in folders if cohort.shards(patient_folder(cohort, name, patient))]


def detect_unit(config: DetectConfig, cohort: Cohort, patient: str) -> DetectUnit:
    """Work out what a patient's candidates depend on.

    Raises:
        MissingInputError: the classifier, or the patient's cells, embeddings or place on the map are not there.
        SchemaError: the classifier's record does not say which encoder and map it uses.
    """
    classifier = cohort.require(cohort.classifier(config.classifier), "train")
    encoder, map_name = classifier.config.get("encoder"), classifier.config.get("map")
    if not isinstance(encoder, str) or not isinstance(map_name, str):
        raise SchemaError(
            f"the record of classifier {config.classifier!r} names no encoder and map: train it again with --force"
        )
    inputs = {
        "classifier": classifier.identity,
        "cells": cohort.require(cohort.cells(patient), "segment").identity,
        "embeddings": cohort.require(cohort.embeddings(encoder, patient), "embed").identity,
        "latent": cohort.require(cohort.latent_cells(encoder, map_name, patient), "map").identity,
    }
    return DetectUnit(patient, encoder, map_name, inputs, identity_of(STAGE, config.identity(), inputs))


def find_candidates(
    cohort: Cohort, unit: DetectUnit, classifier: ScoresEmbeddings, config: DetectConfig
) -> dict[str, int]:
    """Search one patient and publish `candidates.parquet` and `scores.parquet`; returns counts."""
    started = time.monotonic()
    store, patient = cohort.store, unit.patient
    folder = patient_folder(cohort, config.name, patient)
    shards = cohort.shards(cohort.embeddings(unit.encoder, patient))
    scores = score_shards(
        classifier, ((store.describe(path), store.read_table(path, ["cell_id", "embedding"])) for path in shards)
    )
    clusters = cohort.read_columns(cohort.latent_cells(unit.encoder, unit.map_name, patient), ["cell_id", "cluster"])
    positions = table_frame(cohort.read_columns(cohort.cells(patient), _POSITIONS))
    cells = join_cells(positions, scores, table_frame(clusters), cohort.physical_ids(patient), patient)
    candidates = select_candidates(cells, config.threshold)
    counts = {
        "cells": cells.height,
        "detections": cells.filter(pl.col("probability") >= config.threshold).height,
        "candidates": candidates.height,
    }
    files = {
        "candidates.parquet": candidates_table(candidates, store.describe(folder)),
        "scores.parquet": check_columns(
            cells.select("cell_id", "probability").to_arrow(), SCORES_SCHEMA, store.describe(folder)
        ),
    }
    node, pid = worker_identity()
    record = Record(
        stage=STAGE,
        unit=patient,
        identity=unit.identity,
        config=config.identity(),
        inputs=unit.inputs,
        counts=counts,
        seconds=time.monotonic() - started,
        units_computed=max(1, len(shards)),
        workers=[{"node": node, "pid": pid, "units": max(1, len(shards))}],
    )
    publish(store, folder, files, record)
    return counts


def _detect_patient(store: Store, unit: DetectUnit, config: DetectConfig) -> PatientStatus:
    """Search one patient on a worker; what is wrong with that patient alone comes back as a failure."""
    from ctc_ray.classify import load_classifier

    started = time.monotonic()
    cohort = Cohort(store)
    try:
        counts = find_candidates(cohort, unit, load_classifier(cohort, config.classifier), config)
    except CtcRayError as error:
        failure = FailureRow(source=cohort.cells(unit.patient), kind=type(error).__name__, message=str(error))
        return PatientStatus(unit.patient, {}, time.monotonic() - started, failure)
    return PatientStatus(unit.patient, counts, time.monotonic() - started)


def run_detect(
    config: RunConfig, cohort: Cohort, *, patients: Sequence[str] | None = None, force: bool = False, progress: Progress
) -> StageResult:
    """Find the candidates of patients that the classifier has not seen.

    Args:
        config: section `detect` is used.
        cohort: with cells, embeddings, latent map and classifier.
        patients: patients to search; None: those of `detect.roles`.
        force: replace candidates of another configuration or other inputs.
        progress: where progress goes.

    Returns:
        Counts of cells, detections that reach the threshold and candidates over all patients of the run; units are patients.

    Raises:
        ConfigError: a named patient is not in the cohort, or no patient has the roles.
        MissingInputError: an earlier stage is not complete for one of the patients.
        StaleOutputError: candidates of another configuration are there and `force` is not set.
        TooManyFailuresError: more patients failed than `detect.max_failure_fraction` allows.
    """
    started = time.monotonic()
    settings = config.detect
    chosen = choose_patients(settings, cohort, patients)
    units = [detect_unit(settings, cohort, patient) for patient in chosen]
    folders = {unit.patient: patient_folder(cohort, settings.name, unit.patient) for unit in units}
    todo = [
        unit
        for unit in units
        if require_fresh(cohort.store, folders[unit.patient], unit.identity, force=force) is not State.COMPLETE
    ]
    failures: dict[str, FailureRow] = {}
    if todo:
        with connect(config=config.ray), progress.task("detect", len(todo)) as task:
            for status in fan_out(_detect_patient, [(cohort.store, unit, settings) for unit in todo]):
                write_failures(cohort.store, STAGE, status.patient, [status.failure] if status.failure else [])
                if status.failure:
                    failures[status.patient] = status.failure
                task.advance(note=status.patient)
    refuse_many_failures(STAGE, failures, len(units), settings.max_failure_fraction)
    records = [cohort.require(folders[unit.patient], STAGE) for unit in units if unit.patient not in failures]
    counts = {name: sum(r.counts[name] for r in records) for name in ("cells", "detections", "candidates")}
    return StageResult(
        stage=STAGE,
        units_computed=len(todo) - len(failures),
        units_reused=len(units) - len(todo),
        set_aside=len(failures),
        counts={"patients": len(records), **counts},
        paths=tuple(f"{folders[record.unit]}/candidates.parquet" for record in records),
        seconds=time.monotonic() - started,
    )


def plan_detect(config: RunConfig, cohort: Cohort, *, patients: Sequence[str] | None = None) -> list[PlanRow]:
    """Say for each patient what `run_detect` would do, and why; nothing is changed."""
    settings = config.detect
    rows = []
    for patient in choose_patients(settings, cohort, patients):
        try:
            unit = detect_unit(settings, cohort, patient)
        except MissingInputError as error:
            rows.append(PlanRow(patient, State.ABSENT, str(error)))
            continue
        state = state_of(cohort.store, patient_folder(cohort, settings.name, patient), unit.identity)
        why = {
            State.COMPLETE: "complete: nothing to do",
            State.STALE: "made with another classifier, other cells or another threshold: needs --force",
            State.ABSENT: "not searched yet",
        }[state]
        rows.append(PlanRow(patient, state, why))
    return rows


def choose_patients(config: DetectConfig, cohort: Cohort, patients: Sequence[str] | None) -> list[str]:
    """Patients of the run; raises ConfigError where a name is unknown or no patient has one of the roles."""
    chosen = cohort.select_patients(patients, *config.roles)
    if not chosen:
        raise ConfigError(
            f"no patient of {cohort.store.uri} has the role {' or '.join(config.roles)} (detect.roles): "
            "run `ctc-ray split`, or name patients with --patients"
        )
    return chosen


def refuse_many_failures(stage: str, failures: dict[str, FailureRow], num_units: int, fraction: float) -> None:
    """Raise TooManyFailuresError where all units failed, or a larger share than allowed."""
    if failures and (len(failures) == num_units or len(failures) > fraction * num_units):
        patient, first = min(failures.items())
        raise TooManyFailuresError(
            f"{stage}: {len(failures)} of {num_units} patients failed, more than {stage}.max_failure_fraction = {fraction} allows. "
            f"The first, {patient!r}: {first.message} (all are listed in failures/{stage}/)"
        )


def table_frame(table: pa.Table) -> pl.DataFrame:
    """View an Arrow table as a polars frame.

    Raises:
        SchemaError: it is a single column.
    """
    frame = pl.from_arrow(table)
    if not isinstance(frame, pl.DataFrame):
        raise SchemaError("expected a table, got a single column")
    return frame
