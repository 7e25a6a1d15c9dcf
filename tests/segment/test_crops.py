"""Windows and measurements against loops and scikit-image."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.measure import regionprops

from ctc_ray.errors import SchemaError
from ctc_ray.schema import STATISTICS, Channel, cell_id, cells_schema, unpack_pixels
from ctc_ray.segment.crops import cells_of_field, cut_crops, measure, window_origins
from ctc_ray.segment.instances import Candidates, Instances, instances_from_candidates

SHAPE = (120, 150)


def found_discs(points: list[tuple[int, int]], radius_px: float = 7.0, shape: tuple[int, int] = SHAPE) -> Instances:
    prob = np.linspace(0.9, 0.6, len(points)).astype(np.float32)
    dist = np.full((len(points), 32), radius_px, np.float32)
    dist[:, :8] *= 1.4
    return instances_from_candidates(
        Candidates(prob, dist, np.array(points, np.int64).reshape(-1, 2), shape), nms_thresh=0.5
    )


def field_image(dtype: str = "uint8") -> np.ndarray:
    return np.random.default_rng(3).integers(0, 250, (3, *SHAPE)).astype(dtype)


@given(st.floats(-5, 125), st.floats(-5, 155), st.floats(1, 20))
@settings(max_examples=50, deadline=None)
def test_window_is_inside_and_centred_unless_shifted(row: float, column: float, radius: float) -> None:
    polygon = np.array([[[row - radius, row + radius], [column, column]]], np.float32)
    (origin,), (shifted,) = window_origins(polygon, SHAPE)
    assert 0 <= origin[0] <= SHAPE[0] - 48
    assert 0 <= origin[1] <= SHAPE[1] - 48
    centre = np.trunc(np.array([polygon[0, 0].mean(), polygon[0, 1].mean()])).astype(int)
    assert shifted == (tuple(origin + 24) != tuple(centre))


def test_crops_equal_slices_one_by_one() -> None:
    image = field_image()
    origins = np.array([[0, 0], [72, 102], [13, 57]])
    crops = cut_crops(image, origins)
    for crop, (row, column) in zip(crops, origins, strict=True):
        np.testing.assert_array_equal(crop, image[:, row : row + 48, column : column + 48])


def test_measurements_equal_regionprops() -> None:
    image = field_image("uint16")
    found = found_discs([(20, 20), (24, 31), (60, 100), (0, 149)])
    measured = measure(found.labels, image, len(found))
    for region in regionprops(found.labels):
        at = region.label - 1
        assert measured["area_px"][at] == region.area
        np.testing.assert_allclose((measured["row"][at], measured["col"][at]), region.centroid)
        assert measured["eccentricity"][at] == pytest.approx(region.eccentricity, abs=1e-6)
        values = image[Channel.CD45][found.labels == region.label].astype(float)
        assert measured["cd45_mean"][at] == pytest.approx(values.mean())
        assert measured["cd45_max"][at] == values.max()
        assert measured["cd45_sd"][at] == pytest.approx(values.std())


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_cells_of_a_field_follow_the_schema_and_hold_their_pixels(dtype: str) -> None:
    image, found = field_image(dtype), found_discs([(60, 75), (5, 140)])
    table = cells_of_field(
        image, found, patient="007", field=3, origin=(1036, 2768), fingerprint="abc", pixel_size_um=0.64
    )
    assert table.schema.equals(cells_schema(dtype), check_metadata=True)
    cells = table.drop(["pixels"]).to_pylist()
    assert cells[0]["cell_id"] == cell_id("007", 3, 60, 75, "abc")
    assert [cell["at_edge"] for cell in cells] == [False, True]
    assert (cells[1]["y0"], cells[1]["x0"]) == (0, 150 - 48)
    assert cells[0]["global_row"] == pytest.approx(cells[0]["row"] + 1036)
    assert cells[0]["global_col"] == pytest.approx(cells[0]["col"] + 2768)
    assert cells[0]["diameter_um"] == pytest.approx(2 * np.sqrt(cells[0]["area_px"] / np.pi) * 0.64, rel=1e-6)
    assert all(cells[0][name] >= 0 for name in STATISTICS)
    crops = unpack_pixels(table["pixels"], table.schema.field("pixels"))
    y0, x0 = cells[0]["y0"], cells[0]["x0"]
    np.testing.assert_array_equal(crops[0], image[:, y0 : y0 + 48, x0 : x0 + 48])


def test_field_without_cells_gives_an_empty_table() -> None:
    table = cells_of_field(
        field_image(), found_discs([]), patient="A", field=1, origin=(0, 0), fingerprint="", pixel_size_um=0.64
    )
    assert table.num_rows == 0
    assert table.schema.equals(cells_schema("uint8"))


def test_instance_hidden_by_a_better_one_is_left_out() -> None:
    found = found_discs([(60, 75), (20, 30)])
    labels = found.labels.copy()
    labels[labels == 1] = 2
    hidden = Instances(labels, found.points, found.prob, found.polygons)
    table = cells_of_field(
        field_image(), hidden, patient="A", field=1, origin=(0, 0), fingerprint="", pixel_size_um=0.64
    )
    assert table["point_row"].to_pylist() == [20]


def test_labels_of_another_size_are_refused() -> None:
    with pytest.raises(SchemaError, match="differ in size"):
        cells_of_field(
            field_image()[:, :100],
            found_discs([]),
            patient="A",
            field=1,
            origin=(0, 0),
            fingerprint="",
            pixel_size_um=1,
        )
