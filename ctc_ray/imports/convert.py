"""One unit of an import: read some rows of the source, write a part of cells for each of their patients. No Ray here."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from ctc_ray.config import ImportCropsConfig
from ctc_ray.errors import CtcRayError, SchemaError
from ctc_ray.imports.fitting import CountsRule, fit_crop, to_counts
from ctc_ray.imports.pixels import CropReader
from ctc_ray.imports.rows import row_name
from ctc_ray.imports.source import CHANNEL_COUNTS
from ctc_ray.records import FailureRow
from ctc_ray.schema import CROP_SIZE_PX, cells_schema, imported_cell_id, pack_pixels
from ctc_ray.storage import Store

GIVEN_PROB = 1.0
"""`prob` of an imported cell: no network found it, somebody gave it."""
SOURCE_COLUMNS = pa.schema(
    [
        ("source_key", pa.string()),
        ("source", pa.string()),
        ("source_height_px", pa.int32()),
        ("source_width_px", pa.int32()),
    ]
)
"""Columns of a part beside those of the cells: where the cell came from."""
_FAILURES_KEY = b"ctc_ray.failures"
_ROW_COLUMNS = ("patient", "field", "row", "col", "y0", "x0")


@dataclass(frozen=True)
class Conversion:
    """What every worker needs to know.

    Attributes:
        section: settings of the import.
        counts: how numbers become stored counts.
        channels: C of a stored crop.
    """

    section: ImportCropsConfig
    counts: CountsRule
    channels: int


@dataclass(frozen=True)
class PartStatus:
    """What became of one patient's rows of a unit."""

    part: str
    patient: str
    cells: int
    failed: int


def convert_rows(
    store: Store, rows: pl.DataFrame, parts: dict[str, str], reader: CropReader, conversion: Conversion
) -> list[PartStatus]:
    """Import the rows of a unit.

    Args:
        store: of the cohort.
        rows: of `ROW_SCHEMA`.
        parts: patient -> path of the part to write.
        reader: of the source.
        conversion: settings.

    Returns:
        A status for each patient. Rows that cannot be imported are listed inside the part, so that a resumed run knows them.
    """
    gathered: dict[str, tuple[list[dict[str, Any]], list[npt.NDArray[Any]], list[FailureRow]]]
    gathered = {patient: ([], [], []) for patient in parts}
    for row, answer in zip(rows.iter_rows(named=True), reader.read(rows), strict=True):
        cells, crops, failures = gathered[row["patient"]]
        try:
            if isinstance(answer, CtcRayError):
                raise answer
            crop = convert_crop(answer, conversion)
        except CtcRayError as error:
            name = row_name(row["file"], row["source_row"])
            failures.append(FailureRow(name, type(error).__name__, str(error)))
            continue
        cells.append(_cell(row, answer))
        crops.append(crop)
    statuses = []
    for patient, path in parts.items():
        cells, crops, failures = gathered[patient]
        store.write_table(path, _part(cells, crops, failures, conversion))
        statuses.append(PartStatus(path, patient, len(cells), len(failures)))
    return statuses


def convert_crop(crop: npt.NDArray[Any], conversion: Conversion) -> npt.NDArray[Any]:
    """Bring one crop (C, H, W) of the source to the channels, counts and size of the cohort.

    Raises:
        SchemaError: it cannot be.
    """
    order = conversion.section.channel_order
    if order is not None:
        if max(order) >= len(crop):
            raise SchemaError(
                f"the crop has {len(crop)} channels, import_crops.channel_order asks for {max(order)} (from 0)"
            )
        crop = crop[list(order)]
    if len(crop) != conversion.channels:
        raise SchemaError(f"the crop has {len(crop)} channels, the import {conversion.channels}")
    return fit_crop(to_counts(crop, conversion.counts), conversion.section.resize)


def read_part(store: Store, path: str) -> tuple[pa.Table, list[FailureRow]]:
    """Cells of a part (with `SOURCE_COLUMNS`) and its rows that were set aside."""
    table = store.read_table(path)
    rows = json.loads((table.schema.metadata or {}).get(_FAILURES_KEY, b"[]"))
    return table, [FailureRow(**row) for row in rows]


def source_digest(crop: npt.NDArray[Any]) -> str:
    """Digest of a crop's pixels, shape and number type as the source holds them."""
    digest = hashlib.blake2b(f"{crop.dtype.str} {crop.shape} ".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(crop).tobytes())
    return digest.hexdigest()


def num_channels(given: int, section: ImportCropsConfig) -> int:
    """Channels of a stored crop, from those of the source.

    Raises:
        SchemaError: neither 3 nor 4.
    """
    order = section.channel_order
    count = given if order is None else len(order)
    if count not in CHANNEL_COUNTS or (order is not None and max(order) >= given):
        raise SchemaError(
            f"a crop has 3 or 4 channels; the source has {given}, and import_crops.channel_order is "
            f"{'null' if order is None else list(order)}: choose 3 or 4 of the source's channels, counted from 0"
        )
    return count


def _cell(row: dict[str, Any], crop: npt.NDArray[Any]) -> dict[str, Any]:
    return {
        **{name: row[name] for name in _ROW_COLUMNS},
        "cell_id": imported_cell_id(row["patient"], row["key"], source_digest(crop)),
        "prob": GIVEN_PROB,
        "source_key": row["key"],
        "source": row_name(row["file"], row["source_row"]),
        "source_height_px": crop.shape[1],
        "source_width_px": crop.shape[2],
    }


def _part(
    cells: list[dict[str, Any]], crops: list[npt.NDArray[Any]], failures: list[FailureRow], conversion: Conversion
) -> pa.Table:
    dtype, shape = conversion.counts.dtype, (conversion.channels, CROP_SIZE_PX, CROP_SIZE_PX)
    schema = cells_schema(dtype, conversion.channels)
    pixels = pack_pixels(np.stack(crops) if crops else np.empty((0, *shape), dtype))
    arrays = [
        pixels if field.name == "pixels" else pa.array([cell.get(field.name) for cell in cells], field.type)
        for field in [*schema, *SOURCE_COLUMNS]
    ]
    listed = json.dumps([asdict(failure) for failure in failures]).encode()
    return pa.Table.from_arrays(arrays, schema=pa.schema([*schema, *SOURCE_COLUMNS], metadata={_FAILURES_KEY: listed}))
