"""The one human-in-the-loop loop: a strategy chooses, a labeller answers, the classifier learns, the test set scores."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ctc_ray.hil import faithful
from ctc_ray.hil.evidence import HeldOut, held_out_predictions
from ctc_ray.hil.labellers import Labeller, SimulatedLabeller
from ctc_ray.hil.pools import Problem
from ctc_ray.hil.rare_positive import choose_target, search_pool
from ctc_ray.hil.scenarios import scenario_named
from ctc_ray.hil.scores import Convention, Score, score, score_clusters
from ctc_ray.hil.settings import FAULTS, LoopSettings, Start, Target
from ctc_ray.hil.state import LoopState
from ctc_ray.hil.strategies import Choose, strategy_named
from ctc_ray.hil.svm import Classifier

_LOOP_STREAM = 0x6C6F6F70


@dataclass(frozen=True)
class Trial:
    """One run of one arm.

    Attributes:
        scenario: name of the scenario.
        strategy: name of the strategy.
        main_cluster: for limited-local, and for rare-positive where it is not to choose itself; None otherwise.
        run: 1 for the first seed.
        seed: seed of the run.
        flip_rate: share of wrong answers; None: that of the settings.
    """

    scenario: str
    strategy: str
    main_cluster: int | None
    run: int
    seed: int
    flip_rate: float | None = None


Row = dict[str, Any]
"""One row of `TRIAL_SCHEMA`."""


def run_trial(problem: Problem, trial: Trial, settings: LoopSettings, labeller: Labeller | None = None) -> list[Row]:
    """Run one arm with one seed.

    Args:
        problem: training, test and (optionally) validation cells.
        trial: which arm, which seed.
        settings: numbers of the experiment.
        labeller: who answers; None: the simulated expert, with `flip_rate` wrong answers.

    Returns:
        Rows of `TRIAL_SCHEMA`: for every loop from 0 the test scores per cluster and over all cells, and the Monte-Carlo scores
        (`split` mc) where they were computed. Same arguments, same rows.

    Raises:
        ConfigError: scenario, strategy or numbers do not fit the problem.
    """
    if trial.flip_rate is not None:
        settings = dataclasses.replace(settings, flip_rate=trial.flip_rate)
    start = _start(problem, trial, settings, labeller)
    expert = labeller or SimulatedLabeller(problem.train.labels, settings.flip_rate, trial.seed)
    answers = expert.answer(start.labelled)
    known = answers >= 0
    labelled = start.labelled[known]
    state = LoopState(problem.train.features, start.clusters, labelled, answers[known], start.pool, trial.seed)
    choose = _chooser(start.within_pool, settings)
    rows: list[Row] = []
    first = Classifier.fit(state.features[state.labelled], state.answers)
    target: Target | None = None
    for loop in range(settings.loops + 1):
        classifier = Classifier.fit(state.features[state.labelled], state.answers) if loop else first
        found = _cluster_evidence(problem, classifier, trial, start, state, settings)
        rows += _rows(problem, classifier, trial, state, found, target, settings)
        if loop == settings.loops:
            break
        told = state.with_evidence(classifier, _cluster_scores(found, settings), start.counts[loop])
        rng = np.random.default_rng([trial.seed, _LOOP_STREAM, loop])
        if start.search is None:
            chosen = choose(told, rng) if told.count and len(told.pool) else told.pool[:0]
            state = state.with_labels(chosen, expert.answer(chosen), repeats=settings.keeps("short-cluster"))
        else:
            seen_by = first if settings.keeps("first-predictions") else classifier
            target = choose_target(problem, told, seen_by, start.search, target, settings, found)
            state = state.with_labels(*search_pool(told, target, seen_by, choose, expert, rng))
    return rows


def _start(problem: Problem, trial: Trial, settings: LoopSettings, labeller: Labeller | None) -> Start:
    """The situation before the first loop; the random arm of a search is told what the targeted arm found, and how much of it."""
    start = scenario_named(trial.scenario)(problem, trial.strategy, trial.seed, trial.main_cluster, settings)
    if start.search is None or not start.search.everywhere:
        return start
    targeted = run_trial(problem, dataclasses.replace(trial, strategy="cluster-f1"), settings, labeller)
    totals = [row for row in targeted if row["cluster"] is None and row["split"] == "test"]
    planned = tuple(
        None
        if after["searched_class"] is None
        else Target(None, after["searched_class"], after["num_train"] - before["num_train"])
        for before, after in itertools.pairwise(totals)
    )
    return dataclasses.replace(start, search=dataclasses.replace(start.search, planned=planned))


def check_trials(problem: Problem, trials: Sequence[Trial], settings: LoopSettings) -> None:
    """Set every arm up once, so that numbers that do not fit are refused before a sweep starts; raises as `run_trial`."""
    arms = {(trial.scenario, trial.strategy, trial.main_cluster): trial for trial in trials}
    for trial in arms.values():
        scenario_named(trial.scenario)(problem, trial.strategy, trial.seed, trial.main_cluster, settings)


def _chooser(strategy: str, settings: LoopSettings) -> Choose:
    """The strategy's function, with the faults of the reference that are left in."""
    known = strategy_named(strategy)
    kept = [fault for fault in FAULTS if settings.keeps(fault)]
    if strategy == "cluster-f1" and kept:
        return faithful.cluster_f1_keeping(*kept)
    return faithful.choose_random if strategy == "random" and settings.keeps("reseeding") else known.choose


