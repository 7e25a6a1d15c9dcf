"""Slices of shards of cells: the unit in which crops are read, by training and by embedding."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from ctc_ray.errors import SchemaError
from ctc_ray.storage import Store

SLICE_ROWS: Final = 2000
"""Rows read at once: one or two row groups."""


@dataclass(frozen=True)
class Slice:
    """Some rows of one shard of cells.

    Attributes:
        shard: its path below the cohort.
        start: first row.
        stop: row after the last.
    """

    shard: str
    start: int
    stop: int

    def to_row(self) -> dict[str, Any]:
        """The slice as one row of plain values."""
        return asdict(self)


def slices_of(shards: dict[str, int], slice_rows: int) -> list[Slice]:
    """Cut shards (path -> rows) into slices of at most `slice_rows` rows, in the order given; an empty shard gives none."""
    return [
        Slice(shard, start, min(start + slice_rows, rows))
        for shard, rows in shards.items()
        for start in range(0, rows, slice_rows)
    ]


def read_slice(store: Store, part: Slice, columns: list[str]) -> pa.Table:
    """Read rows of a shard, opening only the row groups that hold them.

    Args:
        store: of the cohort.
        part: which rows.
        columns: which columns.

    Raises:
        SchemaError: the shard is damaged or has no such rows.
    """
    remedy = f"segment its patient again (`ctc-ray segment {store.uri} --force`)"
    with store.open_input(part.shard) as stream:
        try:
            file = pq.ParquetFile(stream)
            groups: list[int] = []
            first, offset = 0, 0
            for index in range(file.metadata.num_row_groups):
                rows = file.metadata.row_group(index).num_rows
                if offset < part.stop and offset + rows > part.start:
                    if not groups:
                        first = offset
                    groups.append(index)
                offset += rows
            table = file.read_row_groups(groups, columns=columns, use_threads=False)
        except (pa.ArrowInvalid, OSError, KeyError) as error:
            raise SchemaError(f"{store.describe(part.shard)} cannot be read ({error}): {remedy}") from error
    table = table.slice(part.start - first, part.stop - part.start)
    if table.num_rows != part.stop - part.start:
        raise SchemaError(f"{store.describe(part.shard)} has {offset} rows, expected at least {part.stop}: {remedy}")
    return table


class ReadCrops:
    """Reads slices of cells inside Ray Data: rows of slice descriptions in, cell_id and pixels out."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Read the slices of a batch (at least one)."""
        return pa.concat_tables(
            [read_slice(self._store, Slice(**row), ["cell_id", "pixels"]) for row in batch.to_pylist()]
        )
