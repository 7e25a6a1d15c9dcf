"""First step of a unit: its cells are read into one row, as an Arrow stream.

The row stays whole however rows are cut into blocks, and its pixels are looked at where it lies in memory. This module loads
neither Torch nor timm, which a worker that reads does without.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, Final

import numpy as np
import pyarrow as pa

from ctc_ray.embed.units import Unit
from ctc_ray.errors import CtcRayError
from ctc_ray.pretrain.slices import Slice, read_slice
from ctc_ray.storage import Store

UNIT_FIELDS: Final = tuple(field.name for field in fields(Unit))
"""Columns that make a `Unit`."""
_NEEDED: Final = ["cell_id", "patient", "pixels"]
READ_SCHEMA: Final = pa.schema(
    [
        *((name, pa.int64() if name in ("start", "stop") else pa.string()) for name in UNIT_FIELDS),
        ("cells", pa.large_binary()),
        ("kind", pa.string()),
        ("message", pa.string()),
    ]
)
"""A unit with its cells as an Arrow stream; null where they cannot be read, with kind and message of the error."""


def read_units(batch: pa.Table, store: Store) -> Iterator[pa.Table]:
    """Read the cells of some units.

    Args:
        batch: rows of `Unit.to_row`.
        store: of the cohort.

    Yields:
        One table of `READ_SCHEMA` with one row a unit.
    """
    for row in batch.to_pylist():
        unit = Unit(**row)
        try:
            cells = read_slice(store, Slice(unit.shard, unit.start, unit.stop), _NEEDED)
        except CtcRayError as error:
            # A damaged shard must not end the other patients' work; the driver reports it.
            yield _one_row(row, None, type(error).__name__, str(error))
        else:
            yield _one_row(row, _as_stream(cells), "", "")


def _as_stream(cells: pa.Table) -> pa.Buffer:
    """One record batch, in memory that is asked for once."""
    together = cells.combine_chunks()

    def write(sink: pa.NativeFile) -> None:
        with pa.ipc.new_stream(sink, cells.schema) as writer:
            writer.write_table(together)

    counter = pa.MockOutputStream()
    write(counter)
    buffer = pa.allocate_buffer(counter.size())
    with pa.FixedSizeBufferWriter(buffer) as sink:
        write(sink)
    return buffer


def _one_row(unit: dict[str, Any], stream: pa.Buffer | None, kind: str, message: str) -> pa.Table:
    if stream is None:
        cells = pa.nulls(1, pa.large_binary())
    else:
        ends = pa.py_buffer(pa.array([0, stream.size], pa.int64()).to_numpy().tobytes())
        cells = pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, ends, stream])  # not copied
    columns = [pa.array([unit[name]], READ_SCHEMA.field(name).type) for name in UNIT_FIELDS]
    return pa.table([*columns, cells, pa.array([kind]), pa.array([message])], schema=READ_SCHEMA)


def streams_of(column: pa.ChunkedArray) -> Iterator[pa.Buffer | None]:
    """View the streams of a column of large binaries, row by row, without copying them; None for a null.

    `LargeBinaryScalar.as_buffer` would copy each.
    """
    for chunk in column.chunks:
        if len(chunk) == 0:
            continue
        _, ends, data = chunk.buffers()
        positions = np.frombuffer(ends, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1].tolist()
        for (start, stop), is_there in zip(itertools.pairwise(positions), chunk.is_valid().to_pylist(), strict=True):
            yield data.slice(start, stop - start) if is_there else None
