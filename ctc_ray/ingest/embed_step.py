"""Fourth step: the cells of a few fields are embedded at once; vectors and cells are written, field by field."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

import pyarrow as pa
import torch

from ctc_ray.cohort import Cohort
from ctc_ray.config import EmbedConfig
from ctc_ray.embed.compute import embed_cells
from ctc_ray.embed.embedder import Embedder
from ctc_ray.embed.loading import load_embedder
from ctc_ray.errors import CtcRayError
from ctc_ray.ingest.cells_step import CUT_SCHEMA, from_stream
from ctc_ray.segment.plan import part_name
from ctc_ray.segment.read_step import FieldTask

_NEEDED = ["cell_id", "patient", "pixels"]
DONE_SCHEMA = pa.schema(
    [
        *(field for field in CUT_SCHEMA if field.name not in ("task", "table")),
        ("embed_node", pa.string()),
        ("embed_pid", pa.int64()),
        ("embed_start", pa.float64()),
        ("embed_end", pa.float64()),
        ("has_cells", pa.bool_()),
        ("embed_error", pa.string()),
    ]
)
"""What comes back to the driver for a field: no pixels, no vectors. `embed_*` as the network's columns, null where the field failed;
`has_cells`: its cells were there before; `embed_error`: why its cells have no vectors."""


class FieldEmbedder:
    """(status, cells) -> vectors and cells on disk, and the status row.

    The vectors of a field are written before its cells, so that a field with its part of cells has its vectors too, whenever
    the process ends. Cells that cannot be embedded are written without; the embed stage then says of them what it says of any.
    """

    def __init__(
        self,
        cohort: Cohort,
        section: EmbedConfig,
        precision: str,
        identify: Callable[[], tuple[str, int]],
        embedder: Embedder | None = None,
    ) -> None:
        """Load the encoder once.

        Args:
            cohort: where parts are written.
            section: of the embed stage.
            precision: resolved.
            identify: gives node and process id of the worker.
            embedder: to use; None loads the one that the section names.
        """
        torch.set_num_threads(section.num_threads)
        self._store = cohort.store
        self._full_scale = section.full_scale
        self._embedder = embedder or load_embedder(cohort.store, section, precision)
        self._node, self._pid = identify()

    def __call__(self, fields: pa.Table) -> pa.Table:
        """Embed and write the fields of a table of `CUT_SCHEMA`."""
        rows = fields.to_pylist()
        tasks = [FieldTask.from_json(row.pop("task")) for row in rows]
        cells = [self._cells(task, row.pop("table")) for task, row in zip(tasks, rows, strict=True)]
        started = time.time()
        vectors = iter(self._embed([table for table in cells if table is not None]))
        ended = time.time()
        for task, row, table in zip(tasks, rows, cells, strict=True):
            row["has_cells"] = task.has_cells
            if table is None:
                continue
            found = next(vectors)
            row |= {"embed_node": self._node, "embed_pid": self._pid, "embed_start": started, "embed_end": ended}
            row |= {"embed_error": found if isinstance(found, str) else None, "cells": table.num_rows}
            self._write(task, table, found)
        return pa.Table.from_pylist(rows, schema=DONE_SCHEMA)

    def _cells(self, task: FieldTask, stream: bytes | None) -> pa.Table | None:
        """Cells of a field: passed on by the step before, or from the part that an earlier run wrote."""
        if task.has_cells:
            return self._store.read_table(f"{task.parts_folder}/{part_name(task.field.field)}", _NEEDED)
        return None if stream is None else from_stream(stream)

    def _embed(self, cells: Sequence[pa.Table]) -> list[pa.Table | str]:
        """Vectors of each table, or why there are none; all are embedded in one go where they go together."""
        if len({table.schema.field("pixels").type for table in cells}) == 1 and len(cells) > 1:
            try:
                together = pa.concat_tables([table.select(_NEEDED) for table in cells])
                vectors = embed_cells(together, self._embedder, self._full_scale, "fields embedded together")
            except CtcRayError:
                return [self._embed_one(table) for table in cells]  # one of them is at fault: find out which
            starts = [0]
            for table in cells:
                starts.append(starts[-1] + table.num_rows)
            return [vectors.slice(start, stop - start) for start, stop in itertools.pairwise(starts)]
        return [self._embed_one(table) for table in cells]

    def _embed_one(self, table: pa.Table) -> pa.Table | str:
        try:
            return embed_cells(table, self._embedder, self._full_scale, "cells of one field")
        except CtcRayError as error:
            return f"{type(error).__name__}: {error}"

    def _write(self, task: FieldTask, cells: pa.Table, vectors: pa.Table | str) -> None:
        name = part_name(task.field.field)
        if not isinstance(vectors, str):
            self._store.write_table(f"{task.vectors_folder}/{name}", vectors)
        if not task.has_cells:
            self._store.write_table(f"{task.parts_folder}/{name}", cells)
