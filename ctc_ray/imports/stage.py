"""The stage `import-crops`: rows of a source through a pool of importing actors, complete per patient.

The driver holds the rows without their pixels, and sees one small status a part; workers read and write for themselves.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import polars as pl
import pyarrow as pa
import ray

from ctc_ray.cluster import worker_identity
from ctc_ray.cohort import Cohort
from ctc_ray.config import ImportCropsConfig, RunConfig
from ctc_ray.errors import CtcRayError, TooManyFailuresError, named_error
from ctc_ray.imports.convert import Conversion, convert_rows
from ctc_ray.imports.finish import PatientOutput, finish_patient
from ctc_ray.imports.given_labels import GivenLabels, write_given_labels
from ctc_ray.imports.pixels import reader_of
from ctc_ray.imports.plan import (
    STAGE,
    ImportUnit,
    PatientPlan,
    conversion_of,
    failed_rows,
    missing_units,
    plan_patients,
    refuse_stale,
    units_of,
)
from ctc_ray.imports.rows import NO_PATIENT, SourceRows, read_rows
from ctc_ray.imports.source import Source, open_source
from ctc_ray.progress import Progress
from ctc_ray.records import FailureRow, PlanRow, Record, StageResult, State, WorkerTally, read_record, write_failures
from ctc_ray.storage import Store

_MAX_BLOCKS = 1000
_REASONS = {
    State.ABSENT: "not imported yet",
    State.STALE: "its cells were made from other rows or settings, or by segment: --force replaces them",
    State.COMPLETE: "same rows and settings",
}


def plan_import_crops(
    config: RunConfig,
    cohort: Cohort,
    *,
    source: str,
    patients: Sequence[str] | None = None,
    retry_failed: bool = False,
) -> list[PlanRow]:
    """Say what `run_import_crops` would do for each patient; nothing is written and Ray is not started."""
    opened = open_source(source, config.import_crops)
    rows = read_rows(opened, config.import_crops)
    conversion = conversion_of(opened, config.import_crops, rows)
    plans = plan_patients(cohort, opened, rows, conversion, patients=patients, retry_failed=retry_failed)
    found = []
    for plan in plans:
        again = plan.is_open and plan.state is State.COMPLETE
        why = "its rows that were set aside are tried again" if again else _REASONS[plan.state]
        found.append(PlanRow(plan.patient, State.ABSENT if again else plan.state, f"{why}; {plan.rows.height} rows"))
    return found


def run_import_crops(
    config: RunConfig,
    cohort: Cohort,
    *,
    source: str,
    patients: Sequence[str] | None = None,
    force: bool = False,
    retry_failed: bool = False,
    progress: Progress,
) -> StageResult:
    """Bring the crops of a source in as cells of its patients, and its labels as events.

    Finished patients are skipped, interrupted ones go on from their finished parts, rows that cannot be imported are listed in
    `failures/import-crops/<patient>.parquet`.

    Args:
        config: section `import_crops` is used.
        cohort: where the cells go; it may be empty.
        source: path or URI of a table, npz or Parquet file, or of a folder of such files.
        patients: which of the source's; None for all.
        force: replace cells of other origin.
        retry_failed: import patients again of which rows were set aside.
        progress: where to report.

    Raises:
        MissingInputError: there is no such source.
        SchemaError: columns or arrays are missing, or hold what the settings do not explain.
        ConfigError: settings and source do not fit, or a named patient is unknown.
        StaleOutputError: a patient's cells were made otherwise, without `force`.
        TooManyFailuresError: more than `import_crops.max_failure_fraction` of the rows failed; all others are saved.
    """
    started = time.monotonic()
    section = config.import_crops
    opened = open_source(source, section)
    rows = read_rows(opened, section)
    write_failures(cohort.store, STAGE, NO_PATIENT, rows.failures.get(NO_PATIENT, []))
    conversion = conversion_of(opened, section, rows)
    plans = plan_patients(cohort, opened, rows, conversion, patients=patients, retry_failed=retry_failed)
    refuse_stale(cohort, plans, force=force)
    cohort.add_patients({plan.patient: opened.name for plan in plans})
    for plan in plans:
        if not plan.is_open:
            cohort.store.delete_folder(
                f"{cohort.cells(plan.patient)}/_parts"
            )  # left where a run was killed after its record
    computed = _Import(cohort, opened, conversion, plans, progress).run()
    labels = [write_given_labels(cohort, plan, section, opened.name) for plan in plans]
    return _result(section, cohort, rows, plans, labels, computed, time.monotonic() - started)


class _ImportActor:
    """Holds the source open and imports one unit a call."""

    def __init__(self, store: Store, source: Source, conversion: Conversion) -> None:
        self._store, self._conversion = store, conversion
        self._reader = reader_of(source, conversion.section)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Import the units of a batch (one), and report a status row for each part."""
        node, pid = worker_identity()
        answers: list[dict[str, Any]] = []
        for unit in batch.to_pylist():
            rows, parts = pl.read_ipc(io.BytesIO(unit["rows"])), json.loads(unit["parts"])
            kind, message = "", ""
            try:
                convert_rows(self._store, rows, parts, self._reader, self._conversion)
            except CtcRayError as error:
                # A part that cannot be written must not hide what the others did; the driver reports it.
                kind, message = type(error).__name__, str(error)
            base = {"node": node, "pid": pid, "kind": kind, "message": message}
            answers += [{"patient": patient, "part": path, **base} for patient, path in parts.items()]
        return pa.Table.from_pylist(answers)


