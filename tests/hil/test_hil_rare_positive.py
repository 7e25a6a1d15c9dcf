"""The search for cells that the classifier misses, and its bad input."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import pytest

from ctc_ray.config import FaultName
from ctc_ray.errors import ConfigError
from ctc_ray.hil.labellers import NO_CLASS, SimulatedLabeller
from ctc_ray.hil.loop import Trial, run_trial
from ctc_ray.hil.pools import Problem
from ctc_ray.hil.rare_positive import choose_target, rare_positive, search_pool
from ctc_ray.hil.settings import LoopSettings, Search, Target
from ctc_ray.hil.state import LoopState
from ctc_ray.hil.strategies import STRATEGIES, choose_random
from ctc_ray.hil.svm import Classifier

SETTINGS = LoopSettings(loops=3, mc_splits=12, held_back=0.6, seconds_per_cell=3.0, budget_s=30.0)


@pytest.fixture
def hard(make: Callable[..., Problem]) -> Problem:
    return make(num_train=400, seed=3)


def frame_of(
    problem: Problem, strategy: str, settings: LoopSettings = SETTINGS, main_cluster: int | None = None
) -> pl.DataFrame:
    rows = run_trial(problem, Trial("rare-positive", strategy, main_cluster, 1, 5), settings)
    return pl.DataFrame(rows, infer_schema_length=None).filter(
        (pl.col("split") == "test") & pl.col("cluster").is_null()
    )


def searching(problem: Problem, num_labelled: int = 100, count: int = 10) -> LoopState:
    labelled = np.arange(num_labelled)
    state = LoopState(
        problem.train.features,
        problem.train_clusters_filled,
        labelled,
        problem.train.labels[labelled],
        np.arange(num_labelled, len(problem.train)),
        seed=1,
    )
    return state.with_evidence(Classifier.fit(state.features[labelled], state.answers), {}, count)


def classifier_of(state: LoopState) -> Classifier:
    assert state.classifier is not None
    return state.classifier


def validated(problem: Problem) -> Problem:
    """The same with the test cells as validation set, under other ids."""
    other = dataclasses.replace(problem.test, cell_ids=np.char.add("other-", problem.test.cell_ids))
    return dataclasses.replace(problem, validation=dataclasses.replace(problem.test, name="validation"), test=other)


def target_of(
    problem: Problem, state: LoopState, settings: LoopSettings = SETTINGS, main_cluster: int | None = None
) -> Target | None:
    search = Search(main_cluster=main_cluster)
    return choose_target(problem, state, classifier_of(state), search, None, settings)


def weakest_by_hand(truth: np.ndarray, predictions: np.ndarray, clusters: np.ndarray, names: list[int]) -> Target:
    f1 = {}
    for cluster in names:
        inside = clusters == cluster
        both = np.sum(truth[inside] & predictions[inside])
        f1[cluster] = 2 * both / (truth[inside].sum() + predictions[inside].sum())
    weakest = min(f1, key=lambda c: f1[c])
    inside = clusters == weakest
    missed = np.sum(inside & (truth == 1) & (predictions == 0)) >= np.sum(inside & (truth == 0) & (predictions == 1))
    return Target(weakest, int(missed))


def test_region_is_the_weakest_cluster_of_held_out_cells_and_the_class_that_is_missed_most(hard: Problem) -> None:
    state = searching(hard)
    predictions = classifier_of(state).predict(hard.test.features)
    expected = weakest_by_hand(hard.test.labels, predictions, hard.test.clusters, [0, 1, 2, 3])
    assert target_of(validated(hard), state) == expected


def test_test_set_chooses_the_region_where_that_fault_is_kept_and_nowhere_else(hard: Problem) -> None:
    state = searching(hard)
    kept = dataclasses.replace(SETTINGS, faults=("test-target",))
    predictions = classifier_of(state).predict(hard.test.features)
    chosen = target_of(hard, state)
    assert chosen is not None
    for cluster in {0, 1, 2, 3} - {
        chosen.cluster
    }:  # where the test labels are made to disagree with every prediction, and only there
        inside = hard.test.clusters == cluster
        wrong = dataclasses.replace(hard.test, labels=np.where(inside, 1 - predictions, predictions))
        swayed = dataclasses.replace(hard, test=wrong)
        assert target_of(swayed, state, kept) == weakest_by_hand(wrong.labels, predictions, wrong.clusters, [cluster])
        assert target_of(swayed, state) == chosen


def test_region_moves_when_another_cluster_has_become_the_weakest(hard: Problem) -> None:
    problem = validated(hard)
    weak = target_of(problem, searching(hard))
    assert weak is not None
    members = np.flatnonzero(hard.train_clusters_filled[100:] == weak.cluster) + 100
    told = searching(hard).with_labels(members, hard.train.labels[members])
    taught = told.with_evidence(Classifier.fit(told.features[told.labelled], told.answers), {}, 10)
    moved = target_of(problem, taught)
    assert moved is not None
    assert moved.cluster != weak.cluster
    kept = dataclasses.replace(SETTINGS, faults=("fixed-target",))
    assert choose_target(problem, taught, classifier_of(taught), Search(), weak, kept) == weak


def test_region_without_cells_left_to_look_at_is_passed_over_for_the_next_weakest(hard: Problem) -> None:
    problem, state = validated(hard), searching(hard)
    weak = target_of(problem, state)
    assert weak is not None
    predictions = classifier_of(state).predict(state.features[state.pool])
    seen = (state.clusters[state.pool] == weak.cluster) & (predictions != weak.finds)
    rest = dataclasses.replace(state, pool=state.pool[~seen])
    others = [c for c in range(4) if c != weak.cluster]
    by_test = classifier_of(state).predict(hard.test.features)
    assert target_of(problem, rest) == weakest_by_hand(hard.test.labels, by_test, hard.test.clusters, others)
    assert target_of(problem, rest, main_cluster=weak.cluster) is None
    assert target_of(problem, dataclasses.replace(state, pool=state.pool[:0])) is None


def test_given_main_cluster_stays_and_its_class_is_chosen_anew(hard: Problem) -> None:
    state = searching(hard)
    predictions = classifier_of(state).predict(hard.test.features)
    for cluster in range(4):
        expected = weakest_by_hand(hard.test.labels, predictions, hard.test.clusters, [cluster])
        assert target_of(validated(hard), state, main_cluster=cluster) == expected
    turned = dataclasses.replace(hard.test, labels=(1 - hard.test.labels).astype(np.int8))
    other = validated(dataclasses.replace(hard, test=turned))
    by_hand = weakest_by_hand(turned.labels, predictions, turned.clusters, [2])
    assert target_of(other, state, main_cluster=2) == by_hand


def test_hidden_cells_and_first_labels_are_apart_and_together_all(hard: Problem) -> None:
    start = rare_positive(hard, "margin", 5, None, SETTINGS)
    assert len(start.pool) == 240
    assert sorted([*start.pool, *start.labelled]) == list(range(400))
    assert start.counts == (10, 10, 10)


def test_search_looks_at_cells_of_the_wrong_class_in_the_region_and_learns_the_finds_alone(hard: Problem) -> None:
    state = searching(hard)
    expert = SimulatedLabeller(hard.train.labels)
    seen_by = classifier_of(state)
    chosen, answers = search_pool(state, Target(3, 1), seen_by, choose_random, expert, np.random.default_rng(0))
    assert (seen_by.predict(state.features[chosen]) == 0).all()
    assert (state.clusters[chosen] == 3).all()
    assert len(chosen) == 10
    assert np.array_equal(answers == 1, hard.train.labels[chosen] == 1)
    assert set(answers.tolist()) <= {1, NO_CLASS}


def test_search_by_predictions_of_another_classifier_looks_at_what_that_one_calls_wrong(hard: Problem) -> None:
    state, first = searching(hard, count=400), classifier_of(searching(hard, 20))
    expert = SimulatedLabeller(hard.train.labels)
    chosen, _ = search_pool(state, Target(None, 1), first, choose_random, expert, np.random.default_rng(0))
    predicted = first.predict(state.features[state.pool])
    assert sorted(chosen) == state.pool[predicted == 0].tolist()
    assert (classifier_of(state).predict(state.features[chosen]) == 1).any()


def test_search_with_a_quota_stops_at_the_last_find(hard: Problem) -> None:
    state = searching(hard)
    expert = SimulatedLabeller(hard.train.labels)

    def search(target: Target | None) -> tuple[np.ndarray, np.ndarray]:
        seen_by = classifier_of(state)
        return search_pool(state, target, seen_by, choose_random, expert, np.random.default_rng(0))

    _, answers = search(Target(None, 1, 3))
    assert (answers == 1).sum() == 3
    assert answers[-1] == 1
    for nothing in (Target(None, 1, 0), None, Target(77, 1)):
        assert [len(part) for part in search(nothing)] == [0, 0]
    many, found = search(Target(None, 1, 999))
    predicted = classifier_of(state).predict(state.features[state.pool])
    missed = state.pool[(hard.train.labels[state.pool] == 1) & (predicted == 0)]
    assert (found == 1).sum() == len(missed)
    assert len(many) > len(missed)


@pytest.mark.parametrize("faults", [(), ("fixed-target",), ("first-predictions",), ("test-target",)])
@pytest.mark.parametrize("main_cluster", [None, 2])
def test_random_arm_learns_as_many_cells_of_the_same_class_a_loop_as_the_targeted_arm(
    hard: Problem, main_cluster: int | None, faults: tuple[FaultName, ...]
) -> None:
    settings = dataclasses.replace(SETTINGS, faults=faults)
    targeted, everywhere = (
        frame_of(hard, arm, settings, main_cluster=main_cluster) for arm in ("cluster-f1", "random")
    )
    assert targeted["num_train"].to_list() == everywhere["num_train"].to_list()
    assert targeted["searched_class"].to_list() == everywhere["searched_class"].to_list()
    assert everywhere["searched_cluster"].null_count() == everywhere.height
    assert targeted["num_train"][3] > targeted["num_train"][0] == 160
    assert max(targeted["num_viewed"]) <= 30
    assert targeted["num_viewed"].is_sorted()
    regions = targeted["searched_cluster"].to_list()
    assert regions[0] is None
    assert main_cluster is None or set(regions[1:]) == {main_cluster}
    assert "fixed-target" not in faults or len(set(regions[1:])) == 1


def test_random_arm_follows_a_class_that_changes_between_loops(make: Callable[..., Problem]) -> None:
    moved = 0
    for seed in range(12):
        problem = make(num_train=400, seed=seed)
        targeted, everywhere = frame_of(problem, "cluster-f1"), frame_of(problem, "random")
        classes = targeted["searched_class"].drop_nulls().to_list()
        moved += len(set(classes)) > 1
        assert targeted["num_train"].to_list() == everywhere["num_train"].to_list()
        assert targeted["searched_class"].to_list() == everywhere["searched_class"].to_list()
    assert moved >= 2  # else the problems do not show it


def test_answers_stay_with_their_cells_whatever_the_order_of_looking(hard: Problem) -> None:
    """The reference permutes labels where both classes are given (its fault 1); here an answer is asked of a cell."""
    state = searching(hard, count=30)
    expert = SimulatedLabeller(hard.train.labels)

    def shuffled(told: LoopState, rng: np.random.Generator) -> np.ndarray:
        return rng.permutation(told.pool)[: told.count]

    for finds in (0, 1):
        found = search_pool(
            state, Target(None, finds), classifier_of(state), shuffled, expert, np.random.default_rng(finds)
        )
        after = state.with_labels(*found)
        new = after.labelled[100:]
        assert len(new)
        assert np.array_equal(after.answers[100:], hard.train.labels[new])
        assert (after.answers[100:] == finds).all()
    both = state.with_labels(found[0], expert.answer(found[0]))
    assert set(both.answers[100:].tolist()) == {0, 1}
    assert np.array_equal(both.answers[100:], hard.train.labels[both.labelled[100:]])


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
def test_numbers_that_leave_nothing_to_look_at_are_refused(hard: Problem, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rare_positive(hard, "margin", 5, None, dataclasses.replace(SETTINGS, **change))


@pytest.mark.parametrize("strategy", ["margin", "random", "cluster-f1"])
def test_main_cluster_without_a_training_cell_is_refused(hard: Problem, strategy: str) -> None:
    with pytest.raises(ConfigError, match=r"--main-cluster 9 is none of 0, 1, 2, 3"):
        rare_positive(hard, strategy, 5, 9, SETTINGS)
    start = rare_positive(hard, strategy, 5, 2, SETTINGS)
    assert start.search == Search(everywhere=strategy == "random", main_cluster=2)


def easy(make: Callable[..., Problem]) -> Problem:
    problem = make(num_train=200)
    apart = problem.train.features + 60.0 * problem.train.labels[:, None]
    return dataclasses.replace(problem, train=dataclasses.replace(problem.train, features=apart))


@pytest.mark.parametrize("strategy", ["margin", "random", "cluster-f1"])
@pytest.mark.parametrize("main_cluster", [None, 1])
def test_loops_of_a_classifier_without_mistakes_look_at_nothing(
    make: Callable[..., Problem], strategy: str, main_cluster: int | None
) -> None:
    frame = frame_of(easy(make), strategy, main_cluster=main_cluster)
    assert frame["num_viewed"].to_list() == [0, 0, 0, 0]
    assert frame["num_train"].to_list() == [80, 80, 80, 80]
    assert frame["searched_cluster"].null_count() == frame["searched_class"].null_count() == 4


def test_first_classifier_without_mistakes_stops_where_its_target_is_kept(make: Callable[..., Problem]) -> None:
    with pytest.raises(ConfigError, match="no mistake"):
        frame_of(easy(make), "margin", dataclasses.replace(SETTINGS, faults=("fixed-target",)))


def test_held_out_cells_without_a_ctc_in_any_cluster_are_refused(hard: Problem) -> None:
    state = searching(hard)
    calls = classifier_of(state).predict(hard.test.features)
    none = np.flatnonzero((calls == 0) & (hard.test.labels == 0))
    clear = dataclasses.replace(
        hard.test,
        name="validation",
        **{name: getattr(hard.test, name)[none] for name in ("cell_ids", "features", "labels", "clusters")},
    )
    other = dataclasses.replace(validated(hard), validation=clear)
    with pytest.raises(ConfigError, match="no cluster has a CTC among the held-out cells"):
        target_of(other, state)


def test_hidden_cells_fewer_than_the_looks_are_all_that_is_looked_at(make: Callable[..., Problem]) -> None:
    problem = make(num_train=120, seed=3)
    settings = dataclasses.replace(SETTINGS, held_back=0.2, budget_s=3_000.0, loops=6)
    for strategy in STRATEGIES:
        frame = frame_of(problem, strategy, settings)
        assert max(frame["num_viewed"]) <= 24
        assert max(frame["num_train"]) <= 120
