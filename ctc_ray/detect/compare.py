"""Stage `compare`: a detection run against CellSearch's events, one Ray task a patient, tables for the whole run."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import polars as pl
import pyarrow as pa

from ctc_ray.cluster import connect, worker_identity
from ctc_ray.cohort import Cohort
from ctc_ray.config import CompareConfig, RunConfig
from ctc_ray.detect.comparison import (
    JUDGEMENTS_FRAME,
    MATCHES_FRAME,
    PPV_FRAME,
    PatientInput,
    describe_events,
    judge_by_labels,
    judge_by_truth,
    match_events,
    matches_frame,
    sensitivity_rows,
    summarise_patient,
    total_row,
)
from ctc_ray.detect.events import digest_events, find_events_file, read_gallery
from ctc_ray.detect.fan_out import fan_out
from ctc_ray.detect.stage import detected_patients, patient_folder, refuse_many_failures, table_frame
from ctc_ray.errors import CtcRayError, MissingInputError, StaleOutputError
from ctc_ray.labels.consensus import digest_labels, read_labels
from ctc_ray.phantom.kinds import CTC_KINDS
from ctc_ray.progress import Progress
from ctc_ray.records import (
    FailureRow,
    PlanRow,
    Record,
    StageResult,
    State,
    WorkerTally,
    damaged_files,
    digest_of,
    identity_of,
    publish,
    read_record,
    write_failures,
)
from ctc_ray.schema import MATCHES_SCHEMA, TRUTH_SCHEMA, check_columns
from ctc_ray.storage import Store

STAGE = "compare"
TRUTH_PATH = "truth.parquet"
TABLES = ("matches", "ppv", "judgements", "events", "sensitivity")
"""Files `<table>.parquet` of `detections/<name>/`."""
_DETECTION_COLUMNS = ["cell_id", "field", "row", "col", "area_px"]


@dataclasses.dataclass(frozen=True)
class CompareUnit:
    """One patient to compare: its event file and the digest of all that its rows depend on."""

    patient: str
    events_path: str
    digest: str


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What a task reports: small tables of one patient (hundreds of rows), or why there are none."""

    patient: str
    tables: dict[str, pa.Table]
    node: str
    pid: int
    failure: FailureRow | None = None
    set_aside: tuple[FailureRow, ...] = ()
    """Records of the event file that are no usable events."""


@dataclasses.dataclass(frozen=True)
class _Work:
    """Units to compute, patients whose rows stay, those of them whose folder is here, and patients that cannot be compared."""

    todo: list[CompareUnit]
    kept: dict[str, str]
    seen: list[CompareUnit]
    failures: dict[str, FailureRow]
    stale: list[str]
    former: Record | None


def compare_patient(
    cohort: Cohort, cellsearch: Store, unit: CompareUnit, config: CompareConfig, events: pl.DataFrame
) -> dict[str, pa.Table]:
    """Compare one patient; returns the rows of each table of TABLES.

    Args:
        cohort: with a finished detection run.
        cellsearch: where the patient's folder and `truth.parquet` lie.
        unit: the patient.
        config: of the comparison.
        events: of the patient, columns of EVENTS_FRAME.

    Raises:
        SchemaError: a table does not have its columns.
    """
    given = _gather(cohort, cellsearch, unit.patient, events, config)
    rule = {"tolerance_px": config.tolerance_px, "min_overlap": config.min_overlap}
    matched = match_events(given.candidates, given.detections, given.events, **rule)
    described = describe_events(given)
    judgements = given.judgements.with_columns(patient=pl.lit(unit.patient)).select(list(JUDGEMENTS_FRAME))
    return {
        "matches": check_columns(matches_frame(given, matched).to_arrow(), MATCHES_SCHEMA, "matches"),
        "ppv": pl.DataFrame([summarise_patient(given, matched, described)], schema=PPV_FRAME).to_arrow(),
        "judgements": judgements.to_arrow(),
        "events": described.to_arrow(),
        "sensitivity": pl.DataFrame(sensitivity_rows(given, **rule)).to_arrow(),
    }


def _gather(
    cohort: Cohort, cellsearch: Store, patient: str, events: pl.DataFrame, config: CompareConfig
) -> PatientInput:
    folder = patient_folder(cohort, config.name, patient)
    candidates = table_frame(cohort.store.read_table(f"{folder}/candidates.parquet"))
    scores = table_frame(cohort.store.read_table(f"{folder}/scores.parquet"))
    detections = (
        table_frame(cohort.read_columns(cohort.cells(patient), _DETECTION_COLUMNS))
        .join(cohort.physical_ids(patient), on="cell_id", how="inner", maintain_order="left")
        .join(scores, on="cell_id", how="left", maintain_order="left")
        .with_columns(diameter_px=(pl.col("area_px").cast(pl.Float64) * 4 / np.pi).sqrt())
    )
    parts = [pl.DataFrame(schema={name: JUDGEMENTS_FRAME[name] for name in ("cell_id", "is_ctc", "judged_by")})]
    truth, labels = _judges(cohort, cellsearch)
    if patient in labels:
        parts.append(judge_by_labels(candidates, labels[patient]))
    if patient in truth:
        kinds = [str(kind) for kind in CTC_KINDS]
        known = judge_by_truth(candidates, detections, truth[patient], kinds, config.truth_radius_px)
        parts.append(known.join(parts[-1], on="cell_id", how="anti"))
    return PatientInput(patient, candidates, detections, events, pl.concat(parts))


