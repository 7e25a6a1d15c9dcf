"""What strategies choose, and the quotas of cluster-f1."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctc_ray.errors import ConfigError
from ctc_ray.hil.pools import Problem
from ctc_ray.hil.quotas import share_out
from ctc_ray.hil.scores import Score
from ctc_ray.hil.state import LoopState
from ctc_ray.hil.strategies import STRATEGIES, choose_cluster_f1, strategy_named
from ctc_ray.hil.svm import Classifier
from ctc_ray.hil.uncertain import choose_margin


def _state(problem: Problem, f1: dict[int, float | None], count: int = 30) -> LoopState:
    labelled = np.arange(0, 40)
    state = LoopState(
        problem.train.features,
        problem.train.clusters,
        labelled,
        problem.train.labels[labelled],
        np.arange(40, len(problem.train)),
        seed=7,
    )
    classifier = Classifier.fit(state.features[labelled], state.answers)
    return state.with_evidence(classifier, {c: Score(v, v, v, 10) for c, v in f1.items()}, count)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 200),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 60)), min_size=1, max_size=7),
)
def test_share_out_any_weights_gives_all_it_can_within_what_there_is(count: int, rows: list[tuple[float, int]]) -> None:
    weights = np.array([w for w, _ in rows])
    available = np.array([a for _, a in rows])
    quotas = share_out(count, weights, available)
    assert np.all((quotas >= 0) & (quotas <= available))
    assert quotas.sum() == min(count, available.sum())


def test_share_out_ample_clusters_follows_the_weights() -> None:
    assert share_out(100, np.array([0.6, 0.3, 0.1, 0.0]), np.full(4, 1000)).tolist() == [60, 30, 10, 0]


def test_share_out_short_cluster_gives_its_rest_to_the_others_by_weight() -> None:
    assert share_out(100, np.array([0.8, 0.15, 0.05]), np.array([20, 500, 500])).tolist() == [20, 60, 20]


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_strategy_chooses_distinct_cells_of_the_pool_and_repeats_with_the_seed(problem: Problem, name: str) -> None:
    state = _state(problem, {0: 0.2, 1: 0.9, 2: 0.5, 3: 1.0})
    chosen = STRATEGIES[name].choose(state, np.random.default_rng(3))
    assert len(chosen) == len(set(chosen.tolist())) == 30
    assert np.isin(chosen, state.pool).all()
    assert np.array_equal(chosen, STRATEGIES[name].choose(state, np.random.default_rng(3)))


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_strategy_pool_smaller_than_the_count_gives_all_of_it(problem: Problem, name: str) -> None:
    state = dataclasses.replace(_state(problem, {}, 50), pool=np.arange(60, 71))
    assert sorted(STRATEGIES[name].choose(state, np.random.default_rng(0))) == list(range(60, 71))


def test_choose_cluster_f1_draws_most_from_the_weakest_cluster(problem: Problem) -> None:
    state = _state(problem, {0: 1.0, 1: 0.9, 2: 0.4, 3: 0.9})
    chosen = choose_cluster_f1(state, np.random.default_rng(0))
    counts = np.bincount(problem.train.clusters[chosen], minlength=4)
    assert counts.tolist() == [0, 4, 22, 4] or counts.tolist() == [0, 4, 23, 3] or counts.tolist() == [0, 3, 23, 4]


def test_choose_cluster_f1_cluster_without_evidence_counts_as_unknown_and_one_without_ctcs_as_right(
    problem: Problem,
) -> None:
    state = _state(problem, {1: None, 2: 1.0, 3: 1.0}, count=10)
    clusters = problem.train.clusters[choose_cluster_f1(state, np.random.default_rng(0))]
    assert set(clusters.tolist()) == {0}


def test_choose_cluster_f1_all_clusters_right_draws_by_their_size(problem: Problem) -> None:
    state = _state(problem, dict.fromkeys(range(4), 1.0), count=100)
    chosen = choose_cluster_f1(state, np.random.default_rng(0))
    sizes = np.bincount(problem.train.clusters[state.pool], minlength=4)
    expected = 100 * sizes / sizes.sum()
    assert np.abs(np.bincount(problem.train.clusters[chosen], minlength=4) - expected).max() <= 1


def test_choose_margin_takes_the_cells_nearest_to_the_border(problem: Problem) -> None:
    state = _state(problem, {})
    assert state.classifier is not None
    distance = np.abs(state.classifier.decision_function(state.features))
    chosen = choose_margin(state, np.random.default_rng(0))
    left = np.setdiff1d(state.pool, chosen)
    assert distance[chosen].max() <= distance[left].min()


def test_strategy_named_unknown_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="cluster-f1"):
        strategy_named("entorpy")
