"""Slices of shards of cells: the unit in which crops are read, by training and by embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ctc_ray.errors import SchemaError
from ctc_ray.schema import unpack_pixels
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


_SPANS_OF_A_WORKER: Final = 16
_SPAN_ROWS: Final = 256


def share_of(shards: dict[str, int], rank: int, size: int) -> list[Slice]:
    """The slices of one worker, spread over all shards so that no worker sees a few patients alone.

    Args:
        shards: path -> rows.
        rank: of the worker, 0..size-1.
        size: number of workers; their shares cover every row once, and are even to within a row for each span of them.
    """
    total = sum(shards.values())
    spans = size * int(np.clip(total // (size * _SPAN_ROWS), 1, _SPANS_OF_A_WORKER))
    own = [(span * total // spans, (span + 1) * total // spans) for span in range(rank, spans, size)]
    parts: list[Slice] = []
    first = 0
    for shard, rows in shards.items():
        for start, stop in own:
            low, high = max(start - first, 0), min(stop - first, rows)
            parts += [Slice(shard, at, min(at + SLICE_ROWS, high)) for at in range(low, high, SLICE_ROWS)]
        first += rows
    return parts


def read_crops(store: Store, parts: Sequence[Slice]) -> npt.NDArray[Any]:
    """Read the crops of some slices into one array, in the order of their `cell_id`.

    Returns:
        (N, C, H, W) uint8 or uint16 counts; memory for one slice is needed beside them.

    Raises:
        SchemaError: a shard is damaged, its crops are not counts, or slices hold crops of two kinds.
    """
    ids = [read_slice(store, part, ["cell_id"])["cell_id"].to_numpy(zero_copy_only=False) for part in parts]
    place = np.empty(sum(map(len, ids)), np.int64)
    place[np.argsort(np.concatenate([*ids, np.empty(0, object)]), kind="stable")] = np.arange(len(place))
    crops: npt.NDArray[Any] | None = None
    first = 0
    for part in parts:
        table = read_slice(store, part, ["pixels"])
        own = unpack_pixels(table["pixels"], table.schema.field("pixels"))
        if crops is None:
            crops = np.empty((len(place), *own.shape[1:]), own.dtype)
        if own.shape[1:] != crops.shape[1:] or own.dtype != crops.dtype:
            raise SchemaError(
                f"{store.describe(part.shard)} holds crops of {own.dtype} {own.shape[1:]}, the shards before it "
                f"{crops.dtype} {crops.shape[1:]}: segment all pretraining patients with one channel map"
            )
        crops[place[first : first + len(own)]] = own
        first += len(own)
    return np.empty((0, 1, 1, 1), np.uint8) if crops is None else crops


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
