"""The strategies beside scikit-activeml, or beside slow and obvious loops where it has no such strategy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from skactiveml.pool import CoreSet, MaxHerding, ProbCover, TypiClust
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import pairwise_distances
from sklearn.svm import SVC

from ctc_ray.hil import diverse
from ctc_ray.hil.blended import (
    SHORTLIST,
    choose_badge,
    choose_cluster_herding,
    choose_cluster_margin,
    choose_random_mix,
)
from ctc_ray.hil.blended import choose_uncertainty_herding as choose_herding
from ctc_ray.hil.diverse import (
    choose_k_center,
    choose_maxherding,
    choose_probcover,
    choose_typiclust,
    covering_radius,
    herd,
)
from ctc_ray.hil.pools import Problem
from ctc_ray.hil.quotas import PRIOR_CELLS, shrunken_error_rates
from ctc_ray.hil.scores import Score, score
from ctc_ray.hil.state import LoopState
from ctc_ray.hil.svm import Classifier, gamma_scale
from ctc_ray.hil.uncertain import (
    COMMITTEE,
    choose_entropy,
    choose_margin,
    choose_qbc,
    choose_uncertainty_ensemble,
    held_out_decisions,
    probabilities,
    sigmoid,
)


def state_of(problem: Problem, count: int = 12, num_labelled: int = 40) -> LoopState:
    labelled = np.arange(num_labelled)
    state = LoopState(
        problem.train.features,
        problem.train.clusters,
        labelled,
        problem.train.labels[labelled],
        np.arange(num_labelled, len(problem.train)),
        seed=7,
    )
    return state.with_evidence(Classifier.fit(state.features[labelled], state.answers), {}, count)


def partly_labelled(state: LoopState) -> np.ndarray:
    known = np.full(len(state.features), np.nan)
    known[state.labelled] = state.answers
    return known


def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def test_k_center_takes_the_same_cells_in_the_same_order_as_the_oracle(problem: Problem) -> None:
    state = state_of(problem)
    expected = CoreSet(random_state=0).query(state.features, partly_labelled(state), batch_size=12)
    assert choose_k_center(state, rng()).tolist() == expected.tolist()


def test_maxherding_covers_as_much_with_every_cell_as_the_oracle(problem: Problem) -> None:
    """Two cells that cover each other alone gain the same: either may come first."""
    state, gamma = state_of(problem, count=25), gamma_scale(problem.train.features)
    oracle = MaxHerding(normalize_samples=False, metric_dict={"gamma": gamma}, random_state=0)
    expected = oracle.query(state.features, partly_labelled(state), batch_size=25)
    kernel = np.exp(-gamma * pairwise_distances(state.features, metric="sqeuclidean"))

    def coverage(chosen: np.ndarray) -> list[float]:
        rows = np.concatenate([state.labelled, chosen])
        return [float(kernel[rows[: 40 + k]].max(axis=0).mean()) for k in range(26)]

    chosen = choose_maxherding(state, rng())
    assert chosen[:5].tolist() == expected[:5].tolist()
    assert coverage(chosen) == pytest.approx(coverage(expected), abs=1e-12)


def test_herd_takes_what_a_greedy_search_without_shortcuts_takes(problem: Problem) -> None:
    state = state_of(problem)
    weights = np.random.default_rng(0).random(len(state.features))
    kernel = np.exp(-0.02 * pairwise_distances(state.features, metric="sqeuclidean"))
    covered = kernel[:, :40].max(axis=1)
    expected: list[int] = []
    for _ in range(15):
        gains = np.maximum(kernel[40:] - covered, 0) @ weights
        gains[expected] = -1
        expected.append(int(np.argmax(gains)))
        covered = np.maximum(covered, kernel[40 + expected[-1]])
    assert herd(state, state.pool, 0.02, weights, 15).tolist() == expected


def test_probcover_at_one_radius_covers_as_many_cells_as_the_oracle(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, radius = state_of(problem), 1.7
    monkeypatch.setattr(diverse, "covering_radius", lambda squared, clusters: radius)
    expected = ProbCover(deltas=[radius], n_classes=4, random_state=0).query(
        state.features, partly_labelled(state), batch_size=12
    )
    near = pairwise_distances(state.features) <= radius

    def covered(chosen: np.ndarray) -> list[int]:
        rows = np.concatenate([state.labelled, chosen])
        return [int(near[rows[: 40 + k]].any(axis=0).sum()) for k in range(1, 13)]

    mine = covered(choose_probcover(state, rng()))
    assert mine[0] > near[:40].any(axis=0).sum()
    assert mine[0] == covered(expected)[0]
    assert mine[-1] >= covered(expected)[-1] - 1  # equal gains are broken by chance, on both sides


def test_covering_radius_is_the_largest_at_which_balls_hold_one_cluster() -> None:
    points = np.array([0.0, 1.0, 2.0, 10.0, 11.0, 12.0])[:, None]
    squared = (points - points.T) ** 2
    clusters = np.array([0, 0, 0, 1, 1, 1])
    assert 2.0 <= covering_radius(squared, clusters) < 8.0
    assert covering_radius(squared, np.array([0, 1, 0, 1, 0, 1])) < 1.1


def test_typiclust_takes_the_most_typical_cell_of_the_clusters_that_the_oracle_finds(problem: Problem) -> None:
    state = state_of(problem, count=6, num_labelled=10)
    shared = {"n_init": 1, "random_state": int(rng_after_shuffle(state).integers(2**31))}
    order = np.concatenate([state.labelled, diverse.candidates(state, rng())])
    known = partly_labelled(state)[order]
    oracle = TypiClust(cluster_algo=KMeans, cluster_algo_dict=dict(shared), k=20, random_state=0)
    expected = order[oracle.query(state.features[order], known, batch_size=6)]
    groups = KMeans(16, **shared).fit_predict(state.features[order])
    place = {int(cell): int(group) for cell, group in zip(order, groups, strict=True)}
    sizes = np.bincount(groups)
    chosen = choose_typiclust(state, rng())
    mine, theirs = ({place[int(c)]: int(c) for c in cells} for cells in (chosen, expected))
    assert [sizes[place[int(c)]] for c in chosen] == [sizes[place[int(c)]] for c in expected]
    shared_groups = set(mine) & set(theirs)  # of clusters of one size either may come first
    assert len(shared_groups) >= 4
    assert all(mine[group] == theirs[group] for group in shared_groups)


def rng_after_shuffle(state: LoopState) -> np.random.Generator:
    generator = rng()
    diverse.candidates(state, generator)
    return generator


def test_typiclust_without_free_clusters_goes_on_with_those_of_fewest_labels(problem: Problem) -> None:
    state = state_of(problem, count=30)
    same = dataclasses.replace(state, features=np.repeat(np.eye(5, 6), 48, axis=0))
    chosen = choose_typiclust(same, rng())
    assert len(set(chosen.tolist())) == 30
    assert np.bincount(chosen // 48, minlength=5)[1:].min() >= 6  # the first group holds all 40 labels


def test_entropy_takes_the_probabilities_nearest_to_one_half(problem: Problem) -> None:
    state = state_of(problem)
    distance = np.abs(probabilities(state, state.pool) - 0.5)
    expected = state.pool[np.argsort(distance)[:12]]
    assert sorted(choose_entropy(state, rng())) == sorted(expected)
    assert sorted(expected) != sorted(choose_margin(state, rng()))


def test_sigmoid_is_that_of_platts_method() -> None:
    generator = np.random.default_rng(1)
    values = generator.normal(size=200)
    labels = (generator.random(200) < 1 / (1 + np.exp(-(2.0 * values - 1.0)))).astype(np.int8)
    positive = labels.sum()
    high, low = (positive + 1) / (positive + 2), 1 / (200 - positive + 2)
    targets = np.where(labels == 1, high, low)
    doubled = np.concatenate([values, values])[:, None]
    weights = np.concatenate([targets, 1 - targets])
    oracle = LogisticRegression(C=1e8, tol=1e-10).fit(doubled, np.repeat([1, 0], 200), sample_weight=weights)
    assert sigmoid(values, labels) == pytest.approx((oracle.coef_[0, 0], oracle.intercept_[0]), abs=1e-3)


def test_held_out_decisions_are_those_of_classifiers_that_did_not_know_the_cell(problem: Problem) -> None:
    features, labels = problem.train.features[:60], problem.train.labels[:60]
    found = held_out_decisions(features, labels)
    fold = np.empty(60, np.int64)
    for label in (0, 1):
        fold[labels == label] = np.arange((labels == label).sum()) % 5
    for number in range(5):
        model = SVC(class_weight="balanced").fit(features[fold != number], labels[fold != number])
        assert np.allclose(found[fold == number], model.decision_function(features[fold == number]), atol=2e-3)


def test_qbc_takes_cells_of_split_votes_before_cells_of_one_opinion(problem: Problem) -> None:
    state = state_of(problem, count=20)
    margin = np.abs(state.classifier.decision_function(state.features)) if state.classifier else np.empty(0)
    chosen = choose_qbc(state, rng())
    assert len(set(chosen.tolist())) == 20
    assert margin[chosen].mean() < 0.6 * margin[state.pool].mean()


def test_uncertainty_ensemble_takes_cells_by_their_best_place_in_three_rankings(problem: Problem) -> None:
    state = state_of(problem, count=25)
    chosen = choose_uncertainty_ensemble(state, rng())
    generator = rng()
    cells = generator.permutation(state.pool)
    features, answers = state.features[state.labelled], state.answers
    slope, offset = sigmoid(held_out_decisions(features, answers), answers)
    members = []
    for _ in range(COMMITTEE):
        rows = np.concatenate(
            [generator.choice(np.flatnonzero(answers == c), np.sum(answers == c)) for c in np.unique(answers)]
        )
        member = SVC(class_weight="balanced").fit(features[rows], answers[rows])
        members.append(1 / (1 + np.exp(-(slope * member.decision_function(state.features[cells]) + offset))))
    own = SVC(class_weight="balanced").fit(features, answers).decision_function(state.features[cells])
    probability = 1 / (1 + np.exp(-(slope * own + offset)))
    rankings = [np.argsort(v) for v in (np.abs(own), np.abs(probability - 0.5), -np.std(members, axis=0))]
    places = {i: min(int(np.flatnonzero(ranking == i)[0]) for ranking in rankings) for i in range(len(cells))}
    expected = sorted(range(len(cells)), key=lambda i: (places[i], i))[:25]
    assert chosen.tolist() == cells[expected].tolist()
    firsts = {int(cells[ranking[0]]) for ranking in rankings}
    assert firsts <= set(chosen[: len(firsts)].tolist())


def test_cluster_margin_stays_on_the_shortlist_and_spreads_over_its_groups(problem: Problem) -> None:
    state = state_of(problem, count=8)
    shortlist = choose_margin(dataclasses.replace(state, count=8 * SHORTLIST), rng())
    chosen = choose_cluster_margin(state, rng())
    assert set(chosen.tolist()) <= set(shortlist.tolist())

    def spread(cells: np.ndarray) -> float:
        return float(pairwise_distances(state.features[cells])[np.triu_indices(8, 1)].min())

    assert spread(chosen) > spread(choose_margin(state, rng()))


def test_uncertainty_herding_takes_less_certain_cells_than_maxherding(problem: Problem) -> None:
    state = state_of(problem, count=20)
    unsure = np.abs(probabilities(state, np.arange(len(state.features))) - 0.5)
    assert unsure[choose_herding(state, rng())].mean() < unsure[choose_maxherding(state, rng())].mean()


def test_badge_starts_with_the_longest_gradient_and_never_takes_two_alike(problem: Problem) -> None:
    state = state_of(problem, count=20)
    head = LogisticRegression(class_weight="balanced", max_iter=1000).fit(state.features[:40], state.answers)
    probability = head.predict_proba(state.features)[:, 1]
    length = np.minimum(probability, 1 - probability) ** 2 * ((state.features**2).sum(axis=1) + 1)
    assert choose_badge(state, rng())[0] == state.pool[np.argmax(length[state.pool])]
    half = len(state.pool) // 2
    twins = state.features.copy()
    twins[state.pool[half : 2 * half]] = twins[state.pool[:half]]
    chosen = choose_badge(dataclasses.replace(state, features=twins), rng())
    assert len(np.unique(twins[chosen], axis=0)) == 20


def test_random_mix_takes_half_by_margin(problem: Problem) -> None:
    state = state_of(problem, count=21)
    nearest = set(choose_margin(dataclasses.replace(state, count=11), rng()).tolist())
    chosen = choose_random_mix(state, rng()).tolist()
    assert nearest == set(chosen[:11])
    assert len(set(chosen)) == 21


def test_shrunken_error_rates_follow_the_evidence_and_fall_back_to_all_clusters() -> None:
    scores = {0: Score(0.0, 0.0, 0.0, 400, 0.5, 40), 1: Score(1.0, 1.0, 1.0, 100, 0.0, 2)}
    state = LoopState(np.zeros((9, 2)), np.array([0, 1, 2] * 3), np.arange(0), np.empty(0, np.int8), np.arange(9), 0)
    state = dataclasses.replace(state, cluster_scores=scores)
    overall = 20.5 / 43
    expected = [(20 + PRIOR_CELLS * overall) / (40 + PRIOR_CELLS), PRIOR_CELLS * overall / (2 + PRIOR_CELLS), overall]
    assert shrunken_error_rates(state, [0, 1, 2]) == pytest.approx(expected)


def test_cluster_herding_looks_where_most_mistakes_wait(problem: Problem) -> None:
    state = state_of(problem, count=30)
    rates = {0: 0.0, 1: 0.5, 2: 0.0, 3: 0.0}
    scores = {c: Score(None, None, None, 500, rate, 500) for c, rate in rates.items()}
    chosen = choose_cluster_herding(dataclasses.replace(state, cluster_scores=scores), rng())
    counts = np.bincount(problem.train.clusters[chosen], minlength=4)
    assert counts.argmax() == 1
    assert counts[1] >= 25


def test_score_counts_a_cell_once_however_often_it_was_predicted() -> None:
    labels, predictions = np.array([1, 1, 0, 0], np.int8), np.array([1, 0, 0, 0], np.int8)
    found = score(labels, predictions, "null", is_cluster=True, rows=np.array([5, 5, 6, 7]))
    assert (found.num_cells, found.num_distinct, found.error_rate) == (4, 3, 0.25)


@pytest.mark.parametrize("choose", [choose_k_center, choose_typiclust, choose_probcover, choose_maxherding])
def test_large_pools_are_looked_at_in_part(problem: Problem, monkeypatch: pytest.MonkeyPatch, choose: object) -> None:
    monkeypatch.setattr(diverse, "MOST_CANDIDATES", 30)
    seen = diverse.candidates(state_of(problem), rng())
    assert len(seen) == 30
    assert callable(choose)
    assert set(choose(state_of(problem), rng()).tolist()) <= set(seen.tolist())
