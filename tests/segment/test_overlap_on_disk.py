"""From field files with a known overlap to global positions and physical cells, without Ray and without a network.

Detections are the phantom's own outlines of nuclei (there are many, so that seams hold enough of them): what is tested is the
grid, the measured overlap, and the rule for detections of one cell.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest
import tifffile
from scipy import ndimage

from ctc_ray.cohort import Cohort
from ctc_ray.config import PhantomConfig, SegmentConfig
from ctc_ray.phantom import write_phantom
from ctc_ray.records import read_record
from ctc_ray.segment.crops import cells_of_field
from ctc_ray.segment.field_image import read_field
from ctc_ray.segment.finish import finish_patient
from ctc_ray.segment.instances import Instances
from ctc_ray.segment.plan import PatientPlan, part_name, plan_patients, resolve_settings
from ctc_ray.storage import Store

FIELD_SHAPE = (1036, 1384)
Masks = dict[int, npt.NDArray[np.int32]]


@dataclass
class Segmented:
    """A finished cartridge of 2 x 2 fields: its cells with `label` and `true_id` (null for a cell that is centred elsewhere)."""

    cells: pl.DataFrame
    counts: dict[str, int]
    plan: PatientPlan
    masks: Masks


def instances_of(mask: npt.NDArray[np.int32]) -> tuple[Instances, npt.NDArray[np.int32]]:
    """Outlines as detections, and the label of each."""
    numbers = np.unique(mask)[1:]
    labels = np.searchsorted(np.concatenate([[0], numbers]), mask).astype(np.int32)
    boxes = [
        [[rows.start, rows.stop - 1] * 2, [columns.start, columns.stop - 1] * 2]
        for rows, columns in ndimage.find_objects(labels)
    ]
    points = np.array(ndimage.center_of_mass(labels > 0, labels, range(1, len(numbers) + 1))).astype(np.int64)
    prob = np.linspace(0.9, 0.5, len(numbers), dtype=np.float32)
    return Instances(labels, points, prob, np.array(boxes, dtype=np.float32)), numbers


def segment(folder: Path, overlap_px: int) -> Segmented:
    write_phantom(PhantomConfig(patients=1, fields=4, seed=5, overlap_px=overlap_px, masks=True), folder / "cartridges")
    images, cohort = Store(folder / "cartridges"), Cohort.open(str(folder / "cohort"), create=True)
    config = SegmentConfig()
    settings = resolve_settings(config, "fp32")
    (plan,), _ = plan_patients(config, settings, cohort, images, patients=None, retry_failed=False)
    truth = pl.DataFrame(pl.from_arrow(images.read_table("truth.parquet")))
    masks: Masks = {}
    labelled = []
    for field in plan.cartridge.fields:
        path = folder / "cartridges" / ".masks" / "P01" / f"P01p{field.field:03d}_dapi.tif"
        masks[field.field] = tifffile.imread(path).astype(np.int32)
        found, numbers = instances_of(masks[field.field])
        pixels = read_field(images, field, plan.channel_map)
        part = cells_of_field(
            pixels, found, patient="P01", field=field.field, origin=field.origin, fingerprint="f", pixel_size_um=0.64
        )
        cohort.store.write_table(f"{plan.parts_folder}/{part_name(field.field)}", part)
        names = truth.filter(pl.col("field") == field.field)["physical_id"].to_list()
        true = [names[number - 1] if number <= len(names) else None for number in numbers]
        labelled.append(
            pl.DataFrame({"cell_id": part["cell_id"].to_pylist(), "label": numbers, "true_id": pl.Series(true)})
        )
    finish_patient(plan, settings, cohort, images, failures=plan.cartridge.set_aside, workers=[], seconds=0.0)
    record = read_record(cohort.store, "cells/P01")
    assert record is not None
    cells = pl.DataFrame(pl.from_arrow(cohort.read_columns("cells/P01", COLUMNS)))
    cells = cells.join(cohort.physical_ids("P01"), on="cell_id").join(pl.concat(labelled), on="cell_id")
    return Segmented(cells, record.counts, plan, masks)


COLUMNS = ["cell_id", "field", "row", "col", "global_row", "global_col"]


@pytest.mark.parametrize(("overlap_px", "min_pairs"), [(10, 20), (60, 80)])
def test_overlapping_fields_give_one_physical_cell_for_every_cell_seen_twice(
    tmp_path: Path, overlap_px: int, min_pairs: int
) -> None:
    found = segment(tmp_path, overlap_px)
    assert (found.counts["overlap_row_px"], found.counts["overlap_col_px"]) == (overlap_px, overlap_px)
    known = found.cells.filter(pl.col("true_id").is_not_null())
    pairs = known.join(known, on="true_id").filter(pl.col("field") < pl.col("field_right"))
    assert pairs.height >= min_pairs
    assert (pairs["physical_id"] == pairs["physical_id_right"]).all()
    across = known.join(known, on="physical_id").filter(pl.col("field") < pl.col("field_right"))
    assert (across["true_id"] == across["true_id_right"]).all()
    within = known.join(known, on="physical_id").filter(
        (pl.col("field") == pl.col("field_right")) & (pl.col("cell_id") < pl.col("cell_id_right"))
    )
    assert within.height <= 0.003 * known.height  # slivers of nuclei that another one covers
    assert_positions(found, overlap_px)
    # A cell that no border cuts lies at one place of the cartridge, whichever field shows it.
    inner = [
        pl.col(name + side).is_between(12, size - 13)
        for side in ("", "_right")
        for name, size in zip(("row", "col"), FIELD_SHAPE, strict=True)
    ]
    whole = pairs.filter(*inner)
    distance = np.hypot(
        whole["global_row"] - whole["global_row_right"], whole["global_col"] - whole["global_col_right"]
    )
    assert distance.max() <= 1.0 if overlap_px > 24 else whole.is_empty()


def test_abutting_fields_join_the_two_parts_of_a_cell_on_the_seam_and_nothing_else(tmp_path: Path) -> None:
    found = segment(tmp_path, 0)
    assert (found.counts["overlap_row_px"], found.counts["overlap_col_px"]) == (0, 0)
    assert_positions(found, 0)
    names = dict(
        zip(zip(found.cells["field"], found.cells["label"], strict=True), found.cells["physical_id"], strict=True)
    )
    cut = parts_across_seams(found)
    assert len(cut) >= 20
    joined = [names[one] == names[other] for one, other in cut]
    assert all(joined)
    known = found.cells.filter(pl.col("true_id").is_not_null())  # abutting fields show no centre twice
    assert known.join(known, on="physical_id").filter(pl.col("field") < pl.col("field_right")).is_empty()


def assert_positions(found: Segmented, overlap_px: int) -> None:
    """Fields lie a frame less the overlap apart."""
    geometry = found.plan.cartridge.geometry
    assert geometry is not None
    for (field,), cells in found.cells.partition_by("field", as_dict=True).items():
        row, col = geometry.place(field)
        step = np.array(FIELD_SHAPE) - overlap_px
        np.testing.assert_allclose(cells["global_row"] - cells["row"], row * step[0], atol=0.01)
        np.testing.assert_allclose(cells["global_col"] - cells["col"], col * step[1], atol=0.01)


def parts_across_seams(found: Segmented) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(field, label) pairs of one cell in abutting fields: a cell centred elsewhere, and what it touches across the seam most."""
    geometry = found.plan.cartridge.geometry
    assert geometry is not None
    fields = {geometry.place(number): number for number in found.masks}
    seams = [(fields[0, 0], fields[0, 1], 1), (fields[1, 0], fields[1, 1], 1)]
    seams += [(fields[0, 0], fields[1, 0], 0), (fields[0, 1], fields[1, 1], 0)]
    unknown = set(found.cells.filter(pl.col("true_id").is_null()).select("field", "label").iter_rows())
    pairs = []
    for first, second, axis in seams:
        here, there = np.take(found.masks[first], -1, axis), np.take(found.masks[second], 0, axis)
        touching, counts = np.unique(np.stack([here, there])[:, (here > 0) & (there > 0)], axis=1, return_counts=True)
        for one, other in touching[:, np.argsort(counts)].T:
            ends = ((first, int(one)), (second, int(other)))
            if (ends[0] in unknown) != (ends[1] in unknown):
                pairs.append(ends)
    return [*{(ends[0] if ends[0] in unknown else ends[1]): ends for ends in pairs}.values()]
