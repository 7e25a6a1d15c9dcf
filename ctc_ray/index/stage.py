"""The index stage: one flat FAISS index over all embedded patients; new patients are added, nothing is built twice."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa

from ctc_ray.cohort import Cohort
from ctc_ray.config import IndexConfig, RunConfig
from ctc_ray.errors import MissingInputError, SchemaError, StaleOutputError
from ctc_ray.index.build import CELLS_FILE, INDEX_FILE, new_index, open_index, prepared, serialise, stored_vectors
from ctc_ray.labels.patients import process_identity, run_over
from ctc_ray.latent.embeddings import embedded_patients, iterate_shards
from ctc_ray.progress import Progress
from ctc_ray.records import PlanRow, Record, StageResult, State, damaged_files, identity_of, publish, read_record
from ctc_ray.storage import Store

STAGE = "index"
CELLS_SCHEMA = pa.schema(
    [
        ("position", pa.int64()),
        ("cell_id", pa.string()),
        ("patient", pa.string()),
        ("physical_id", pa.string()),
        ("field", pa.int16()),
        ("row", pa.float32()),
        ("col", pa.float32()),
        ("cluster", pa.int16()),
    ]
)
"""Which cell stands at which position of the index; `cluster` is null, since an index belongs to no latent map."""


@dataclass(frozen=True)
class IndexPlan:
    """Embedded patients, those already indexed, and where the index stands."""

    embedded: dict[str, str]
    indexed: dict[str, str]
    state: State


def run_index(
    config: RunConfig, cohort: Cohort, *, force: bool = False, progress: Progress | None = None
) -> StageResult:
    """Build the index, or add the patients that it lacks.

    Args:
        config: section `index`.
        cohort: embedded.
        force: build anew where the metric or the embeddings of an indexed patient changed.
        progress: where progress goes.

    Returns:
        Patients added and patients already there; counts of cells.

    Raises:
        MissingInputError: no patient is embedded.
        StaleOutputError: the index was made with another metric or other embeddings, and `force` is not set.
    """
    started = time.monotonic()
    settings = config.index
    plan = plan_of(settings, cohort)
    folder = cohort.index(settings.encoder)
    if plan.state is State.STALE and not force:
        raise StaleOutputError(
            f"{cohort.store.describe(folder)} was built with another metric or from other embeddings. Run again with --force"
        )
    kept = plan.indexed if plan.state is State.COMPLETE else {}
    added = [patient for patient in plan.embedded if patient not in kept]
    if added:
        call = (cohort.store, settings, kept, {patient: plan.embedded[patient] for patient in added})
        list(run_over(build_and_publish, [call], description="build the index", progress=progress))
    record = cohort.require(folder, STAGE)
    return StageResult(
        STAGE, len(added), len(kept), 0, {"cells": record.counts["cells"]}, (folder,), time.monotonic() - started
    )


def plan_index(config: RunConfig, cohort: Cohort) -> list[PlanRow]:
    """Say which patients would be added; raises MissingInputError as `run_index`."""
    plan = plan_of(config.index, cohort)
    rows = []
    for patient in plan.embedded:
        if plan.state is State.STALE:
            rows.append(PlanRow(patient, State.STALE, "indexed with another metric or from other embeddings"))
        elif plan.state is State.COMPLETE and patient in plan.indexed:
            rows.append(PlanRow(patient, State.COMPLETE, "indexed"))
        else:
            rows.append(PlanRow(patient, State.ABSENT, "not in the index"))
    return rows


def plan_of(config: IndexConfig, cohort: Cohort) -> IndexPlan:
    """Compare the index with the embeddings of now; raises MissingInputError as `run_index`."""
    embedded = embedded_patients(cohort, config.encoder)
    if not embedded:
        raise MissingInputError(
            f"{cohort.store.uri} has no embeddings by encoder {config.encoder!r}: run `ctc-ray embed {cohort.store.uri}` first"
        )
    folder = cohort.index(config.encoder)
    record = read_record(cohort.store, folder)
    if record is None or damaged_files(cohort.store, folder, record):
        return IndexPlan(embedded, {}, State.ABSENT)
    same = record.identity == identity_of(STAGE, config.identity(), record.inputs)
    unchanged = all(embedded.get(patient) == identity for patient, identity in record.inputs.items())
    return IndexPlan(embedded, record.inputs, State.COMPLETE if same and unchanged else State.STALE)


def build_and_publish(store: Store, config: IndexConfig, kept: dict[str, str], added: dict[str, str]) -> int:
    """Add patients to the index (or to none), shard by shard, and write it. Runs on a worker; returns the cells it holds."""
    started = time.monotonic()
    cohort = Cohort(store)
    folder = cohort.index(config.encoder)
    index, tables = None, []
    if kept:
        former = open_index(store, f"{folder}/{INDEX_FILE}")
        index = new_index(former.d, config.metric)
        index.add(stored_vectors(former))
        tables.append(store.read_table(f"{folder}/{CELLS_FILE}"))
    for patient in added:
        places = _places(cohort, patient)
        for name, ids, vectors in iterate_shards(cohort, config.encoder, patient):
            if not ids:
                continue
            where = f"{cohort.embeddings(config.encoder, patient)}/{name}"
            if index is None:
                index = new_index(vectors.shape[1], config.metric)
            if vectors.shape[1] != index.d:
                raise SchemaError(f"{where}: embeddings are {vectors.shape[1]} wide, the index {index.d}: embed again")
            tables.append(_rows(ids, patient, places, index.ntotal))
            index.add(prepared(vectors, config.metric, where))
    if index is None:
        raise MissingInputError(f"{store.uri}: the embeddings by {config.encoder!r} hold no cells: nothing to index")
    node, pid = process_identity()
    inputs = {**kept, **added}
    record = Record(
        stage=STAGE,
        unit=config.encoder,
        identity=identity_of(STAGE, config.identity(), inputs),
        config=config.identity(),
        inputs=inputs,
        counts={"cells": int(index.ntotal), "patients": len(inputs)},
        seconds=time.monotonic() - started,
        units_computed=len(added),
        units_reused=len(kept),
        workers=[{"node": node, "pid": pid, "units": len(added)}],
    )
    publish(store, folder, {INDEX_FILE: serialise(index), CELLS_FILE: pa.concat_tables(tables)}, record)
    return int(index.ntotal)


def _places(cohort: Cohort, patient: str) -> pl.DataFrame:
    """Columns cell_id, physical_id, field, row, col of a patient's cells."""
    cohort.require(cohort.cells(patient), "segment")
    cells = pl.DataFrame(pl.from_arrow(cohort.read_columns(cohort.cells(patient), ["cell_id", "field", "row", "col"])))
    return cells.join(cohort.physical_ids(patient), on="cell_id", how="left")


def _rows(ids: list[str], patient: str, places: pl.DataFrame, first: int) -> pa.Table:
    """Rows of `cells.parquet` for one shard, positions from `first` on."""
    wanted = pl.DataFrame({"cell_id": ids}, schema={"cell_id": pl.String})
    joined = wanted.join(places, on="cell_id", how="left", maintain_order="left")
    frame = joined.with_columns(
        position=pl.Series(np.arange(first, first + len(ids))),
        patient=pl.lit(patient),
        physical_id=pl.coalesce("physical_id", "cell_id"),
        cluster=pl.lit(None, pl.Int16),
    )
    return frame.select(CELLS_SCHEMA.names).to_arrow().cast(CELLS_SCHEMA)
