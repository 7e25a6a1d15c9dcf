"""The whole way from field files with a known overlap to physical cells, with the shipped network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from scipy.spatial import cKDTree

from ctc_ray.cohort import Cohort
from ctc_ray.config import PhantomConfig, SegmentConfig
from ctc_ray.phantom import write_phantom
from ctc_ray.phantom.kinds import CK_KINDS
from ctc_ray.records import read_record
from ctc_ray.segment.cells_step import CellCutter
from ctc_ray.segment.field_image import pixel_type
from ctc_ray.segment.finish import finish_patient
from ctc_ray.segment.network_step import CandidateFinder
from ctc_ray.segment.plan import plan_patients, resolve_settings
from ctc_ray.segment.read_step import TASK_SCHEMA, FieldTask, read_fields
from ctc_ray.storage import Store

NUM_FIELDS = 12
NEAR_PX = 6.0
"""A detection this near to a true centre is that cell."""
COLUMNS = ["cell_id", "field", "global_row", "global_col"]


def physical_cells(folder: Path, overlap_px: int) -> tuple[pl.DataFrame, pl.DataFrame, dict[str, int]]:
    """Detections with `physical_id`, the true cells in pixels of the cartridge, and the record's counts."""
    write_phantom(PhantomConfig(patients=1, fields=NUM_FIELDS, seed=5, overlap_px=overlap_px), folder / "cartridges")
    images, cohort = Store(folder / "cartridges"), Cohort.open(str(folder / "cohort"), create=True)
    config = SegmentConfig()
    settings = resolve_settings(config, "fp32")
    (plan,), _ = plan_patients(config, settings, cohort, images, patients=None, retry_failed=False)
    find, cut = CandidateFinder(settings, 1), CellCutter(settings, cohort.store)
    dtype = pixel_type(images, plan.cartridge.fields)
    for field in plan.todo:
        task = FieldTask(field, plan.parts_folder, dtype, plan.channel_map, plan.fingerprint).to_json()
        read = read_fields(pa.table({"task": [task]}, schema=TASK_SCHEMA), cartridges=images, settings=settings)
        assert cut(find(read))["kind"].to_pylist() == [None]
    finish_patient(plan, settings, cohort, images, failures=plan.cartridge.set_aside, workers=[], seconds=0.0)
    record, geometry = read_record(cohort.store, "cells/P01"), plan.cartridge.geometry
    assert record is not None
    assert geometry is not None
    cells = pl.DataFrame(pl.from_arrow(cohort.read_columns("cells/P01", COLUMNS))).join(
        cohort.physical_ids("P01"), on="cell_id"
    )
    truth = pl.DataFrame(pl.from_arrow(images.read_table("truth.parquet")))
    truth = truth.filter(pl.col("kind").is_in([str(kind) for kind in CK_KINDS]))  # the network looks at CK alone
    places = np.array([geometry.place(frame) for frame in truth["field"]])
    rows = truth["row"].to_numpy() + places[:, 0] * (geometry.field_height_px - overlap_px)
    cols = truth["col"].to_numpy() + places[:, 1] * (geometry.field_width_px - overlap_px)
    return cells, truth.with_columns(global_row=pl.Series(rows), global_col=pl.Series(cols)), record.counts


@pytest.mark.slow
@pytest.mark.parametrize(("overlap_px", "min_pairs"), [(0, 3), (10, 6), (60, 30)])
def test_cells_that_two_fields_show_are_one_physical_cell(tmp_path: Path, overlap_px: int, min_pairs: int) -> None:
    cells, truth, counts = physical_cells(tmp_path, overlap_px)
    assert (counts["overlap_row_px"], counts["overlap_col_px"]) == (overlap_px, overlap_px)
    tree = cKDTree(truth.select("global_row", "global_col").to_numpy())
    distance, nearest = tree.query(cells.select("global_row", "global_col").to_numpy())
    true = truth.select(true="physical_id", true_row="global_row", true_col="global_col")[nearest]
    known = pl.concat([cells, true], how="horizontal").filter(pl.Series(distance <= NEAR_PX))
    assert known.height > 0.85 * cells.height
    pairs = known.join(known, on="true").filter(pl.col("field") < pl.col("field_right"))
    assert pairs.height >= min_pairs
    assert (pairs["physical_id"] == pairs["physical_id_right"]).all()
    joined = known.join(known, on="physical_id").filter(pl.col("field") < pl.col("field_right"))
    apart = np.hypot(joined["true_row"] - joined["true_row_right"], joined["true_col"] - joined["true_col_right"])
    assert (apart < NEAR_PX).all()  # the same cell, or two that lie on each other and that no field tells apart
    assert (joined["true"] == joined["true_right"]).sum() >= joined.height - 1
