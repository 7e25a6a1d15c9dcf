"""Third step of a field: from its candidates to its cells, which are passed on instead of written. Imports no torch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from ctc_ray.segment.cells_step import STATUS_SCHEMA, cut_cells, status_of
from ctc_ray.segment.plan import Settings
from ctc_ray.segment.read_step import FieldTask

NETWORK_COLUMNS = ("network_node", "network_pid", "network_start", "network_end")
CUT_SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        *STATUS_SCHEMA,
        ("network_node", pa.string()),
        ("network_pid", pa.int64()),
        ("network_start", pa.float64()),
        ("network_end", pa.float64()),
        ("table", pa.large_binary()),
    ]
)
"""One row a field; `table` is its cells as an Arrow stream, null where it failed or has its part already."""


def to_stream(table: pa.Table) -> pa.Buffer:
    """Encode a table as an Arrow stream, the metadata of its columns included."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def from_stream(data: bytes) -> pa.Table:
    """Decode what `to_stream` encoded, without copying."""
    with pa.ipc.open_stream(pa.py_buffer(data)) as reader:
        return reader.read_all()


class CellSender:
    """(task, image, candidates) -> a status row with the field's cells."""

    def __init__(self, settings: Settings, identify: Callable[[], tuple[str, int]] | None = None) -> None:
        """Prepare.

        Args:
            settings: of the stage.
            identify: gives node and process id of the worker.
        """
        self._settings = settings
        self._node, self._pid = identify() if identify else ("local", os.getpid())

    def __call__(self, fields: pa.Table) -> pa.Table:
        """Turn rows of `CANDIDATE_SCHEMA` into rows of `CUT_SCHEMA`."""
        return pa.Table.from_pylist([self._cut(row) for row in fields.to_pylist()], schema=CUT_SCHEMA)

    def _cut(self, row: dict[str, Any]) -> dict[str, Any]:
        started, task = time.monotonic(), FieldTask.from_json(row["task"])
        cells = cut_cells(row, task, self._settings)
        table = None if cells is None else to_stream(cells).to_pybytes()
        seconds = row["seconds"] + time.monotonic() - started
        status = status_of(row, task, 0 if cells is None else cells.num_rows, self._node, self._pid, seconds)
        return status | {"task": row["task"], "table": table} | {name: row[name] for name in NETWORK_COLUMNS}
