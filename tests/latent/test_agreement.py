"""Agreement of two maps, against scikit-learn and against trying every matching."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

from ctc_ray.errors import SchemaError
from ctc_ray.latent.agreement import (
    SharedCells,
    adjusted_rand,
    equal_share,
    match_clusters,
    summarise_agreement,
    trustworthiness,
)

PAIRS = st.lists(st.tuples(st.integers(-1, 3), st.integers(-1, 3)), min_size=1, max_size=40)


def shared_of(pairs: list[tuple[int, int]]) -> SharedCells:
    shared = SharedCells()
    half = len(pairs) // 2
    for part in (pairs[:half], pairs[half:]):  # tables of shards add up
        if part:
            first, second = np.array(part, np.int16).T
            shared.add(first, second)
    return shared


@settings(max_examples=100, deadline=None)
@given(PAIRS)
def test_adjusted_rand_agrees_with_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    first, second = zip(*pairs, strict=True)
    shared = shared_of(pairs)
    assert adjusted_rand(shared.table()[2]) == pytest.approx(adjusted_rand_score(first, second))
    kept = [(a, b) for a, b in pairs if a != -1 and b != -1]
    found = summarise_agreement(shared)
    assert found["num_cells_clustered_by_both"] == len(kept)
    if kept:
        expected = adjusted_rand_score(*zip(*kept, strict=True))
        assert found["adjusted_rand_of_clustered"] == pytest.approx(expected)
    assert found["num_background"] == first.count(-1)
    assert found["num_background_other"] == second.count(-1)


@settings(max_examples=60, deadline=None)
@given(PAIRS)
def test_equal_share_is_that_of_the_best_of_all_matchings(pairs: list[tuple[int, int]]) -> None:
    names = range(4)
    best = max(sum(b == (-1 if a == -1 else partner[a]) for a, b in pairs) for partner in itertools.permutations(names))
    assert equal_share(shared_of(pairs)) == pytest.approx(best / len(pairs))


def test_renumbered_clusters_agree_wholly_and_unrelated_ones_do_not() -> None:
    rng = np.random.default_rng(0)
    first = rng.integers(-1, 4, 4000)
    renamed = np.where(first == -1, -1, 3 - first)
    same, other = SharedCells(), SharedCells()
    same.add(first, renamed)
    other.add(first, rng.permutation(first))
    assert summarise_agreement(same)["adjusted_rand"] == summarise_agreement(same)["equal_share"] == 1.0
    assert match_clusters(same) == {-1: -1, 0: 3, 1: 2, 2: 1, 3: 0}
    unrelated = summarise_agreement(other)
    assert abs(unrelated["adjusted_rand"] or 1) < 0.02
    assert (unrelated["equal_share"] or 1) < 0.3


def test_a_million_cells_do_not_overflow() -> None:
    counts = np.array([[400_000_000, 100_000_000], [50_000_000, 450_000_000]])
    assert adjusted_rand(counts) == pytest.approx(adjusted_rand(counts // 1_000_000), abs=1e-3)


def test_no_cells_give_null_and_unequal_lengths_are_refused() -> None:
    assert adjusted_rand(np.zeros((0, 0), np.int64)) is None
    assert equal_share(SharedCells()) is None
    assert summarise_agreement(SharedCells())["adjusted_rand"] is None
    with pytest.raises(SchemaError, match="3 clusters and 2"):
        SharedCells().add(np.zeros(3, np.int16), np.zeros(2, np.int16))


def test_trustworthiness_is_one_for_the_same_plane_and_about_half_for_chance() -> None:
    rng = np.random.default_rng(0)
    places = rng.normal(size=(300, 2))
    assert trustworthiness(places, places * 3) == pytest.approx(1.0)
    assert trustworthiness(places, rng.normal(size=(300, 2))) == pytest.approx(0.5, abs=0.06)
    assert trustworthiness(places[:4], places[:4]) is None
