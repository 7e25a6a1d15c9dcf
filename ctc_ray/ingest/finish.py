"""Finishing a patient: its cells as `segment` does, then its vectors joined to shards that mirror those of the cells."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ctc_ray.cohort import Cohort
from ctc_ray.ingest.plan import VectorPlan
from ctc_ray.records import FailureRow, Record, read_record, write_failures, write_record
from ctc_ray.schema import embeddings_schema
from ctc_ray.segment.finish import finish_patient
from ctc_ray.segment.plan import PatientPlan, Settings, part_name
from ctc_ray.storage import Store


@dataclass(frozen=True)
class WorkDone:
    """What went into an output, for its record.

    Attributes:
        workers: rows of node, pid, units.
        seconds: worker seconds.
        units: fields that were computed.
    """

    workers: Sequence[dict[str, Any]] = ()
    seconds: float = 0.0
    units: int = 0


def finish_ingested(
    plan: PatientPlan,
    vectors: VectorPlan,
    settings: Settings,
    cohort: Cohort,
    cartridges: Store,
    *,
    failures: Sequence[FailureRow],
    segmented: WorkDone,
    embedded: WorkDone,
) -> str | None:
    """Write a patient's cells, then its embeddings; returns the patient where vectors are missing, so that `embed` is due."""
    finish_patient(
        plan,
        settings,
        cohort,
        cartridges,
        failures=failures,
        workers=segmented.workers,
        seconds=segmented.seconds,
    )
    return join_vectors(cohort, vectors, embedded)


def join_vectors(cohort: Cohort, plan: VectorPlan, done: WorkDone) -> str | None:
    """Join the vectors of single fields to shards that mirror those of the finished cells; the record comes last.

    Shards of embeddings that are added to stay as they are where they hold exactly the cells of the shard they mirror.

    Args:
        cohort: with the cells finished.
        plan: of the patient.
        done: what this run embedded.

    Returns:
        None where the embeddings are complete; the patient where some vector is missing, nothing then being finished.
    """
    store, folder = cohort.store, cohort.cells(plan.patient)
    former = read_record(store, plan.output)
    may_stay = former.files if former and former.identity in (plan.identity, plan.extends) else {}
    files, cells, num_kept = {}, 0, 0
    for shard in cohort.shards(folder):
        name = shard.rsplit("/", 1)[-1]
        table = store.read_table(shard, ["cell_id", "field"])
        cells += table.num_rows
        if name in may_stay and _mirrors(store, f"{plan.output}/{name}", may_stay[name], table):
            files[name], num_kept = may_stay[name], num_kept + 1
            continue
        joined = _joined(store, plan, pc.unique(table["field"]).to_pylist(), table["cell_id"])
        if joined is None:
            return plan.patient
        files[name] = store.write_table(f"{plan.output}/{name}", joined)
    if former and former.identity == plan.identity and former.files == files and num_kept == len(files):
        store.delete_folder(f"{plan.output}/_parts")  # an earlier attempt of this task came so far
        return None
    kept = former.units_computed + former.units_reused if former and num_kept else 0
    record = Record(
        stage="embed",
        unit=plan.patient,
        identity=plan.identity,
        config=dict(plan.settings),
        inputs=dict(plan.inputs),
        files=files,
        counts={"cells": cells},
        seconds=done.seconds,
        units_computed=done.units,
        units_reused=kept + len(plan.fields),
        workers=list(done.workers),
    )
    write_record(store, plan.output, record)
    for name in sorted(set(former.files if former else ()) - set(files)):
        store.delete(f"{plan.output}/{name}")
    store.delete_folder(f"{plan.output}/_parts")
    write_failures(store, "embed", plan.patient, [])
    return None


def _mirrors(store: Store, path: str, size: int, cells: pa.Table) -> bool:
    """Whether a shard of embeddings is as its record says, and holds the vectors of these cells in their order."""
    if store.size(path) != size:
        return False
    return bool(store.read_table(path, ["cell_id"])["cell_id"].equals(cells["cell_id"]))


def _joined(store: Store, plan: VectorPlan, fields: Iterable[int], cell_ids: pa.ChunkedArray) -> pa.Table | None:
    """Vectors of a shard's cells in their order; None where one is missing."""
    paths = [f"{plan.parts_folder}/{part_name(field)}" for field in fields]
    if not all(store.exists(path) for path in paths):
        return None
    tables = [store.read_table(path) for path in paths] or [embeddings_schema(plan.width).empty_table()]
    vectors = pa.concat_tables(tables).combine_chunks()
    if vectors["cell_id"].equals(cell_ids):
        return vectors
    places = pc.index_in(cell_ids, value_set=vectors["cell_id"])
    return None if places.null_count else vectors.take(places).combine_chunks()
