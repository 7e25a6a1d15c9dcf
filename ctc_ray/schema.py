"""Arrow schemas, channel order and the cell identity: the only home of column names."""

from __future__ import annotations

import hashlib
import json
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ctc_ray.errors import SchemaError

CROP_SIZE_PX = 48
"""Side of a single-cell crop. Source: paper, Methods, LB data preparation."""
PIXEL_SIZE_UM = 0.64
"""Edge of a CellSearch pixel in the sample plane."""
FIELD_HEIGHT_PX = 1036
FIELD_WIDTH_PX = 1384
ROLES = ("pretrain", "train", "validation", "test", "final")
LABELS = ("ctc", "non_ctc", "unsure", "artefact")


class Channel(IntEnum):
    """Order of the channels of a crop."""

    DAPI = 0
    CK = 1
    CD45 = 2


CHANNEL_NAMES = tuple(channel.name.lower() for channel in Channel)
STATISTICS = tuple(f"{name}_{statistic}" for name in CHANNEL_NAMES for statistic in ("mean", "max", "sd"))
"""Per-channel statistics over the pixels of the instance, in counts of the stored image."""


def cell_id(patient: str, field: int, point_row: int, point_col: int, segmentation_fingerprint: str) -> str:
    """Name a detection so that a label can never slide to another cell.

    Args:
        patient: patient id as its folder is named.
        field: frame number, 1-based.
        point_row: row of StarDist's integer point, px from the top of the field.
        point_col: column of that point, px from the left of the field.
        segmentation_fingerprint: identity of the segmentation (weights, thresholds, precision, normalisation).

    Returns:
        24 hexadecimal characters.
    """
    key = json.dumps([patient, int(field), int(point_row), int(point_col), segmentation_fingerprint], ensure_ascii=True)
    return hashlib.blake2b(key.encode(), digest_size=12).hexdigest()


def imported_cell_id(patient: str, source_key: str, source_digest: str) -> str:
    """Name a crop that another program cut out: by its patient, its name in the source and its pixels there.

    The pixels belong to the name, so that a label cannot slide to another crop when rows of the source move; how the crop is
    brought to 48 x 48 does not, since it stays the same cell.

    Args:
        patient: patient id.
        source_key: what the source calls the crop: its id, its image files, or file and row.
        source_digest: digest of the pixels as the source holds them.

    Returns:
        24 hexadecimal characters.
    """
    key = json.dumps(["import", patient, source_key, source_digest], ensure_ascii=True)
    return hashlib.blake2b(key.encode(), digest_size=12).hexdigest()


def pixels_field(dtype: str = "uint8", channels: int = 3) -> pa.Field:
    """Describe the pixel column: one fixed-size binary per crop, dtype and shape in the field metadata.

    Args:
        dtype: `uint8` or `uint16`.
        channels: number of channels C.

    Raises:
        SchemaError: the dtype is neither of the two.
    """
    if dtype not in ("uint8", "uint16"):
        raise SchemaError(f"crops are stored as uint8 or uint16, not {dtype}: convert the image before cutting crops")
    shape = (channels, CROP_SIZE_PX, CROP_SIZE_PX)
    width = int(np.prod(shape)) * np.dtype(dtype).itemsize
    metadata = {
        "shape": json.dumps(shape),
        "dtype": dtype,
        "layout": "CHW",
        "channels": ",".join(CHANNEL_NAMES[:channels]),
    }
    return pa.field("pixels", pa.binary(width), nullable=False, metadata=metadata)


def cells_schema(dtype: str = "uint8", channels: int = 3) -> pa.Schema:
    """Schema of `cells/<patient>/part-NNN.parquet`.

    `row`, `col` are the centroid and `point_row`, `point_col` StarDist's integer point, in px of the field; `global_row`,
    `global_col` the centroid in px of the cartridge; `y0`, `x0` the crop origin in px of the field.
    """
    return pa.schema(
        [
            pa.field("cell_id", pa.string(), nullable=False),
            pa.field("patient", pa.string(), nullable=False),
            ("field", pa.int16()),
            ("row", pa.float32()),
            ("col", pa.float32()),
            ("global_row", pa.float32()),
            ("global_col", pa.float32()),
            ("y0", pa.int16()),
            ("x0", pa.int16()),
            ("prob", pa.float32()),
            ("diameter_um", pa.float32()),
            ("at_edge", pa.bool_()),
            ("point_row", pa.int16()),
            ("point_col", pa.int16()),
            ("area_px", pa.int32()),
            ("eccentricity", pa.float32()),
            *((name, pa.float32()) for name in STATISTICS),
            pixels_field(dtype, channels),
        ]
    )


