"""The simulated expert: label events from the phantom's truth, one batch a patient."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
import pyarrow as pa

from ctc_ray.cohort import Cohort
from ctc_ray.config import LabelsConfig, RunConfig
from ctc_ray.errors import MissingInputError
from ctc_ray.labels.crops import digest_crops
from ctc_ray.labels.events import LabelEvent, batch_path, batch_state, events_table, write_batch
from ctc_ray.labels.labeller import SimulatedExpert
from ctc_ray.labels.patients import run_over
from ctc_ray.labels.truth import draw_cells, true_labels
from ctc_ray.progress import Progress
from ctc_ray.records import PlanRow, StageResult, State, digest_of, identity_of
from ctc_ray.schema import TRUTH_SCHEMA, check_columns
from ctc_ray.storage import Store

STAGE = "labels"
_CELL_COLUMNS = ["cell_id", "field", "row", "col"]
_FIRST_ANSWER = datetime(2000, 1, 1, tzinfo=UTC)
"""A fixed time, so that the same seed gives the same bytes; older than any human's answer."""


def simulate_expert(
    config: RunConfig,
    cohort: Cohort,
    truth: str,
    *,
    batch: str = "simulated",
    force: bool = False,
    progress: Progress | None = None,
) -> StageResult:
    """Let a simulated expert label cells of the patients of `config.labels.roles`.

    Args:
        config: section `labels` is used.
        cohort: segmented, and split into roles.
        truth: path or URI of the phantom's `truth.parquet`.
        batch: prefix of the batches, `labels/<batch>-<patient>.parquet`.
        force: replace batches made with other settings or from other cells.
        progress: where progress goes.

    Returns:
        Patients computed and reused; counts of cells with each label.

    Raises:
        MissingInputError: no truth, no patient of the roles, or one of them is not segmented.
        StaleOutputError: a batch was made with other settings, and `force` is not set.
    """
    started = time.monotonic()
    table = read_truth(truth)
    units = _units(config.labels, cohort, table, batch)
    todo = []
    for patient, identity in units.items():
        if batch_state(cohort, f"{batch}-{patient}", identity) is State.COMPLETE:
            continue
        rows = table.filter(pl.col("patient") == patient).to_arrow()
        todo.append((cohort.store, patient, rows, config.labels, f"{batch}-{patient}", identity, force))
    counts: dict[str, int] = {}
    for _, labels in run_over(
        label_patient, todo, description="simulated expert", progress=progress, names=[item[1] for item in todo]
    ):
        for label, number in labels.items():
            counts[label] = counts.get(label, 0) + number
    return StageResult(
        stage=STAGE,
        units_computed=len(todo),
        units_reused=len(units) - len(todo),
        counts=counts,
        paths=tuple(batch_path(f"{batch}-{patient}") for patient in units),
        seconds=time.monotonic() - started,
    )


def plan_simulate_expert(config: RunConfig, cohort: Cohort, truth: str, *, batch: str = "simulated") -> list[PlanRow]:
    """Say which patients the simulated expert would label; raises as `simulate_expert`."""
    rows = []
    for patient, identity in _units(config.labels, cohort, read_truth(truth), batch).items():
        state = batch_state(cohort, f"{batch}-{patient}", identity)
        why = {State.ABSENT: "not labelled", State.STALE: "labelled with other settings", State.COMPLETE: "labelled"}
        rows.append(PlanRow(patient, state, why[state]))
    return rows


def simulated_expert(
    config: LabelsConfig, cohort: Cohort, truth: str, patients: list[str], *, progress: Progress | None = None
) -> SimulatedExpert:
    """Make a labeller that can answer about every detection of some patients.

    Args:
        config: matching radius, error rate and seed.
        cohort: the patients are segmented.
        truth: path or URI of the phantom's `truth.parquet`.
        patients: whose cells it knows.
        progress: where progress goes.

    Raises:
        MissingInputError: no truth, or a patient is not segmented.
    """
    table = read_truth(truth)
    calls = []
    for patient in patients:
        cohort.require(cohort.cells(patient), "segment")
        rows = table.filter(pl.col("patient") == patient).to_arrow()
        calls.append((cohort.store, patient, rows, config.match_radius_px))
    answers: dict[str, str] = {}
    for _, known in run_over(
        answers_of_patient, calls, description="truth of cells", progress=progress, names=patients
    ):
        answers.update(known)
    return SimulatedExpert(answers, error_rate=config.error_rate, seed=config.seed)


