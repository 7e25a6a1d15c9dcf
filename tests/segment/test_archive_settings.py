"""What an archive tells, on its way through the steps of the stage, without Ray: pages, contrast, grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import tifffile

from ctc_ray.cohort import Cohort
from ctc_ray.config import SegmentConfig
from ctc_ray.errors import StaleOutputError
from ctc_ray.records import State, read_record
from ctc_ray.schema import STATISTICS, Channel, cells_schema
from ctc_ray.segment.cells_step import CellCutter
from ctc_ray.segment.field_image import pixel_type
from ctc_ray.segment.finish import finish_patient
from ctc_ray.segment.network_step import CandidateFinder
from ctc_ray.segment.plan import PatientPlan, Settings, plan_patients, refuse_stale, resolve_settings
from ctc_ray.segment.read_step import TASK_SCHEMA, FieldTask, read_fields
from ctc_ray.storage import Store

SHAPE = (144, 176)
USUAL = ("DNA", "FITC", "CK-PE", "CD45-APC")


def write_archive(
    root: Path,
    patient: str,
    names: tuple[str, ...] | None = USUAL,
    *,
    num_fields: int = 2,
    limits: tuple[int, int] | None = None,
    grid: bool = True,
) -> None:
    """Fields of one seed whatever the order of their pages; page `CK-PE` shows the same cells under any name order."""
    folder = root / patient / "processed"
    folder.mkdir(parents=True)
    order = [USUAL.index(name) for name in names or USUAL]
    for frame in range(1, num_fields + 1):
        image = np.random.default_rng(frame).poisson(6.0, (4, *SHAPE))
        for page, level in enumerate((150, 20, 220, 60)):
            image[page, 60:70, 80:90] = level
        tags = [] if limits is None else [(754, "H", 1, 1, False)]
        tags += [] if limits is None else [(755 + n, "H", 1, value, False) for n, value in enumerate(limits)]
        with tifffile.TiffWriter(folder / f"x_p{frame}.tif") as writer:
            for page in image[order].astype(np.uint8):
                writer.write(page, photometric="minisblack", metadata=None, contiguous=False, extratags=tags)
    filters = "".join(f"<record><filtername>{name}</filtername></record>" for name in names or ())
    run = f"<numrows>1</numrows><numcols>{num_fields}</numcols><camxsize>{SHAPE[1]}</camxsize><camysize>{SHAPE[0]}</camysize>"
    runs = f"<runs><record>{run}</record></runs>" if grid else ""
    (folder / f"{patient}.xml").write_text(f"<archive>{runs}<test_filters>{filters}</test_filters></archive>")


def plan_all(config: SegmentConfig, cohort: Cohort, root: Path, **options: bool) -> tuple[Settings, list[PatientPlan]]:
    settings = resolve_settings(config, "fp32")
    retry = options.get("retry_failed", False)
    plans, _ = plan_patients(config, settings, cohort, Store(str(root)), patients=None, retry_failed=retry)
    return settings, plans


def segment(config: SegmentConfig, cohort: Cohort, root: Path) -> dict[str, pl.DataFrame]:
    """All steps of the stage, one after the other."""
    settings, plans = plan_all(config, cohort, root)
    images = Store(str(root))
    find, cut = CandidateFinder(settings, 1), CellCutter(settings, cohort.store)
    cells = {}
    for plan in plans:
        dtype = pixel_type(images, plan.cartridge.fields, settings.contrast)
        tasks = [
            FieldTask(field, plan.parts_folder, dtype, plan.channel_map, plan.fingerprint).to_json()
            for field in plan.todo
        ]
        table = pa.table({"task": tasks}, schema=TASK_SCHEMA)
        statuses = cut(find(read_fields(table, cartridges=images, settings=settings)))
        failures = list(plan.cartridge.set_aside)
        assert statuses["kind"].null_count == statuses.num_rows, statuses["message"].to_pylist()
        finish_patient(plan, settings, cohort, images, failures=failures, workers=[], seconds=0.0)
        shards = [cohort.store.read_table(path) for path in cohort.shards(cohort.cells(plan.patient))]
        assert all(shard.schema.equals(cells_schema(dtype), check_metadata=True) for shard in shards)
        cells[plan.patient] = pl.concat([pl.DataFrame(pl.from_arrow(shard)) for shard in shards])
    return cells


@pytest.fixture
def cohort(tmp_path: Path) -> Cohort:
    return Cohort.open(str(tmp_path / "cohort"), create=True)


def test_pages_in_another_order_give_the_same_cells_under_other_names(
    tmp_path: Path, cohort: Cohort, bright_spot_weights: Path
) -> None:
    root = tmp_path / "cartridges"
    write_archive(root, "usual")
    write_archive(root, "turned", ("CK-PE", "CD45-APC", "DNA", "FITC"))
    write_archive(root, "unnamed", None)
    cells = segment(SegmentConfig(weights=str(bright_spot_weights)), cohort, root)
    same = ["field", "row", "col", "area_px", "pixels", *STATISTICS]
    assert cells["usual"].height > 0
    assert cells["turned"].select(same).equals(cells["usual"].select(same))
    assert cells["unnamed"].select(same).equals(cells["usual"].select(same))
    assert not set(cells["turned"]["cell_id"]) & set(cells["usual"]["cell_id"])
    _, plans = plan_all(SegmentConfig(weights=str(bright_spot_weights)), cohort, root)
    assert [plan.state for plan in plans] == [State.COMPLETE] * 3
    prints = {plan.patient: plan.fingerprint for plan in plans}
    assert prints["usual"] == prints["unnamed"] != prints["turned"]


def test_channel_map_of_the_user_comes_before_the_names_of_the_filters(
    tmp_path: Path, cohort: Cohort, bright_spot_weights: Path
) -> None:
    root = tmp_path / "cartridges"
    write_archive(root, "turned", ("CK-PE", "CD45-APC", "DNA", "FITC"))
    config = SegmentConfig(weights=str(bright_spot_weights), channel_map={"DAPI": 1, "CK": 0, "CD45": None})
    settings, (plan,) = plan_all(config, cohort, root)
    assert plan.channel_map == {Channel.DAPI: 1, Channel.CK: 0, Channel.CD45: None}
    assert plan.fingerprint == settings.fingerprint


def test_usual_pages_given_or_not_are_one_configuration(bright_spot_weights: Path) -> None:
    silent = resolve_settings(SegmentConfig(weights=str(bright_spot_weights)), "fp32")
    given = SegmentConfig(weights=str(bright_spot_weights), channel_map={"DAPI": 0, "CK": 2, "CD45": 3})
    assert resolve_settings(given, "fp32").fingerprint == silent.fingerprint
    assert resolve_settings(given, "fp32").identity == silent.identity
    assert "contrast" not in silent.identity


def test_unstretched_cells_have_12_bit_counts_and_names_of_their_own(
    tmp_path: Path, cohort: Cohort, bright_spot_weights: Path
) -> None:
    root = tmp_path / "cartridges"
    write_archive(root, "A", limits=(100, 2100))
    raw = segment(SegmentConfig(weights=str(bright_spot_weights)), cohort, root)["A"]
    other = Cohort.open(str(tmp_path / "other"), create=True)
    restored = segment(SegmentConfig(weights=str(bright_spot_weights), contrast="unstretched"), other, root)["A"]
    assert raw["ck_max"].max() == 220
    assert restored["ck_max"].max() == 2100
    assert restored["ck_mean"].min() > 100
    assert not set(raw["cell_id"]) & set(restored["cell_id"])
    for place in (cohort, other):
        table = place.store.read_table("contrast/A.parquet")
        assert table["field"].to_pylist() == [1] * 4 + [2] * 4
        assert table["page"].to_pylist() == [0, 1, 2, 3] * 2
        assert set(table["lower"].to_pylist()) == {100}
        assert set(table["upper"].to_pylist()) == {2100}


def test_cartridge_without_limits_leaves_no_table_of_them(
    tmp_path: Path, cohort: Cohort, bright_spot_weights: Path
) -> None:
    write_archive(tmp_path / "cartridges", "A")
    segment(SegmentConfig(weights=str(bright_spot_weights)), cohort, tmp_path / "cartridges")
    assert not cohort.store.exists("contrast/A.parquet")


def test_mended_xml_needs_new_cells_since_their_positions_change(
    tmp_path: Path, cohort: Cohort, bright_spot_weights: Path
) -> None:
    root = tmp_path / "cartridges"
    write_archive(root, "A")
    xml = root / "A" / "processed" / "A.xml"
    whole = xml.read_text()
    fields = sorted((root / "A" / "processed").glob("*.tif"))
    for path in fields:  # the nominal size, since without an xml no other is known
        image = np.random.default_rng(1).poisson(6.0, (4, 1036, 1384)).astype(np.uint8)
        image[:, 500:510, 600:610] = 200
        tifffile.imwrite(path, image, photometric="minisblack")
    xml.write_text("<archive")
    config = SegmentConfig(weights=str(bright_spot_weights))
    cells = segment(config, cohort, root)["A"]
    assert cells["global_col"].equals(cells["col"])
    record = read_record(cohort.store, "cells/A")
    assert record is not None
    assert (record.counts["failed"], record.counts["archive_failures"]) == (0, 1)
    xml.write_text(whole)
    _, plans = plan_all(config, cohort, root, retry_failed=True)
    with pytest.raises(StaleOutputError):
        refuse_stale(cohort, plans, force=False)