def _judges(cohort: Cohort, cellsearch: Store) -> tuple[dict[str, pl.DataFrame], dict[str, pl.DataFrame]]:
    """Ground truth (TRUTH_SCHEMA) and consensus labels (cell_id, label) by patient; patients that have none are left out."""
    truth: dict[str, pl.DataFrame] = {}
    if cellsearch.exists(TRUTH_PATH):
        table = check_columns(cellsearch.read_table(TRUTH_PATH), TRUTH_SCHEMA, cellsearch.describe(TRUTH_PATH))
        truth = _by_patient(table_frame(table))
    labels = {patient: rows.select("cell_id", "label") for patient, rows in _by_patient(read_labels(cohort)).items()}
    return truth, labels


def _by_patient(frame: pl.DataFrame) -> dict[str, pl.DataFrame]:
    return {str(key[0]): rows for key, rows in frame.partition_by("patient", as_dict=True).items()}


def _compare_on_worker(cohort: Cohort, cellsearch: Store, unit: CompareUnit, config: CompareConfig) -> Comparison:
    """Compare one patient on a worker; what is wrong with that patient alone comes back as a failure."""
    node, pid = worker_identity()
    try:
        gallery = read_gallery(cellsearch, unit.events_path)
        tables = compare_patient(cohort, cellsearch, unit, config, gallery.events)
        return Comparison(unit.patient, tables, node, pid, set_aside=gallery.set_aside)
    except CtcRayError as error:
        return Comparison(unit.patient, {}, node, pid, _failure(cellsearch, unit.events_path, error))


def _failure(cellsearch: Store, source: str, error: CtcRayError) -> FailureRow:
    return FailureRow(source=cellsearch.describe(source), kind=type(error).__name__, message=str(error))


def run_compare(
    config: RunConfig, cohort: Cohort, *, cellsearch: str, force: bool = False, progress: Progress
) -> StageResult:
    """Compare a detection run with CellSearch: matches, the paper's Table 2, and how far both depend on the tolerance.

    Patients that were compared before keep their rows where their inputs are the same, or where `cellsearch` has no folder of
    theirs (cartridges that came in several deliveries); new ones are added.

    Args:
        config: section `compare` is used.
        cohort: with a finished detection run.
        cellsearch: folder (or URI) with one folder a patient that holds its event xml, and optionally `truth.parquet`.
        force: replace a comparison made with other settings or other inputs.
        progress: where progress goes.

    Returns:
        Counts of the table's last row; units are patients. A patient whose xml is missing or broken is set aside; a single
        event that cannot be read is left out and listed in `failures/compare/<patient>.parquet`.

    Raises:
        MissingInputError: there is no finished detection run of that name.
        StaleOutputError: a comparison with other settings or inputs is there and `force` is not set.
        TooManyFailuresError: more patients failed than `compare.max_failure_fraction` allows; nothing is replaced.
    """
    started = time.monotonic()
    settings, source = config.compare, Store(cellsearch)
    folder = cohort.detection(settings.name)
    work = _find_work(settings, cohort, source, force=force)
    if work.stale:
        raise StaleOutputError(
            f"{cohort.store.describe(folder)} holds a comparison made with other settings or other inputs "
            f"(patients {', '.join(work.stale)}). Run `ctc-ray compare` again with --force to replace it"
        )
    failures, finished, tally = dict(work.failures), dict(work.kept), WorkerTally()
    tables: dict[str, list[pa.Table]] = {name: [] for name in TABLES}
    aside = {unit.patient: read_gallery(source, unit.events_path).set_aside for unit in work.seen}
    if work.todo:
        digests = {unit.patient: unit.digest for unit in work.todo}
        arguments = [(cohort, source, unit, settings) for unit in work.todo]
        with connect(config=config.ray), progress.task("compare", len(work.todo)) as task:
            for result in fan_out(_compare_on_worker, arguments):
                task.advance(note=result.patient)
                if result.failure:
                    failures[result.patient] = result.failure
                    continue
                finished[result.patient] = digests[result.patient]
                aside[result.patient] = result.set_aside
                tally.add(result.node, result.pid)
                for name in TABLES:
                    tables[name].append(result.tables[name])
    for patient in sorted({*failures, *aside}):
        write_failures(cohort.store, STAGE, patient, [failures[patient]] if patient in failures else aside[patient])
    refuse_many_failures(STAGE, failures, len(failures) + len(finished), settings.max_failure_fraction)
    record = work.former
    if record is None or work.todo or finished != record.inputs:
        seconds = time.monotonic() - started
        record = _publish(cohort, settings, work, tables, finished, tally, seconds)
    return StageResult(
        stage=STAGE,
        units_computed=len(finished) - len(work.kept),
        units_reused=len(work.kept),
        set_aside=len(failures),
        counts=record.counts | {"events_set_aside": sum(map(len, aside.values()))},
        paths=tuple(f"{folder}/{name}" for name in sorted(record.files)),
        seconds=time.monotonic() - started,
    )