class _Import:
    """Run the missing units and finish each patient as soon as its last part is there."""

    def __init__(
        self, cohort: Cohort, source: Source, conversion: Conversion, plans: Sequence[PatientPlan], progress: Progress
    ) -> None:
        self._cohort, self._source, self._conversion, self._progress = cohort, source, conversion, progress
        self._open = {plan.patient: plan for plan in plans if plan.is_open}
        units = units_of(source, plans, conversion.section.unit_cells)
        self._parts: dict[str, list[str]] = {patient: [] for patient in self._open}
        for unit in units:
            for patient, path in unit.parts.items():
                self._parts[patient].append(path)
        present = {
            path for plan in self._open.values() for path in cohort.store.list_files(plan.parts_folder, ".parquet")
        }
        self._missing = missing_units(units, present)
        self._waiting = {patient: set(paths) - present for patient, paths in self._parts.items()}
        self._computed = {patient: len(waiting) for patient, waiting in self._waiting.items()}
        self._tallies = {patient: WorkerTally() for patient in self._open}
        self._started = time.monotonic()

    def run(self) -> int:
        """Returns the number of parts written."""
        for patient in [name for name, waiting in self._waiting.items() if not waiting]:
            self._finish(patient)
        if not self._missing:
            return 0
        errors: list[CtcRayError] = []
        with self._progress.task("import-crops", total=sum(self._computed.values())) as task:
            for status in _statuses(self._cohort, self._source, self._conversion, self._missing):
                patient = status["patient"]
                if status["kind"]:
                    errors.append(named_error(status["kind"], status["message"]))
                    continue
                self._waiting[patient].discard(status["part"])
                self._tallies[patient].add(status["node"], status["pid"])
                if not self._waiting[patient]:
                    self._finish(patient)
                task.advance(note=f"patient {patient}")
        if errors:
            raise errors[0]
        return sum(self._computed.values())

    def _finish(self, patient: str) -> None:
        """Join a patient's parts in a worker; it needs a processor for moments only, and the pool may hold them all."""
        plan = self._open[patient]
        output = PatientOutput(
            patient,
            plan.settings,
            plan.inputs,
            tuple(self._parts[patient]),
            plan.refused,
            self._computed[patient],
            time.monotonic() - self._started,
            tuple(self._tallies[patient].rows()),
        )
        as_remote: Any = ray.remote(num_cpus=0, max_retries=2)
        ray.get(as_remote(finish_patient).remote(self._cohort, output))


def _statuses(
    cohort: Cohort, source: Source, conversion: Conversion, units: Sequence[ImportUnit]
) -> Iterator[dict[str, Any]]:
    """Stream the units through the actors; yields one status a part as it is written."""
    largest = min(conversion.section.num_actors, len(units))
    # One processor stays free for the rest of the plan: a pool that waits for the last one waits for ever.
    free = max(1, int(ray.cluster_resources().get("CPU", 1)) - 1)  # type: ignore[no-untyped-call]  # Ray has none there
    pool = ray.data.ActorPoolStrategy(min_size=1, max_size=largest, initial_size=min(largest, free))
    a_block = -(-len(units) // _MAX_BLOCKS)
    blocks = [pa.Table.from_pylist([_row(u) for u in units[i : i + a_block]]) for i in range(0, len(units), a_block)]
    dataset = ray.data.from_arrow(blocks).map_batches(
        _ImportActor,
        fn_constructor_args=(cohort.store, source, conversion),
        batch_size=1,
        batch_format="pyarrow",
        compute=pool,
        num_cpus=1,
    )
    batch: Any
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from batch.to_pylist()


def _row(unit: ImportUnit) -> dict[str, Any]:
    sink = io.BytesIO()
    unit.rows.write_ipc(sink)
    return {"rows": sink.getvalue(), "parts": json.dumps(unit.parts)}


def _result(
    section: ImportCropsConfig,
    cohort: Cohort,
    rows: SourceRows,
    plans: Sequence[PatientPlan],
    labels: Sequence[GivenLabels],
    computed: int,
    seconds: float,
) -> StageResult:
    records = {plan.patient: read_record(cohort.store, cohort.cells(plan.patient)) for plan in plans}
    refused: list[FailureRow] = [row for plan in plans for row in plan.refused]
    refused += rows.failures.get(NO_PATIENT, [])
    failed = len(refused) + sum(failed_rows(record) for record in records.values())
    total = len(refused) + sum(plan.rows.height for plan in plans)
    if failed > section.max_failure_fraction * total:
        raise TooManyFailuresError(
            f"{failed} of {total} rows could not be imported, more than import_crops.max_failure_fraction = "
            f"{section.max_failure_fraction:g} allows. All others are saved; the reasons are in "
            f"{cohort.store.describe(f'failures/{STAGE}')}. Mend the source and run again with --retry-failed"
        )
    known: list[Record] = [record for record in records.values() if record is not None]
    units = sum(record.units_computed + record.units_reused for record in known)
    unknown = sum(given.unknown for given in labels)
    counts = {
        "patients": len(plans),
        "cells": sum(record.counts.get("cells", 0) for record in known),
        "failed": failed,
        "labels": sum(given.written + given.there for given in labels),
        "unknown_labels": unknown,
    }
    paths = tuple(cohort.cells(plan.patient) for plan in plans)
    return StageResult(STAGE, computed, units - computed, failed + unknown, counts, paths, seconds)
