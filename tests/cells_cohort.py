"""A small cohort on disk with cells of phantom crops, for the stages of pretraining and embedding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from ctc_ray.cohort import Cohort
from ctc_ray.phantom import draw_crops
from ctc_ray.records import Record, identity_of, publish
from ctc_ray.schema import cell_id, cells_schema, pack_pixels


def cells_table(patient: str, crops: np.ndarray, first: int = 0) -> pa.Table:
    """A table of cells with the given crops; columns other than pixels and ids hold zeros."""
    schema = cells_schema(str(crops.dtype), crops.shape[1])
    num = len(crops)
    columns = []
    for field in schema:
        if field.name == "cell_id":
            columns.append(pa.array([cell_id(patient, 1, first + i, 0, "test") for i in range(num)]))
        elif field.name == "patient":
            columns.append(pa.array([patient] * num, pa.string()))
        elif field.name == "pixels":
            columns.append(pack_pixels(crops))
        elif pa.types.is_boolean(field.type):
            columns.append(pa.array([False] * num))
        else:
            columns.append(pa.array(np.zeros(num)).cast(field.type))
    return pa.table(columns, schema=schema)


def add_patient(cohort: Cohort, patient: str, crops: np.ndarray, *, shards: int = 1, digest: str = "a") -> None:
    """Write a patient's cells, in some shards, with a record."""
    files = {}
    for number, part in enumerate(np.array_split(np.arange(len(crops)), shards)):
        files[f"part-{number:03d}.parquet"] = cells_table(patient, crops[part], first=int(part[0]) if len(part) else 0)
    record = Record("segment", patient, identity_of("segment", {"digest": digest}, {"patient": patient}), {}, {})
    publish(cohort.store, cohort.cells(patient), files, record)


def small_cohort(folder: Path, roles: dict[str, str], *, cells: int = 24, shards: int = 1) -> Cohort:
    """A cohort with phantom crops for every patient of `roles`."""
    cohort = Cohort.open(str(folder), create=True)
    cohort.write_patients(
        pl.DataFrame(
            {"patient": list(roles), "role": list(roles.values()), "cartridge": list(roles)},
            schema={"patient": pl.String, "role": pl.String, "cartridge": pl.String},
        )
    )
    for index, patient in enumerate(roles):
        crops, _ = draw_crops(cells, seed=index)
        add_patient(cohort, patient, crops, shards=shards)
    return cohort
