"""Read embeddings by shard, as ids and an array."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ctc_ray.cohort import Cohort
from ctc_ray.errors import SchemaError
from ctc_ray.records import read_record
from ctc_ray.storage import Store

Float32 = npt.NDArray[np.float32]


def read_shard(store: Store, path: str) -> tuple[list[str], Float32]:
    """Cell ids and embeddings (N, D) float32 of one shard.

    Raises:
        SchemaError: the embedding column is not a fixed-size list of floats.
    """
    table = store.read_table(path, ["cell_id", "embedding"])
    return table["cell_id"].to_pylist(), vectors_of(table, store.describe(path))


def vectors_of(table: pa.Table, where: str, column: str = "embedding") -> Float32:
    """Fixed-size list column of a table as (N, width) float32; raises as `read_shard`."""
    kind = table.schema.field(column).type
    if not pa.types.is_fixed_size_list(kind) or table[column].null_count:
        raise SchemaError(
            f"{where}: column {column!r} is {kind} with {table[column].null_count} nulls, expected vectors"
        )
    values = table[column].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.ascontiguousarray(values.reshape(table.num_rows, kind.list_size), np.float32)


def iterate_shards(cohort: Cohort, encoder: str, patient: str) -> Iterator[tuple[str, list[str], Float32]]:
    """Each shard of a patient's embeddings: name below the folder, cell ids, vectors (N, D)."""
    folder = cohort.embeddings(encoder, patient)
    for path in cohort.shards(folder):
        ids, vectors = read_shard(cohort.store, path)
        yield path[len(folder) + 1 :], ids, vectors


def read_selected(
    cohort: Cohort, encoder: str, patients: Collection[str], cell_ids: Collection[str]
) -> tuple[list[str], Float32]:
    """Embeddings of some cells, sorted by cell_id, shard by shard; ids that no shard holds are left out.

    Returns:
        Ids (N,) and vectors (N, D) float32; D is 0 where nothing was found.
    """
    wanted = pa.array(sorted(cell_ids), pa.string())
    names: list[str] = []
    parts: list[Float32] = []
    for patient in sorted(patients):
        for path in cohort.shards(cohort.embeddings(encoder, patient)):
            table = cohort.store.read_table(path, ["cell_id", "embedding"])
            table = table.filter(pc.is_in(table["cell_id"], value_set=wanted))
            names += table["cell_id"].to_pylist()
            parts.append(vectors_of(table, cohort.store.describe(path)))
    kept = [part for part in parts if len(part)]
    if not kept:
        return [], np.empty((0, 0), np.float32)
    vectors = np.concatenate(kept)
    order = np.argsort(np.array(names), kind="stable")
    return [names[index] for index in order], vectors[order]


def embedded_patients(cohort: Cohort, encoder: str) -> dict[str, str]:
    """Patient -> identity of its finished embeddings by one encoder; patients without are left out."""
    found = {}
    for patient in cohort.patient_ids():
        record = read_record(cohort.store, cohort.embeddings(encoder, patient))
        if record is not None:
            found[patient] = record.identity
    return found