def read_truth(truth: str) -> pl.DataFrame:
    """Read a phantom's `truth.parquet`: columns of `TRUTH_SCHEMA`.

    Raises:
        MissingInputError: it is not there.
        SchemaError: a column is missing.
    """
    folder, _, name = str(truth).rpartition("/")
    table = Store(folder or ".").read_table(name)
    return pl.DataFrame(pl.from_arrow(check_columns(table, TRUTH_SCHEMA, str(truth))))


def _units(config: LabelsConfig, cohort: Cohort, truth: pl.DataFrame, batch: str) -> dict[str, str]:
    """Patient -> identity of its batch."""
    patients = cohort.patients_by_role(*config.roles)
    if not patients:
        raise MissingInputError(
            f"{cohort.store.uri} has no patient of the roles {', '.join(config.roles)}: run `ctc-ray split {cohort.store.uri}` first"
        )
    settings = {name: value for name, value in config.identity().items() if name != "roles"}
    units = {}
    for patient in patients:
        record = cohort.require(cohort.cells(patient), "segment")
        rows = truth.filter(pl.col("patient") == patient)
        if rows.is_empty():
            raise MissingInputError(
                f"the truth table has no row of patient {patient!r}; it has {', '.join(sorted(set(truth['patient'])))}. "
                "Give the truth.parquet of the cartridges that were segmented"
            )
        content = digest_of(rows.select("field", "row", "col", "kind").sort(pl.all()).write_csv().encode())
        units[patient] = identity_of(STAGE, {**settings, "batch": batch}, {"cells": record.identity, "truth": content})
    return units


def _matched(store: Store, patient: str, truth: pa.Table, radius_px: float) -> pl.DataFrame:
    cohort = Cohort(store)
    cells = pl.DataFrame(pl.from_arrow(cohort.read_columns(cohort.cells(patient), _CELL_COLUMNS)))
    return true_labels(cells, pl.DataFrame(pl.from_arrow(truth)), radius_px)


def answers_of_patient(store: Store, patient: str, truth: pa.Table, radius_px: float) -> dict[str, str]:
    """cell_id -> true label of every detection of a patient."""
    labelled = _matched(store, patient, truth, radius_px)
    return dict(labelled.select("cell_id", "label").iter_rows())


def label_patient(
    store: Store, patient: str, truth: pa.Table, config: LabelsConfig, batch: str, identity: str, force: bool
) -> dict[str, int]:
    """Draw, answer and write the batch of one patient; returns label -> number of cells."""
    labelled = _matched(store, patient, truth, config.match_radius_px)
    drawn = draw_cells(labelled, per_patient=config.per_patient, balanced=config.balanced, seed=config.seed)
    known = dict(labelled.select("cell_id", "label").iter_rows())
    expert = SimulatedExpert(known, error_rate=config.error_rate, seed=config.seed)
    answers = expert.label(drawn["cell_id"].to_list())
    cohort = Cohort(store)
    digests = digest_crops(store, cohort.shards(cohort.cells(patient)), drawn["cell_id"].to_list())
    events = [
        _event(row, answer, patient, config, digests[row["cell_id"]], number)
        for number, (row, answer) in enumerate(zip(drawn.iter_rows(named=True), answers, strict=True))
    ]
    write_batch(cohort, batch, events_table(events), identity=identity, force=force)
    return {label: answers.count(label) for label in sorted(set(answers))}


def _event(
    row: dict[str, Any], answer: str, patient: str, config: LabelsConfig, digest: str, number: int
) -> LabelEvent:
    return LabelEvent(
        cell_id=row["cell_id"],
        patient=patient,
        field=row["field"],
        row=row["row"],
        col=row["col"],
        crop_sha=digest,
        label=answer,
        reader=config.reader,
        source="simulated",
        at=_FIRST_ANSWER + timedelta(seconds=config.seconds_per_cell * number),
        seconds=config.seconds_per_cell,
        strategy="initial",
    )
