"""The search for cells that the classifier misses, and its bad input."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import polars as pl
import pytest

from ctc_ray.errors import ConfigError
from ctc_ray.hil.labellers import NO_CLASS, SimulatedLabeller
from ctc_ray.hil.loop import Trial, run_trial, search_pool
from ctc_ray.hil.pools import Problem
from ctc_ray.hil.rare_positive import rare_positive
from ctc_ray.hil.settings import LoopSettings, Search
from ctc_ray.hil.state import LoopState
from ctc_ray.hil.strategies import choose_random
from ctc_ray.hil.svm import Classifier

SETTINGS = LoopSettings(loops=3, mc_splits=12, held_back=0.6, seconds_per_cell=3.0, budget_s=30.0)


@pytest.fixture
def hard(make: Callable[..., Problem]) -> Problem:
    return make(num_train=400, seed=3)


def frame_of(problem: Problem, strategy: str, settings: LoopSettings = SETTINGS) -> pl.DataFrame:
    rows = run_trial(problem, Trial("rare-positive", strategy, None, 1, 5), settings)
    return pl.DataFrame(rows, infer_schema_length=None).filter(
        (pl.col("split") == "test") & pl.col("cluster").is_null()
    )


def searching(problem: Problem, search: Search, count: int = 10) -> LoopState:
    labelled = np.arange(100)
    state = LoopState(
        problem.train.features,
        problem.train.clusters,
        labelled,
        problem.train.labels[labelled],
        np.arange(100, len(problem.train)),
        seed=1,
    )
    assert search.finds in (0, 1)
    return state.with_evidence(Classifier.fit(state.features[labelled], state.answers), {}, count)


def test_region_is_the_weakest_cluster_and_the_class_that_is_missed_most(hard: Problem) -> None:
    start = rare_positive(hard, "cluster-f1", 5, None, SETTINGS)
    assert start.search is not None
    validated = dataclasses.replace(
        hard, validation=dataclasses.replace(hard.test, name="validation"), test=_renamed(hard)
    )
    chosen = rare_positive(validated, "cluster-f1", 5, None, SETTINGS).search
    labelled = start.labelled
    classifier = Classifier.fit(hard.train.features[labelled], hard.train.labels[labelled])
    predictions, truth = classifier.predict(hard.test.features), hard.test.labels
    f1 = {}
    for cluster in range(4):
        inside = hard.test.clusters == cluster
        both = np.sum(truth[inside] & predictions[inside])
        f1[cluster] = 2 * both / (truth[inside].sum() + predictions[inside].sum())
    weakest = min(f1, key=lambda c: f1[c])
    inside = hard.test.clusters == weakest
    missed = np.sum(inside & (truth == 1) & (predictions == 0)) >= np.sum(inside & (truth == 0) & (predictions == 1))
    assert chosen == Search(weakest, int(missed))


def _renamed(problem: Problem) -> object:
    return dataclasses.replace(problem.test, cell_ids=np.char.add("other-", problem.test.cell_ids))


def test_hidden_cells_and_first_labels_are_apart_and_together_all(hard: Problem) -> None:
    start = rare_positive(hard, "margin", 5, None, SETTINGS)
    assert len(start.pool) == 240
    assert sorted([*start.pool, *start.labelled]) == list(range(400))
    assert start.counts == (10, 10, 10)


def test_search_looks_at_cells_of_the_wrong_class_in_the_region_and_learns_the_finds_alone(hard: Problem) -> None:
    state = searching(hard, Search(3, 1))
    expert = SimulatedLabeller(hard.train.labels)
    chosen, answers = search_pool(state, Search(3, 1), choose_random, expert, np.random.default_rng(0))
    assert state.classifier is not None
    assert (state.classifier.predict(state.features[chosen]) == 0).all()
    assert (state.clusters[chosen] == 3).all()
    assert len(chosen) == 10
    assert np.array_equal(answers == 1, hard.train.labels[chosen] == 1)
    assert set(answers.tolist()) <= {1, NO_CLASS}


def test_search_with_a_quota_stops_at_the_last_find(hard: Problem) -> None:
    search = Search(None, 1, (3,))
    state = searching(hard, search)
    expert = SimulatedLabeller(hard.train.labels)
    _, answers = search_pool(state, search, choose_random, expert, np.random.default_rng(0))
    assert (answers == 1).sum() == 3
    assert answers[-1] == 1
    none, _ = search_pool(state, Search(None, 1, (0,)), choose_random, expert, np.random.default_rng(0))
    assert len(none) == 0
    many, found = search_pool(state, Search(None, 1, (999,)), choose_random, expert, np.random.default_rng(0))
    missed = state.pool[
        (hard.train.labels[state.pool] == 1) & (state.classifier.predict(state.features[state.pool]) == 0)
    ]  # type: ignore[union-attr]
    assert (found == 1).sum() == len(missed)
    assert len(many) > len(missed)


def test_random_arm_learns_as_many_cells_a_loop_as_the_targeted_arm(hard: Problem) -> None:
    targeted, everywhere = frame_of(hard, "cluster-f1"), frame_of(hard, "random")
    assert targeted["num_train"].to_list() == everywhere["num_train"].to_list()
    assert targeted["num_train"][3] > targeted["num_train"][0] == 160
    assert targeted["num_viewed"].max() <= 30
    assert targeted["num_viewed"].is_sorted()


def test_looks_are_what_the_budget_pays_for(hard: Problem) -> None:
    rich = dataclasses.replace(SETTINGS, budget_s=3_000.0)
    frame = frame_of(hard, "margin", rich)
    hidden = rare_positive(hard, "margin", 5, None, rich)
    assert frame["num_viewed"][-1] < len(hidden.pool)
    assert frame["num_viewed"][1] > 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "faithful"}, "no faithful mode"),
        ({"held_back": 0.0}, "hides 0 of 400"),
        ({"held_back": 1.0}, "hides 400 of 400"),
        ({"budget_s": 1.0}, "looks at 0"),
    ],
)
def test_numbers_that_leave_nothing_to_look_at_are_refused(
    hard: Problem, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        rare_positive(hard, "margin", 5, None, dataclasses.replace(SETTINGS, **change))


def test_unknown_main_cluster_is_refused_and_a_known_one_taken(hard: Problem) -> None:
    with pytest.raises(ConfigError, match=r"--main-cluster 9 is none of 0, 1, 2, 3"):
        rare_positive(hard, "margin", 5, 9, SETTINGS)
    search = rare_positive(hard, "margin", 5, 2, SETTINGS).search
    assert search is not None
    assert search.cluster == 2


def test_classifier_without_mistakes_has_nothing_to_mend(make: Callable[..., Problem]) -> None:
    easy = make(num_train=200)
    apart = easy.train.features + 60.0 * easy.train.labels[:, None]
    problem = dataclasses.replace(easy, train=dataclasses.replace(easy.train, features=apart))
    with pytest.raises(ConfigError, match="no mistake"):
        rare_positive(problem, "margin", 5, None, SETTINGS)