def plan_compare(config: RunConfig, cohort: Cohort, *, cellsearch: str) -> list[PlanRow]:
    """Say for each patient what `run_compare` would do, and why; nothing is changed."""
    work = _find_work(config.compare, cohort, Store(cellsearch), force=False)
    rows = [PlanRow(patient, State.COMPLETE, "complete: nothing to do") for patient in work.kept]
    for unit in work.todo:
        stale = unit.patient in work.stale
        why = "made with other settings or other inputs: needs --force" if stale else "not compared yet"
        rows.append(PlanRow(unit.patient, State.STALE if stale else State.ABSENT, why))
    rows += [PlanRow(patient, State.ABSENT, f"cannot run: {row.message}") for patient, row in work.failures.items()]
    return sorted(rows, key=lambda row: row.unit)


def _find_work(config: CompareConfig, cohort: Cohort, cellsearch: Store, *, force: bool) -> _Work:
    patients = detected_patients(cohort, config.name)
    if not patients:
        raise MissingInputError(
            f"{cohort.store.describe(cohort.detection(config.name))} holds no candidates: "
            f"run `ctc-ray detect {cohort.store.uri}` first"
        )
    folder = cohort.detection(config.name)
    record = read_record(cohort.store, folder)
    usable = record is not None and not damaged_files(cohort.store, folder, record)
    former = record if usable else None
    same_settings = former is not None and former.config == config.identity()
    truth, labels = _judges(cohort, cellsearch)
    todo: list[CompareUnit] = []
    kept: dict[str, str] = {}
    seen: list[CompareUnit] = []
    failures: dict[str, FailureRow] = {}
    stale: list[str] = []
    here = {patient for patient in patients if cellsearch.exists(patient)}
    for patient in patients:
        known = former.inputs.get(patient) if former else None
        if here and patient not in here and known is not None and same_settings and not force:
            kept[patient] = known  # compared before, from another folder of cartridges
            continue
        try:
            unit = _unit(cohort, config, cellsearch, patient, truth.get(patient), labels.get(patient))
        except CtcRayError as error:
            failures[patient] = _failure(cellsearch, patient, error)
            continue
        if known == unit.digest and same_settings and not force:
            kept[patient] = unit.digest
            seen.append(unit)
            continue
        todo.append(unit)
        if known is not None and not force:
            stale.append(patient)
    return _Work(todo, kept, seen, failures, stale, former)


def _unit(
    cohort: Cohort,
    config: CompareConfig,
    cellsearch: Store,
    patient: str,
    truth: pl.DataFrame | None,
    labels: pl.DataFrame | None,
) -> CompareUnit:
    path = find_events_file(cellsearch, patient)
    record = cohort.require(patient_folder(cohort, config.name, patient), "detect")
    parts = [
        record.identity,
        digest_events(cellsearch, path),
        None if truth is None else digest_of(truth.sort("field", "row", "col").write_csv().encode()),
        None if labels is None else digest_labels(labels),
    ]
    return CompareUnit(patient, path, digest_of(parts))


def _publish(
    cohort: Cohort,
    config: CompareConfig,
    work: _Work,
    tables: dict[str, list[pa.Table]],
    finished: dict[str, str],
    tally: WorkerTally,
    seconds: float,
) -> Record:
    """Join the rows that stay with the new ones and write all tables, then the record."""
    folder = cohort.detection(config.name)
    frames: dict[str, pl.DataFrame] = {}
    for name in TABLES:
        parts = [table_frame(table) for table in tables[name]]
        if work.former and work.kept:
            old = table_frame(cohort.store.read_table(f"{folder}/{name}.parquet"))
            parts.insert(0, old.filter(pl.col("patient").is_in(list(work.kept))))
        frames[name] = pl.concat(parts, how="vertical_relaxed").sort("patient", maintain_order=True)
    frames["ppv"] = pl.concat([frames["ppv"], total_row(frames["ppv"])])
    total = frames["ppv"].row(-1, named=True)
    files: dict[str, bytes | pa.Buffer | pa.Table] = {f"{n}.parquet": f.to_arrow() for n, f in frames.items()}
    files["matches.parquet"] = check_columns(
        frames["matches"].select(list(MATCHES_FRAME)).to_arrow(), MATCHES_SCHEMA, folder
    )
    record = Record(
        stage=STAGE,
        unit=config.name,
        identity=identity_of(STAGE, config.identity(), finished),
        config=config.identity(),
        inputs=finished,
        counts={name: value for name, value in total.items() if name.startswith("num_") and value is not None},
        seconds=seconds,
        units_computed=len(finished) - len(work.kept),
        units_reused=len(work.kept),
        workers=tally.rows(),
    )
    return publish(cohort.store, folder, files, record)
