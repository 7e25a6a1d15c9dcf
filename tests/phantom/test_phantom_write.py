from __future__ import annotations

import hashlib
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import polars as pl
import pytest
import tifffile

from ctc_ray.config import PhantomConfig
from ctc_ray.errors import ConfigError, StaleOutputError
from ctc_ray.phantom import PROFILES, draw_field, write_phantom
from ctc_ray.phantom.archive import FILTER_NAMES
from ctc_ray.phantom.grid import grid_for
from ctc_ray.phantom.write import patient_names

IDS = ("007", "12", "Müller 3")
SETTINGS = PhantomConfig(patient_ids=IDS[:2], fields=4, seed=3)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phantom") / "cartridges"
    write_phantom(SETTINGS, out)
    return out


def test_write_phantom_makes_the_cellsearch_layout(cohort: Path) -> None:
    for patient in IDS[:2]:
        folder = cohort / patient / "processed"
        names = sorted(path.name for path in folder.iterdir())
        assert names == sorted([f"{patient}.xml", *(f"{patient}p{frame:03d}.tif" for frame in range(1, 5))])
    assert {path.name for path in cohort.iterdir()} == {*IDS[:2], "truth.parquet", "phantom.json"}


def test_written_tiff_holds_the_drawn_pages(cohort: Path) -> None:
    with tifffile.TiffFile(cohort / "007" / "processed" / "007p003.tif") as tiff:
        assert len(tiff.pages) == 4
        pages = np.stack([page.asarray() for page in tiff.pages])
    drawn = draw_field(PROFILES["demo"], patient="007", field=3, seed=3, grid=grid_for(4))
    assert np.array_equal(pages, drawn.pages)


def test_xml_holds_grid_filters_and_events_in_global_coordinates(cohort: Path) -> None:
    root = ElementTree.parse(cohort / "007" / "processed" / "007.xml").getroot()
    assert root.tag == "archive"
    run = root.find("runs/record")
    assert run is not None
    assert [run.findtext(tag) for tag in ("numrows", "numcols", "camxsize", "camysize")] == ["2", "2", "1384", "1036"]
    assert tuple(item.text for item in root.findall("test_filters/record/filtername")) == FILTER_NAMES
    truth = pl.read_parquet(cohort / "truth.parquet").filter(patient="007")
    grid, records = grid_for(4), root.findall("events/record")
    assert [int(record.findtext("rid", "")) for record in records] == list(range(1, len(records) + 1))
    assert {record.findtext("assigned") for record in records} == {"true", "false"}
    for record in records:
        frame = int(record.findtext("framenum", ""))
        far_x, far_y, near_x, near_y = map(int, re.findall(r"\d+", record.findtext("location", "")))
        row, col = grid.place(frame)
        assert row * 1036 <= near_y < far_y < (row + 1) * 1036
        assert col * 1384 <= near_x < far_x < (col + 1) * 1384
        inside = truth.filter(
            (pl.col("field") == frame)
            & pl.col("row").is_between(near_y - row * 1036, far_y - row * 1036)
            & pl.col("col").is_between(near_x - col * 1384, far_x - col * 1384)
            & pl.col("kind").is_in(["ctc", "ctc_in_dense_dapi"])
        )
        assert (record.findtext("assigned") == "true") == (inside.height > 0)
        assert int(record.findtext("numselected", "")) == int(inside.height > 0)


def test_truth_of_the_cohort_counts_appearances_and_shares_physical_ids(cohort: Path) -> None:
    truth = pl.read_parquet(cohort / "truth.parquet")
    assert truth.select(pl.struct("field", "physical_id").is_unique().all()).item()
    seen = truth.group_by("physical_id").agg(pl.col("field").n_unique().alias("fields"), pl.col("patient").n_unique())
    assert (seen["patient"] == 1).all()
    shared = seen.filter(pl.col("fields") > 1).height
    # Four frames of a 2x2 grid share strips of 10 px: about 1 % of the cells.
    assert 0.003 * truth.height < shared < 0.05 * truth.height


