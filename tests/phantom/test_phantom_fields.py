from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from scipy import ndimage

from ctc_ray.errors import ConfigError
from ctc_ray.phantom import PROFILES, CellKind, PhantomField, draw_field
from ctc_ray.phantom.events import Event, find_events
from ctc_ray.phantom.fields import draw_tile
from ctc_ray.phantom.grid import Grid
from ctc_ray.phantom.kinds import CK_KINDS
from ctc_ray.phantom.patients import PatientFactors
from ctc_ray.schema import TRUTH_SCHEMA

GRID = Grid(1, 2)


def field_of(number: int, *, masks: bool = False, patient: str = "P01", **options: object) -> PhantomField:
    return draw_field(PROFILES["demo"], patient=patient, field=number, seed=9, grid=GRID, masks=masks, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def left() -> PhantomField:
    return field_of(1, masks=True)


@pytest.fixture(scope="module")
def right() -> PhantomField:
    return field_of(2)


def test_field_has_four_pages_and_the_truth_columns(left: PhantomField) -> None:
    assert left.pages.shape == (4, 1036, 1384)
    assert left.pages.dtype == np.uint8
    assert left.truth.columns == TRUTH_SCHEMA.names
    assert left.truth.to_arrow().cast(TRUTH_SCHEMA).schema == TRUTH_SCHEMA
    assert left.truth["row"].is_between(0, 1036).all()
    assert left.truth["col"].is_between(0, 1384).all()
    assert left.truth["physical_id"].is_unique().all()


def test_field_same_arguments_give_same_bytes(left: PhantomField) -> None:
    again = field_of(1)
    assert again.pages.tobytes() == left.pages.tobytes()
    assert again.truth.equals(left.truth)
    assert again.events == left.events
    assert field_of(1, patient="12").pages.tobytes() != left.pages.tobytes()


def test_field_sixteen_bits_hold_the_same_counts(right: PhantomField) -> None:
    sixteen = field_of(2, dtype="uint16")
    assert sixteen.pages.dtype == np.uint16
    assert np.array_equal(sixteen.pages // 16, right.pages)
    assert sixteen.pages.max() <= 4095


def test_cells_in_the_overlap_are_in_both_fields_with_one_physical_id(left: PhantomField, right: PhantomField) -> None:
    both = left.truth.join(right.truth, on="physical_id", suffix="_right")
    assert both.height >= 1
    step = 1384 - 10
    assert np.allclose(both["col"], both["col_right"] + step, atol=1e-3)
    assert np.allclose(both["row"], both["row_right"], atol=1e-3)
    assert both["kind"].equals(both["kind_right"].alias("kind"))
    in_strip = left.truth.filter(pl.col("col") >= step)
    assert in_strip["physical_id"].is_in(right.truth["physical_id"].to_list()).all()


def test_overlap_shows_the_same_cells_in_both_images() -> None:
    wide = {"overlap_px": 120, "dtype": "uint16"}
    first, second = field_of(1, **wide), field_of(2, **wide)
    for page in (0, 2):
        strip, same = first.pages[page, :, -120:].astype(float), second.pages[page, :, :120].astype(float)
        assert not np.array_equal(strip, same)  # each exposure has its own noise
        quiet, too = ndimage.gaussian_filter(strip, 2.0), ndimage.gaussian_filter(same, 2.0)
        assert np.corrcoef(quiet.ravel(), too.ravel())[0, 1] > 0.97


def test_masks_label_the_rows_of_the_truth(left: PhantomField) -> None:
    assert left.ck_mask is not None
    assert left.dapi_mask is not None
    kinds = left.truth["kind"].to_numpy()
    labels = np.unique(left.ck_mask)
    inside = labels[(labels > 0) & (labels <= left.truth.height)]
    assert set(kinds[inside - 1]) <= {str(kind) for kind in CK_KINDS}
    ck_cells = int(np.isin(kinds, [str(kind) for kind in CK_KINDS]).sum())
    assert len(inside) >= 0.97 * ck_cells
    rows, cols = np.nonzero(left.ck_mask)
    owner = left.ck_mask[rows, cols] - 1
    chosen = owner < left.truth.height
    chosen &= kinds[np.minimum(owner, left.truth.height - 1)] == "leukocyte"
    far = np.hypot(
        rows[chosen] - left.truth["row"].to_numpy()[owner[chosen]],
        cols[chosen] - left.truth["col"].to_numpy()[owner[chosen]],
    )
    assert far.max() < 25.0


def test_mask_pixels_are_brighter_in_ck_than_the_background(left: PhantomField) -> None:
    assert left.ck_mask is not None
    ck = left.pages[2].astype(float)
    assert ck[left.ck_mask > 0].mean() > ck[left.ck_mask == 0].mean() + 5.0
    assert field_of(2).ck_mask is None


def test_paper_profile_has_84_ck_objects_a_field() -> None:
    profile, patient = PROFILES["paper"], PatientFactors.draw(2, "P03")
    background = CellKind.BACKGROUND_LEUKOCYTE.code
    counts = [
        int((draw_tile(profile, patient, "P03", field, 2, (1036, 1384)).kind != background).sum())
        for field in range(1, 81)
    ]
    # Standard error of the mean of 80 fields is 15 / sqrt(80) = 1.7.
    assert np.mean(counts) == pytest.approx(84.0, abs=5.1)
    assert np.std(counts) == pytest.approx(15.0, rel=0.25)


def test_field_off_the_grid_raises() -> None:
    with pytest.raises(ConfigError, match="frame 3"):
        field_of(3)


def truth_of(kind: CellKind, row: float, col: float) -> pl.DataFrame:
    return pl.DataFrame({"row": [row], "col": [col], "kind": [str(kind)]})


def test_find_events_lists_ck_with_a_nucleus_and_assigns_true_ctcs() -> None:
    light = np.zeros((3, 60, 80), np.float32)
    light[1, 20:30, 30:42] = 900.0
    light[0, 22:28, 33:38] = 800.0
    assert find_events(light, truth_of(CellKind.CTC, 25.0, 36.0)) == (Event(18, 28, 31, 43, assigned=True),)
    assert not find_events(light, truth_of(CellKind.DEBRIS, 25.0, 36.0))[0].assigned
    light[0] = 0.0
    assert find_events(light, truth_of(CellKind.CTC, 25.0, 36.0)) == ()


def test_find_events_leaves_out_dim_and_tiny_signals() -> None:
    light = np.full((3, 60, 80), 250.0, np.float32)
    light[1, 10:13, 10:13] = 2000.0
    light[1, 30:45, 30:45] = 300.0
    assert find_events(light, truth_of(CellKind.CTC, 37.0, 37.0)) == ()
