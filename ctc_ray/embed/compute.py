"""One unit of embedding: read a slice of cells, write the part of its vectors."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from ctc_ray.embed.embedder import Embedder
from ctc_ray.embed.units import Unit
from ctc_ray.errors import SchemaError
from ctc_ray.pretrain.intensity import check_counts, stored_full_scale
from ctc_ray.pretrain.slices import Slice, read_slice
from ctc_ray.schema import embeddings_schema, unpack_pixels
from ctc_ray.storage import Store


def embed_unit(store: Store, unit: Unit, embedder: Embedder, full_scale: float | None) -> int:
    """Embed one unit and write its part; returns its number of cells.

    Raises:
        SchemaError: the cells cannot be read, or hold counts above full scale.
    """
    table = read_slice(store, Slice(unit.shard, unit.start, unit.stop), ["cell_id", "patient", "pixels"])
    where = f"{store.describe(unit.shard)} rows {unit.start}-{unit.stop}"
    store.write_table(unit.part, embed_cells(table, embedder, full_scale, where))
    return int(table.num_rows)


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
