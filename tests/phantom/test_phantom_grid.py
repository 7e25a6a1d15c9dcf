from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctc_ray.errors import ConfigError
from ctc_ray.phantom.grid import Grid, grid_for


@pytest.mark.parametrize(
    ("num_fields", "rows", "cols"),
    [
        (210, 6, 35),
        (180, 5, 36),
        (175, 5, 35),
        (170, 5, 34),
        (144, 4, 36),
        (140, 4, 35),
        (6, 2, 3),
        (7, 1, 7),
        (1, 1, 1),
    ],
)
def test_grid_for_frame_count_gives_cellsearch_or_squarest_grid(num_fields: int, rows: int, cols: int) -> None:
    assert grid_for(num_fields) == Grid(rows, cols)


def test_place_on_second_row_runs_right_to_left() -> None:
    grid = Grid(5, 35)
    assert grid.place(1) == (0, 0)
    assert grid.place(35) == (0, 34)
    assert grid.place(36) == (1, 34)
    assert grid.place(70) == (1, 0)
    assert grid.place(71) == (2, 0)
    assert grid.place(175) == (4, 34)


@settings(max_examples=40)
@given(rows=st.integers(1, 8), cols=st.integers(1, 40), data=st.data())
def test_frame_at_place_of_a_frame_returns_that_frame(rows: int, cols: int, data: st.DataObject) -> None:
    grid = Grid(rows, cols)
    frame = data.draw(st.integers(1, rows * cols))
    assert grid.frame_at(*grid.place(frame)) == frame


@settings(max_examples=20)
@given(rows=st.integers(1, 8), cols=st.integers(1, 40))
def test_consecutive_frames_are_neighbours(rows: int, cols: int) -> None:
    grid = Grid(rows, cols)
    places = [grid.place(frame) for frame in range(1, grid.num_frames + 1)]
    steps = [abs(a[0] - b[0]) + abs(a[1] - b[1]) for a, b in pairwise(places)]
    assert all(step == 1 for step in steps)


def test_frame_outside_grid_raises_and_frame_at_gives_none() -> None:
    with pytest.raises(ConfigError, match="frame 7"):
        Grid(2, 3).place(7)
    with pytest.raises(ConfigError, match="at least 1 field"):
        grid_for(0)
    assert Grid(2, 3).frame_at(-1, 0) is None
    assert Grid(2, 3).frame_at(0, 3) is None
