"""Second step of a unit: its cells are embedded, and the part of their vectors is written."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import numpy as np
import pyarrow as pa
import torch

from ctc_ray.config import EmbedConfig
from ctc_ray.embed.embedder import Embedder
from ctc_ray.embed.loading import load_embedder
from ctc_ray.embed.reading import UNIT_FIELDS, streams_of
from ctc_ray.embed.units import Unit
from ctc_ray.errors import CtcRayError, SchemaError
from ctc_ray.pretrain.intensity import check_counts, stored_full_scale
from ctc_ray.schema import embeddings_schema, unpack_pixels
from ctc_ray.storage import Store

STATUS_SCHEMA: Final = pa.schema(
    [
        ("part", pa.string()),
        ("node", pa.string()),
        ("pid", pa.int64()),
        ("start", pa.float64()),
        ("end", pa.float64()),
        ("kind", pa.string()),
        ("message", pa.string()),
    ]
)
"""What comes back for a unit: who embedded it from when to when (seconds since 1970), or what is wrong with it (`kind` is empty
where nothing is)."""


def embed_cells(cells: pa.Table, embedder: Embedder, full_scale: float | None, where: str) -> pa.Table:
    """Embed a table of cells.

    Args:
        cells: columns `cell_id`, `patient`, `pixels`; N rows.
        embedder: the encoder.
        full_scale: count of a saturated pixel; None for that of the stored type.
        where: what messages name.

    Returns:
        N rows of `embeddings_schema`, in the order of the cells.

    Raises:
        SchemaError: the pixels are no crops, hold counts above full scale, or their vectors are not finite.
    """
    crops = unpack_pixels(cells["pixels"], cells.schema.field("pixels"))
    scale = stored_full_scale(crops.dtype, full_scale)
    check_counts(crops, scale, where, "embed.full_scale")
    vectors = embedder(crops, full_scale=scale)
    if not np.isfinite(vectors).all():
        raise SchemaError(f"{where}: the encoder gave vectors that are not finite")
    schema = embeddings_schema(embedder.width)
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), embedder.width)
    columns = [cells["cell_id"], cells["patient"], embedding.cast(schema.field("embedding").type)]
    return pa.table(columns, schema=schema)


class EmbedUnits:
    """Holds one embedder; units with their cells in, parts on disk and status rows out."""

    def __init__(
        self,
        store: Store,
        section: EmbedConfig,
        precision: str,
        identify: Callable[[], tuple[str, int]],
        embedder: Embedder | None = None,
    ) -> None:
        """Load the encoder once.

        Args:
            store: of the cohort.
            section: settings.
            precision: resolved.
            identify: gives node and process id of the worker.
            embedder: to use; None loads the one that the section names.
        """
        torch.set_num_threads(section.num_threads)
        self._store = store
        self._full_scale = section.full_scale
        self._embedder = embedder or load_embedder(store, section, precision)
        self._node, self._pid = identify()

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Embed the units of a table of `READ_SCHEMA`, to one of `STATUS_SCHEMA`."""
        rows = []
        for row, stream in zip(batch.drop_columns("cells").to_pylist(), streams_of(batch["cells"]), strict=True):
            unit = Unit(**{name: row[name] for name in UNIT_FIELDS})
            kind, message, start = row["kind"], row["message"], time.time()
            if stream is not None:
                try:
                    self._embed(unit, stream)
                except CtcRayError as error:
                    # As a value: it must not end the other patients' work.
                    kind, message = type(error).__name__, str(error)
            done = {"part": unit.part, "node": self._node, "pid": self._pid, "start": start, "end": time.time()}
            rows.append({**done, "kind": kind, "message": message})
        return pa.Table.from_pylist(rows, schema=STATUS_SCHEMA)

    def _embed(self, unit: Unit, stream: pa.Buffer) -> None:
        with pa.ipc.open_stream(stream) as reader:
            cells = reader.read_all()
        where = f"{self._store.describe(unit.shard)} rows {unit.start}-{unit.stop}"
        self._store.write_table(unit.part, embed_cells(cells, self._embedder, self._full_scale, where))