def test_write_phantom_twice_reuses_and_repairs(cohort: Path) -> None:
    before = digests(cohort)
    again = write_phantom(SETTINGS, cohort)
    assert (again.fields_written, again.fields_reused) == (0, 8)
    (cohort / "12" / "processed" / "12p002.tif").unlink()
    mended = write_phantom(SETTINGS, cohort)
    assert (mended.fields_written, mended.fields_reused) == (4, 4)
    assert digests(cohort) == before


def test_write_phantom_other_settings_raise_unless_forced(tmp_path: Path) -> None:
    small = PhantomConfig(patient_ids=("007",), fields=1, seed=1)
    write_phantom(small, tmp_path)
    other = small.model_copy(update={"seed": 2})
    with pytest.raises(StaleOutputError, match=r"seed differ.*another folder"):
        write_phantom(other, tmp_path)
    before = digests(tmp_path)
    assert write_phantom(other, tmp_path, force=True).fields_written == 1
    assert digests(tmp_path).keys() == before.keys()
    assert digests(tmp_path) != before


def test_write_phantom_more_patients_leave_the_others_as_they_are(tmp_path: Path) -> None:
    write_phantom(PhantomConfig(patient_ids=("007",), fields=1), tmp_path)
    before = digests(tmp_path / "007")
    result = write_phantom(PhantomConfig(patient_ids=("007", "Müller 3"), fields=1), tmp_path)
    assert (result.fields_written, result.fields_reused) == (1, 1)
    assert digests(tmp_path / "007") == before
    assert set(pl.read_parquet(tmp_path / "truth.parquet")["patient"]) == {"007", "Müller 3"}


def test_write_phantom_interrupted_between_patients_gives_the_same_cohort(tmp_path: Path) -> None:
    settings = PhantomConfig(patient_ids=("007", "Müller 3"), fields=1)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    write_phantom(settings, whole)
    blocker = broken / "Müller 3"
    blocker.parent.mkdir()
    blocker.write_text("a file where a folder must go")
    with pytest.raises(OSError, match="cannot write"):
        write_phantom(settings, broken)
    blocker.unlink()
    result = write_phantom(settings, broken)
    assert (result.fields_written, result.fields_reused) == (1, 1)
    assert digests(broken) == digests(whole)


def test_write_phantom_masks_and_sixteen_bits_on_request(tmp_path: Path) -> None:
    write_phantom(PhantomConfig(patient_ids=("007",), fields=1, masks=True, bit_depth=16), tmp_path)
    image = tifffile.imread(tmp_path / "007" / "processed" / "007p001.tif")
    mask = tifffile.imread(tmp_path / ".masks" / "007" / "007p001_ck.tif")
    assert image.dtype == np.uint16
    assert mask.shape == (1036, 1384)
    truth = pl.read_parquet(tmp_path / "truth.parquet")
    assert truth["kind"].to_numpy()[mask.max() - 1] or mask.max() > truth.height
    assert len(np.unique(mask)) > 50


def test_patient_names_default_and_refuse_bad_ones() -> None:
    assert patient_names(PhantomConfig(patients=3)) == ("P01", "P02", "P03")
    assert patient_names(PhantomConfig(patient_ids=IDS)) == IDS
    with pytest.raises(ConfigError, match="twice"):
        patient_names(PhantomConfig(patient_ids=("007", "007")))
    with pytest.raises(ConfigError, match="cannot name a folder"):
        patient_names(PhantomConfig(patient_ids=("a/b",)))
    with pytest.raises(ConfigError, match="demo, paper"):
        write_phantom(PhantomConfig(profile="moon"), "unused")


@pytest.mark.slow
def test_write_phantom_bytes_do_not_depend_on_the_workers(cohort: Path, tmp_path: Path) -> None:
    write_phantom(SETTINGS, tmp_path, workers=2)
    assert digests(tmp_path) == digests(cohort)
