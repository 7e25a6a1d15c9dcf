"""The rule for detections of one physical cell, and the overlap it rests on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctc_ray.phantom import PROFILES, draw_field
from ctc_ray.phantom.grid import Grid
from ctc_ray.segment.archive_xml import Geometry
from ctc_ray.segment.duplicates import physical_ids
from ctc_ray.segment.overlap import overlap_from, seam_correlation, seams_of


def name(detections: list[tuple[int, float, float]], *, radius: Any = 8.0, **options: Any) -> list[str]:
    """Physical ids of (field, row, column); probabilities fall with the position in the list."""
    field, row, column = (np.array(values) for values in zip(*detections, strict=True))
    return physical_ids(
        [f"c{index}" for index in range(len(detections))],
        field=field,
        global_row=row,
        global_col=column,
        radius_px=np.broadcast_to(np.asarray(radius, float), len(detections)),
        prob=options.get("prob", np.linspace(0.9, 0.5, len(detections))),
        border_px=np.broadcast_to(np.asarray(options.get("border_px", np.inf), float), len(detections)),
        merge_radius_px=options.get("merge_radius_px", 10.0),
        across_fields=options.get("across_fields", True),
    )


def test_same_cell_in_two_fields_gets_the_id_of_the_more_probable_detection() -> None:
    detections = [(1, 100, 1380), (2, 103, 1384), (2, 300, 1384)]
    assert name(detections) == ["c0", "c0", "c2"]
    assert name(detections, prob=np.array([0.6, 0.8, 0.7])) == ["c1", "c1", "c2"]


def test_detections_farther_than_the_radius_stay_apart() -> None:
    assert name([(1, 0, 0), (2, 0, 10.5)]) == ["c0", "c1"]
    assert name([(1, 0, 0), (2, 0, 10.5)], merge_radius_px=11) == ["c0", "c0"]


def test_two_parts_of_a_cell_that_the_seam_cuts_are_one_cell_up_to_the_radius_of_the_whole() -> None:
    # Halves of a disc of radius 14: each has the area of a disc of 9.9, the centroids lie 0.85 * 14 = 11.9 apart.
    halves = [(1, 100, 1378.0), (2, 100, 1389.9)]
    assert name(halves, radius=9.9, border_px=5.9) == ["c0", "c0"]
    assert name(halves, radius=9.9, border_px=[5.9, 40.0]) == ["c0", "c1"]  # the second is whole: another cell
    # Two whole cells that touch across the seam are farther apart than any two parts of one cell.
    assert name([(1, 100, 1374.0), (2, 100, 1393.8)], radius=9.9, border_px=9.0) == ["c0", "c1"]


def test_fields_without_a_grid_are_never_merged() -> None:
    assert name([(1, 50, 50), (2, 50, 50)], across_fields=False) == ["c0", "c1"]


def test_neighbours_in_one_field_stay_apart_even_near_a_common_twin() -> None:
    # Two touching cells of field 1, both within reach of one detection of field 2: it joins the nearer one.
    assert name([(1, 0, 0), (1, 0, 9), (2, 0, 3)], radius=4.0) == ["c0", "c1", "c0"]


def test_small_outline_inside_a_large_one_is_the_same_cell() -> None:
    assert name([(1, 50, 50), (1, 51, 52)], radius=[12.0, 4.0]) == ["c0", "c0"]
    assert name([(1, 50, 50), (1, 50, 55)], radius=[12.0, 4.0]) == ["c0", "c1"]


def test_corner_cell_in_four_fields_is_one_cell() -> None:
    assert set(name([(1, 0, 0), (2, 2, 0), (3, 0, 2), (4, 2, 2)])) == {"c0"}


def test_no_detections_give_no_ids() -> None:
    empty = np.zeros(0)
    found = physical_ids(
        [], field=empty.astype(int), global_row=empty, global_col=empty, radius_px=empty, prob=empty, border_px=empty,
        merge_radius_px=10, across_fields=True,
    )  # fmt: skip
    assert found == []


@given(
    st.lists(st.tuples(st.integers(1, 3), st.floats(0, 60), st.floats(0, 60)), min_size=1, max_size=25), st.randoms()
)
@settings(max_examples=40, deadline=None)
def test_groups_do_not_depend_on_the_order_and_hold_one_detection_a_field(
    detections: list[tuple[int, float, float]], random: Any
) -> None:
    order = list(range(len(detections)))
    random.shuffle(order)
    prob = np.linspace(0.9, 0.5, len(detections))
    ids = name(detections, radius=0.0, prob=prob)
    shuffled = name([detections[index] for index in order], radius=0.0, prob=prob[order])
    groups = {frozenset(i for i, own in enumerate(ids) if own == one) for one in ids}
    again = {frozenset(order[i] for i, own in enumerate(shuffled) if own == one) for one in shuffled}
    distances = {
        round(float(np.hypot(a[1] - b[1], a[2] - b[2])), 6) for i, a in enumerate(detections) for b in detections[:i]
    }
    if len(distances) == len(detections) * (len(detections) - 1) // 2:  # ties may be settled either way
        assert groups == again
    for group in groups:
        fields = [detections[index][0] for index in group]
        assert len(fields) == len(set(fields))
        assert ids[min(group)] == f"c{min(group)}"


def test_seams_join_neighbours_on_the_serpentine_grid() -> None:
    beside, below = seams_of(Geometry(2, 3, 80, 100), [1, 2, 3, 4, 5, 6])
    assert sorted(beside) == [(1, 2), (2, 3), (5, 4), (6, 5)]
    assert sorted(below) == [(1, 6), (2, 5), (3, 4)]
    assert seams_of(Geometry(2, 3, 80, 100), [1, 5]) == ([], [])


@pytest.mark.parametrize("overlap_px", [0, 10, 60])
def test_overlap_of_phantom_fields_is_measured_to_the_pixel(overlap_px: int) -> None:
    grid = Grid(2, 2)
    pages = {
        frame: draw_field(
            PROFILES["demo"], patient="overlap", field=frame, seed=5, grid=grid, overlap_px=overlap_px
        ).pages[0]
        for frame in (1, 2, 3)
    }
    assert overlap_from([seam_correlation(pages[1], pages[2])], 1036) == overlap_px
    assert overlap_from([seam_correlation(pages[2].T, pages[3].T)], 1384) == overlap_px


def test_overlap_of_unrelated_noise_is_none() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.poisson(9, (2, 300, 200)).astype(np.uint8)
    assert overlap_from([seam_correlation(first, second)], 300) == 0
    assert overlap_from([], 300) == 0
