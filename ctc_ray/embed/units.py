"""Units of embedding: slices of a shard of cells, the parts they become, and how parts become shards again.

A part is one small Parquet file of a slice's vectors. Parts lie in a folder named by the identity of their output, so that
a killed run finds what it had finished and never mistakes another run's parts for its own.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

import pyarrow as pa

from ctc_ray.storage import Store, encode_parquet

PARTS = "_parts"
MAX_UNIT_BYTES: Final = 32 * 2**20
"""Pixels of a unit at most: as much as a block of a plan, of which a worker and the object store hold a few."""


@dataclass(frozen=True)
class Unit:
    """A slice of one shard of one patient's cells.

    Attributes:
        patient: its id.
        shard: path of the shard of cells below the cohort.
        start: first row.
        stop: row after the last.
        part: path of the part to write.
    """

    patient: str
    shard: str
    start: int
    stop: int
    part: str

    def to_row(self) -> dict[str, Any]:
        """The unit as one row of plain values."""
        return asdict(self)


def parts_folder(output: str, identity: str) -> str:
    """Folder of the parts of an output that is being made."""
    return f"{output}/{PARTS}/{identity}"


def units_of(store: Store, patient: str, shards: list[str], folder: str, unit_cells: int) -> list[Unit]:
    """Cut a patient's shards into units of about `unit_cells` rows.

    Args:
        store: of the cohort.
        patient: its id.
        shards: paths of the shards of cells, or of embeddings.
        folder: of the parts.
        unit_cells: rows a unit, fewer where their pixels (if there are any) exceed `MAX_UNIT_BYTES`.

    Returns:
        Units in the order of shards and rows; an empty shard gives one empty unit.
    """
    units = []
    schema = store.read_schema(shards[0]) if shards else pa.schema([])
    if "pixels" in schema.names:
        unit_cells = max(1, min(unit_cells, MAX_UNIT_BYTES // schema.field("pixels").type.byte_width))
    for shard in shards:
        num_rows = store.num_rows(shard)
        stem = shard.rsplit("/", 1)[-1].removesuffix(".parquet")
        for start in range(0, max(num_rows, 1), unit_cells):
            stop = min(start + unit_cells, num_rows)
            units.append(Unit(patient, shard, start, stop, f"{folder}/{stem}-{start:08d}-{stop:08d}.parquet"))
    return units


def finished_parts(store: Store, folder: str) -> set[str]:
    """Paths of the parts that are already there (writes are atomic: what is there is whole)."""
    return set(store.list_files(folder, suffix=".parquet"))


def consolidate(store: Store, output: str, units: list[Unit]) -> dict[str, int]:
    """Join a patient's parts to shards named like those of its cells.

    Args:
        store: of the cohort.
        output: folder of the patient's embeddings.
        units: all of the patient, their parts written.

    Returns:
        File name below `output` -> bytes.
    """
    sizes = {}
    for shard in dict.fromkeys(unit.shard for unit in units):
        own = [unit for unit in units if unit.shard == shard]
        table = pa.concat_tables([store.read_table(unit.part) for unit in own]).combine_chunks()
        name = shard.rsplit("/", 1)[-1]
        sizes[name] = store.write_bytes(f"{output}/{name}", encode_parquet(table))
    return sizes