def _convention(settings: LoopSettings) -> Convention:
    return "paper" if settings.keeps("undefined-is-zero") else "null"


def _cluster_evidence(
    problem: Problem, classifier: Classifier, trial: Trial, start: Start, state: LoopState, settings: LoopSettings
) -> HeldOut | None:
    """Held-out predictions for strategies that ask for scores per cluster.

    The reference computes the Monte-Carlo scores in both arms of limited-global, so faithful mode does.
    """
    needed = strategy_named(start.within_pool).needs_cluster_scores
    if not needed and not (settings.mode == "faithful" and trial.scenario == "limited-global"):
        return None
    known = state.labelled
    return held_out_predictions(
        problem, classifier, state.features[known], state.answers, start.clusters[known], settings
    )


def _cluster_scores(found: HeldOut | None, settings: LoopSettings) -> dict[int, Score]:
    if found is None:
        return {}
    return score_clusters(found.truth, found.predictions, found.clusters, _convention(settings), rows=found.rows)


def _rows(
    problem: Problem,
    classifier: Classifier,
    trial: Trial,
    state: LoopState,
    found: HeldOut | None,
    target: Target | None,
    settings: LoopSettings,
) -> list[Row]:
    """Scores of the test cells and, where there are any, of the Monte-Carlo splits, in total and per cluster."""
    test, convention = problem.test, _convention(settings)
    predictions = classifier.predict(test.features)
    scored: list[tuple[str, int | None, Score]] = [
        ("test", None, score(test.labels, predictions, convention, is_cluster=False))
    ]
    scored += [("test", c, s) for c, s in score_clusters(test.labels, predictions, test.clusters, convention).items()]
    if found is not None and found.is_monte_carlo:
        scored.append(("mc", None, score(found.truth, found.predictions, convention, is_cluster=False)))
        scored += [("mc", c, s) for c, s in _cluster_scores(found, settings).items()]
    return [_row(trial, state, split, cluster, one, target) for split, cluster, one in scored]


def _row(trial: Trial, state: LoopState, split: str, cluster: int | None, found: Score, target: Target | None) -> Row:
    return {
        "scenario": trial.scenario,
        "strategy": trial.strategy,
        "main_cluster": trial.main_cluster,
        "run": trial.run,
        "seed": trial.seed,
        "loop": state.loop,
        "split": split,
        "cluster": cluster,
        "f1": found.f1,
        "recall": found.recall,
        "precision": found.precision,
        "num_train": len(state.labelled),
        "num_viewed": state.num_viewed,
        "searched_cluster": None if target is None else target.cluster,
        "searched_class": None if target is None else target.finds,
    }
