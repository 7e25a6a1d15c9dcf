"""Busy times, from cases that can be counted on fingers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctc_ray.ingest.statistics import busy_of, covered_seconds, merged, shared_seconds


def intervals(*pairs: tuple[float, float]) -> np.ndarray:
    return np.array(pairs, float).reshape(-1, 2)


def test_touching_and_nested_intervals_become_one() -> None:
    found = merged(intervals((5, 6), (0, 2), (1, 3), (3, 4), (1, 2)))
    assert found.tolist() == [[0, 4], [5, 6]]
    assert merged(intervals()).shape == (0, 2)


@pytest.mark.parametrize(
    ("first", "second", "seconds"),
    [
        ([(0, 10)], [(0, 10)], 10),
        ([(0, 10)], [(4, 6), (5, 7)], 3),
        ([(0, 2), (8, 9)], [(2, 8)], 0),
        ([(0, 4), (2, 6)], [(5, 9), (1, 2)], 2),
        ([], [(0, 1)], 0),
    ],
)
def test_shared_seconds_are_those_in_which_both_worked(
    first: list[tuple[float, float]], second: list[tuple[float, float]], seconds: float
) -> None:
    assert shared_seconds(intervals(*first), intervals(*second)) == pytest.approx(seconds)
    assert shared_seconds(intervals(*second), intervals(*first)) == pytest.approx(seconds)


whole_seconds = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 8)).map(lambda p: (p[0], p[0] + p[1])), max_size=9
)


@given(whole_seconds, whole_seconds)
def test_seconds_equal_those_counted_one_by_one(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> None:
    a, b = ({second for start, end in kind for second in range(start, end)} for kind in (first, second))
    assert covered_seconds(intervals(*first)) == pytest.approx(len(a))
    assert shared_seconds(intervals(*first), intervals(*second)) == pytest.approx(len(a & b))


def test_busy_times_of_rows_leave_out_steps_that_did_not_run() -> None:
    rows = [
        {"network_start": 0.0, "network_end": 4.0, "embed_start": 5.0, "embed_end": 7.0},
        {"network_start": 4.0, "network_end": 6.0, "embed_start": 5.0, "embed_end": 7.0},
        {"network_start": None, "network_end": None, "embed_start": None, "embed_end": None},
        {"network_start": None, "network_end": None, "embed_start": 8.0, "embed_end": 9.0},
    ]
    busy = busy_of(rows)
    assert (busy.network, busy.embedding, busy.both, busy.either) == pytest.approx((6.0, 3.0, 1.0, 8.0))
    assert "both at once for 1.0 s (12% of the 8.0 s" in busy.sentence()
    assert busy_of([]).either == 0
    assert "(0%" in busy_of([]).sentence()