def pack_pixels(crops_NCHW: npt.NDArray[Any]) -> pa.FixedSizeBinaryArray:
    """Turn crops (N, C, 48, 48) uint8 or uint16 into a fixed-size binary column, without a copy where contiguous."""
    crops = np.ascontiguousarray(crops_NCHW)
    if crops.ndim != 4 or crops.shape[2:] != (CROP_SIZE_PX, CROP_SIZE_PX):
        raise SchemaError(f"crops have shape {crops.shape}, expected (N, C, {CROP_SIZE_PX}, {CROP_SIZE_PX})")
    kind = pixels_field(str(crops.dtype), crops.shape[1]).type
    return pa.FixedSizeBinaryArray.from_buffers(kind, len(crops), [None, pa.py_buffer(crops)])


def unpack_pixels(column: pa.ChunkedArray | pa.Array, field: pa.Field) -> npt.NDArray[Any]:
    """View a pixel column as crops.

    Args:
        column: the `pixels` column, N rows, no nulls.
        field: its schema field, whose metadata holds shape and dtype.

    Returns:
        (N, C, 48, 48) read-only view (a copy only where the column has several chunks), dtype of the metadata.

    Raises:
        SchemaError: the metadata is missing or does not fit the width, or there are nulls.
    """
    metadata = field.metadata or {}
    if b"shape" not in metadata or b"dtype" not in metadata:
        raise SchemaError(
            f"column {field.name!r} has no shape and dtype in its field metadata: it was not written by ctc_ray"
        )
    shape = tuple(json.loads(metadata[b"shape"]))
    dtype = np.dtype(metadata[b"dtype"].decode())
    width = int(np.prod(shape)) * dtype.itemsize
    if isinstance(column, pa.ChunkedArray):
        column = (
            column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks or [pa.array([], field.type)])
        )
    if column.null_count or column.type.byte_width != width:
        raise SchemaError(
            f"column {field.name!r}: {column.null_count} nulls, type {column.type}, expected {width} bytes a crop"
        )
    buffer = column.buffers()[1]
    if buffer is None or len(column) == 0:
        return np.empty((0, *shape), dtype)
    raw = np.frombuffer(buffer, np.uint8, count=len(column) * width, offset=column.offset * width)
    crops: npt.NDArray[Any] = raw.view(dtype).reshape(len(column), *shape)
    return crops


def embeddings_schema(width: int) -> pa.Schema:
    """Schema of `embeddings/<encoder>/<patient>/part-NNN.parquet`; `width` is the embedding width D."""
    return pa.schema([("cell_id", pa.string()), ("patient", pa.string()), ("embedding", pa.list_(pa.float32(), width))])


def latent_schema(pca_dim: int) -> pa.Schema:
    """Schema of the per-cell latent map: PCA scores, UMAP coordinates, cluster (-1 is background)."""
    return pa.schema(
        [
            ("cell_id", pa.string()),
            ("patient", pa.string()),
            ("pca", pa.list_(pa.float32(), pca_dim)),
            ("umap_x", pa.float32()),
            ("umap_y", pa.float32()),
            ("cluster", pa.int16()),
        ]
    )


