from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctc_ray.detect.matching import Boxes, admissible, assign, centre_distance
from ctc_ray.errors import SchemaError


def _boxes(*rows: tuple[int, float, float, float]) -> Boxes:
    values = np.array(rows, dtype=float).reshape(-1, 4)
    return Boxes.around(values[:, 0].astype(int), values[:, 1:3], values[:, 3])


def test_admissible_same_place_in_another_field_is_no_match() -> None:
    assert not admissible(_boxes((1, 50, 50, 20)), _boxes((2, 50, 50, 20)), tolerance_px=30, min_overlap=0.75).any()


def test_admissible_small_box_inside_a_large_one_counts_as_overlap() -> None:
    allowed = admissible(_boxes((1, 50, 50, 10)), _boxes((1, 60, 60, 60)), tolerance_px=30, min_overlap=0.75)
    assert allowed.tolist() == [[True]]


def test_admissible_tolerance_is_per_axis() -> None:
    left, far = _boxes((1, 50, 50, 10)), _boxes((1, 79, 79, 80), (1, 81, 50, 80))
    assert admissible(left, far, tolerance_px=30, min_overlap=0.5).tolist() == [[True, False]]


def test_admissible_overlap_of_three_quarters_is_not_above_it() -> None:
    left = Boxes(np.array([1]), np.array([[0.0, 0.0]]), np.array([[10.0, 10.0]]))
    right = Boxes(np.array([1, 1]), np.array([[2.5, 0.0], [2.4, 0.0]]), np.array([[12.5, 10.0], [12.4, 10.0]]))
    assert admissible(left, right, tolerance_px=30, min_overlap=0.75).tolist() == [[False, True]]


def test_admissible_empty_side_gives_an_empty_matrix() -> None:
    assert admissible(_boxes(), _boxes((1, 1, 1, 1)), tolerance_px=30, min_overlap=0.5).shape == (0, 1)


def test_centre_distance_between_fields_is_infinite() -> None:
    distance = centre_distance(_boxes((1, 0, 0, 4)), _boxes((1, 3, 4, 4), (2, 0, 0, 4)))
    assert distance.tolist() == [[5.0, np.inf]]


def test_assign_greedy_choice_would_lose_a_pair_keeps_both() -> None:
    pairs = assign(np.array([[1.0, 2.0], [1.5, np.inf]]), np.array([[True, True], [True, False]]))
    assert sorted(zip(pairs.left.tolist(), pairs.right.tolist(), strict=True)) == [(0, 1), (1, 0)]


def test_assign_nothing_allowed_gives_no_pairs() -> None:
    assert len(assign(np.ones((2, 3)), np.zeros((2, 3), bool)).left) == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 10_000))
def test_assign_any_matrix_agrees_with_trying_all_pairings(rows: int, columns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    distance, allowed = rng.uniform(0, 50, (rows, columns)), rng.random((rows, columns)) < 0.6
    pairs = assign(np.where(allowed, distance, np.inf), allowed)
    assert allowed[pairs.left, pairs.right].all()
    assert len(set(pairs.left.tolist())) == len(pairs.left)
    assert len(set(pairs.right.tolist())) == len(pairs.right)
    size = max(rows, columns)
    best = (0, 0.0)
    for order in permutations(range(size)):
        chosen = [(i, j) for i, j in enumerate(order) if i < rows and j < columns and allowed[i, j]]
        best = max(best, (len(chosen), -sum(distance[i, j] for i, j in chosen)))
    assert len(pairs.left) == best[0]
    assert pairs.distance_px.sum() == pytest.approx(-best[1])


def test_boxes_far_corner_before_near_corner_is_refused() -> None:
    with pytest.raises(SchemaError, match="far corner"):
        Boxes(np.array([1]), np.array([[5.0, 5.0]]), np.array([[4.0, 9.0]]))
