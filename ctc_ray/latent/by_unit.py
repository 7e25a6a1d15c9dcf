"""Work on embeddings slice by slice: a patient of a million cells keeps all workers busy, and a killed run goes on where it was.

Each unit (a slice of a shard) becomes a part on a worker; when a patient's last part is there, a worker joins the parts to
shards named like those of the embeddings, and writes the patient's record.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from ctc_ray.cohort import Cohort
from ctc_ray.embed.units import PARTS, Unit, consolidate, finished_parts, parts_folder, units_of
from ctc_ray.errors import CtcRayError, TooManyFailuresError
from ctc_ray.labels.patients import process_identity, run_over
from ctc_ray.latent.embeddings import Float32, vectors_of
from ctc_ray.pretrain.slices import Slice, read_slice
from ctc_ray.progress import Progress
from ctc_ray.records import FailureRow, Record, WorkerTally, read_record, write_failures, write_record
from ctc_ray.storage import Store

Compute = Callable[..., pa.Table]
"""`(store, patient, cell_ids, vectors_ND, *arguments) -> table`, one row a cell, in the same order; a module-level function."""


@dataclass(frozen=True)
class PatientJob:
    """One patient to work on.

    Attributes:
        source: folder of the patient's embeddings.
        output: folder to write to.
        record: what the record will hold; files, counts, seconds, units and workers are filled in.
    """

    source: str
    output: str
    record: Record

    @property
    def patient(self) -> str:
        """The patient's id."""
        return self.record.unit


@dataclass(frozen=True)
class Outcome:
    """What was done: cells of the finished patients, and the first reason of each that was set aside."""

    cells: int
    set_aside: dict[str, FailureRow] = field(default_factory=dict)


@dataclass(frozen=True)
class _Status:
    """What a worker says about one unit."""

    node: str
    pid: int
    failure: FailureRow | None


def run_by_unit(
    cohort: Cohort,
    jobs: Sequence[PatientJob],
    compute: Compute,
    arguments: tuple[Any, ...],
    *,
    unit_cells: int,
    max_failure_fraction: float,
    description: str,
    progress: Progress | None = None,
) -> Outcome:
    """Compute a table for every cell of some patients.

    Args:
        cohort: where embeddings lie and output goes.
        jobs: patients, each with a folder and an identity of its own.
        compute: what makes a table of a slice.
        arguments: handed to `compute` behind the slice.
        unit_cells: cells a slice.
        max_failure_fraction: share of the patients that may be set aside.
        description: what the progress line says.
        progress: where progress goes.

    Returns:
        Cells, and patients that were set aside: their failures lie in `failures/<stage>/`, the others are complete.

    Raises:
        TooManyFailuresError: more patients than that were set aside; all others are complete.
    """
    started = time.monotonic()
    states = [_open(cohort, job, unit_cells) for job in jobs]
    for state in states:
        if not state.waiting and not state.failures:
            _finish(cohort, state, started)
    calls = [(cohort.store, unit, compute, arguments) for state in states for unit in state.missing]
    owner = [state for state in states for _ in state.missing]
    names = [state.job.patient for state in owner]
    for index, status in run_over(compute_unit, calls, description=description, progress=progress, names=names):
        state = owner[index]
        state.add(calls[index][1], status)
        if not state.waiting and not state.failures:
            _finish(cohort, state, started)
    for state in states:
        write_failures(cohort.store, state.job.record.stage, state.job.patient, state.failures)
    set_aside = {state.job.patient: state.failures[0] for state in states if state.failures}
    _refuse_many(set_aside, len(states), max_failure_fraction)
    return Outcome(sum(state.cells for state in states if not state.failures), set_aside)


@dataclass
class _State:
    """Progress of one patient."""

    job: PatientJob
    units: list[Unit]
    missing: list[Unit]
    waiting: set[str]
    tally: WorkerTally = field(default_factory=WorkerTally)
    failures: list[FailureRow] = field(default_factory=list)

    @property
    def cells(self) -> int:
        return sum(unit.stop - unit.start for unit in self.units)

    def add(self, unit: Unit, status: _Status) -> None:
        self.waiting.discard(unit.part)
        if status.failure is not None:
            self.failures.append(status.failure)
        else:
            self.tally.add(status.node, status.pid)


def _open(cohort: Cohort, job: PatientJob, unit_cells: int) -> _State:
    """Find what is missing; parts of an earlier run count where slices are the same."""
    folder = parts_folder(job.output, job.record.identity)
    try:
        units = units_of(cohort.store, job.patient, cohort.shards(job.source), folder, unit_cells)
    except CtcRayError as error:  # a shard that is no Parquet: of this patient alone
        return _State(job, [], [], set(), failures=[FailureRow(job.source, type(error).__name__, str(error))])
    present = finished_parts(cohort.store, folder)
    missing = [unit for unit in units if unit.part not in present]
    return _State(job, units, missing, {unit.part for unit in missing})


def compute_unit(store: Store, unit: Unit, compute: Compute, arguments: tuple[Any, ...]) -> _Status:
    """Read a slice, compute its table and write it as a part. Runs on a worker; a slice that cannot be read is reported."""
    node, pid = process_identity()
    try:
        cell_ids, vectors = read_unit(store, unit)
        store.write_table(unit.part, compute(store, unit.patient, cell_ids, vectors, *arguments))
    except CtcRayError as error:  # of this patient's data: the others go on
        return _Status(node, pid, FailureRow(unit.shard, type(error).__name__, str(error)))
    return _Status(node, pid, None)


def read_unit(store: Store, unit: Unit) -> tuple[list[str], Float32]:
    """Cell ids and embeddings (N, D) of a unit; raises as `embeddings.read_shard`."""
    table = read_slice(store, Slice(unit.shard, unit.start, unit.stop), ["cell_id", "embedding"])
    return table["cell_id"].to_pylist(), vectors_of(table, store.describe(unit.shard))


def _finish(cohort: Cohort, state: _State, started: float) -> None:
    """Join a patient's parts on a worker, write the record last, remove the parts."""
    job = state.job
    former = read_record(cohort.store, job.output)
    call = (cohort.store, job.output, state.units)
    ((_, sizes),) = run_over(consolidate, [call], description="join")
    record = dataclasses.replace(
        job.record,
        files=sizes,
        counts={**job.record.counts, "cells": state.cells},
        seconds=time.monotonic() - started,
        units_computed=len(state.missing),
        units_reused=len(state.units) - len(state.missing),
        workers=state.tally.rows(),
    )
    write_record(cohort.store, job.output, record)
    for name in sorted(set(former.files if former else ()) - set(sizes)):
        cohort.store.delete(f"{job.output}/{name}")
    cohort.store.delete_folder(f"{job.output}/{PARTS}")


def _refuse_many(set_aside: dict[str, FailureRow], num_patients: int, fraction: float) -> None:
    if set_aside and (len(set_aside) == num_patients or len(set_aside) > fraction * num_patients):
        patient, first = min(set_aside.items())
        raise TooManyFailuresError(
            f"{len(set_aside)} of {num_patients} patients were set aside, more than max_failure_fraction = {fraction} allows. "
            f"The first, {patient!r}: {first.message} (all are listed in failures/)"
        )