PATIENTS_SCHEMA = pa.schema([("patient", pa.string()), ("role", pa.string()), ("cartridge", pa.string())])
DUPLICATES_SCHEMA = pa.schema([("cell_id", pa.string()), ("physical_id", pa.string())])
FAILURES_SCHEMA = pa.schema(
    [
        ("stage", pa.string()),
        ("unit", pa.string()),
        ("source", pa.string()),
        ("kind", pa.string()),
        ("message", pa.string()),
    ]
)
LABELS_SCHEMA = pa.schema(
    [
        ("event_id", pa.string()),
        ("cell_id", pa.string()),
        ("patient", pa.string()),
        ("field", pa.int16()),
        ("row", pa.float32()),
        ("col", pa.float32()),
        ("crop_sha", pa.string()),
        ("label", pa.string()),
        ("reader", pa.string()),
        ("source", pa.string()),
        ("at", pa.timestamp("us", tz="UTC")),
        ("seconds", pa.float32()),
        ("strategy", pa.string()),
        ("undoes", pa.string()),
    ]
)
TRUTH_SCHEMA = pa.schema(
    [
        ("patient", pa.string()),
        ("field", pa.int16()),
        ("row", pa.float32()),
        ("col", pa.float32()),
        ("kind", pa.string()),
        ("diameter_um", pa.float32()),
        ("physical_id", pa.string()),
    ]
)
RESULTS_SCHEMA = pa.schema(
    [
        ("scenario", pa.string()),
        ("strategy", pa.string()),
        ("main_cluster", pa.int16()),
        ("run", pa.int16()),
        ("seed", pa.int64()),
        ("loop", pa.int16()),
        ("split", pa.string()),
        ("cluster", pa.int16()),
        ("f1", pa.float64()),
        ("recall", pa.float64()),
        ("precision", pa.float64()),
        ("num_train", pa.int32()),
    ]
)
TRIAL_SCHEMA = pa.schema(
    [
        *RESULTS_SCHEMA,
        pa.field("num_viewed", pa.int32()),
        pa.field("searched_cluster", pa.int16()),
        pa.field("searched_class", pa.int8()),
    ]
)
"""Rows of one trial: its results, how many cells the labeller had been asked about since the start, and where `rare-positive` has
just looked for which class (1 CTC, 0 not); null before its first loop, where it found nothing to look at, and in other scenarios.
The cluster is null too where it looked everywhere."""
FLIP_RATE = pa.field("flip_rate", pa.float64())
"""Further column of results and effort: share of wrong answers, in a sweep over more than one."""
EFFORT_SCHEMA = pa.schema(
    [
        *(
            RESULTS_SCHEMA.field(name)
            for name in ("scenario", "strategy", "main_cluster", "run", "seed", "loop", "num_train")
        ),
        *(TRIAL_SCHEMA.field(name) for name in ("num_viewed", "searched_cluster", "searched_class")),
        pa.field("minutes", pa.float64()),
    ]
)
METRICS_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("cluster", pa.int16()),
        ("num_cells", pa.int32()),
        ("num_ctc", pa.int32()),
        ("f1", pa.float64()),
        ("recall", pa.float64()),
        ("precision", pa.float64()),
        ("reason", pa.string()),
    ]
)
CANDIDATES_SCHEMA = pa.schema(
    [
        ("cell_id", pa.string()),
        ("patient", pa.string()),
        ("field", pa.int16()),
        ("row", pa.float32()),
        ("col", pa.float32()),
        ("global_row", pa.float32()),
        ("global_col", pa.float32()),
        ("diameter_um", pa.float32()),
        ("probability", pa.float32()),
        ("cluster", pa.int16()),
        ("physical_id", pa.string()),
        ("num_detections", pa.int16()),
    ]
)
MATCHES_SCHEMA = pa.schema(
    [
        ("patient", pa.string()),
        ("cell_id", pa.string()),
        ("event_id", pa.string()),
        ("distance_px", pa.float32()),
        ("event_is_ctc", pa.bool_()),
        ("found_by", pa.string()),
    ]
)


def check_columns(table: pa.Table, schema: pa.Schema, where: str) -> pa.Table:
    """Return the table in the schema's column order and types.

    Args:
        table: any table that holds the schema's columns; further columns are dropped.
        schema: the contract.
        where: file or argument that the message names.

    Raises:
        SchemaError: a column is missing or cannot be cast.
    """
    missing = [name for name in schema.names if name not in table.column_names]
    if missing:
        raise SchemaError(f"{where}: missing columns {', '.join(missing)}; it has {', '.join(table.column_names)}")
    try:
        return table.select(schema.names).cast(schema)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
        raise SchemaError(f"{where}: {error}") from error
