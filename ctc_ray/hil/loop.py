"""The one human-in-the-loop loop: a strategy chooses, a labeller answers, the classifier learns, the test set scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ctc_ray.hil import faithful
from ctc_ray.hil.labellers import Labeller, SimulatedLabeller
from ctc_ray.hil.pools import Problem
from ctc_ray.hil.scenarios import LoopSettings, Start, scenario_named
from ctc_ray.hil.scores import Convention, Score, monte_carlo, score, score_clusters
from ctc_ray.hil.state import LoopState
from ctc_ray.hil.strategies import Choose, strategy_named
from ctc_ray.hil.svm import Classifier

_FAITHFUL: dict[str, Choose] = {"random": faithful.choose_random, "cluster-f1": faithful.choose_cluster_f1}
_LOOP_STREAM = 0x6C6F6F70


@dataclass(frozen=True)
class Trial:
    """One run of one arm.

    Attributes:
        scenario: name of the scenario.
        strategy: name of the strategy.
        main_cluster: for limited-local; None otherwise.
        run: 1 for the first seed.
        seed: seed of the run.
    """

    scenario: str
    strategy: str
    main_cluster: int | None
    run: int
    seed: int


Row = dict[str, Any]
"""One row of `RESULTS_SCHEMA`."""


def run_trial(problem: Problem, trial: Trial, settings: LoopSettings, labeller: Labeller | None = None) -> list[Row]:
    """Run one arm with one seed.

    Args:
        problem: training, test and (optionally) validation cells.
        trial: which arm, which seed.
        settings: numbers of the experiment.
        labeller: who answers; None: the simulated expert, with `settings.flip_rate` wrong answers.

    Returns:
        Rows of `RESULTS_SCHEMA`: for every loop from 0 the test scores per cluster and over all cells, and the Monte-Carlo scores
        (`split` mc) where they were computed. Same arguments, same rows.

    Raises:
        ConfigError: scenario, strategy or numbers do not fit the problem.
    """
    start = scenario_named(trial.scenario)(problem, trial.strategy, trial.seed, trial.main_cluster, settings)
    expert = labeller or SimulatedLabeller(problem.train.labels, settings.flip_rate, trial.seed)
    answers = expert.answer(start.labelled)
    known = answers >= 0
    labelled = start.labelled[known]
    state = LoopState(problem.train.features, start.clusters, labelled, answers[known], start.pool, trial.seed)
    choose = _chooser(start.within_pool, settings)
    rows: list[Row] = []
    for loop in range(settings.loops + 1):
        classifier = Classifier.fit(state.features[state.labelled], state.answers)
        rows += _test_rows(problem, classifier, trial, state, settings)
        mc_rows, cluster_scores = _cluster_evidence(problem, classifier, trial, start, state, settings)
        rows += mc_rows
        if loop == settings.loops:
            break
        told = state.with_evidence(classifier, cluster_scores, start.counts[loop])
        chosen = choose(told, np.random.default_rng([trial.seed, _LOOP_STREAM, loop]))
        state = state.with_labels(chosen, expert.answer(chosen), repeats=settings.mode == "faithful")
    return rows


def check_trials(problem: Problem, trials: Sequence[Trial], settings: LoopSettings) -> None:
    """Set every arm up once, so that numbers that do not fit are refused before a sweep starts; raises as `run_trial`."""
    arms = {(trial.scenario, trial.strategy, trial.main_cluster): trial for trial in trials}
    for trial in arms.values():
        scenario_named(trial.scenario)(problem, trial.strategy, trial.seed, trial.main_cluster, settings)


def _chooser(strategy: str, settings: LoopSettings) -> Choose:
    known = strategy_named(strategy)
    return _FAITHFUL.get(strategy, known.choose) if settings.mode == "faithful" else known.choose


def _convention(settings: LoopSettings) -> Convention:
    return "paper" if settings.mode == "faithful" else "null"


def _test_rows(
    problem: Problem, classifier: Classifier, trial: Trial, state: LoopState, settings: LoopSettings
) -> list[Row]:
    test, convention = problem.test, _convention(settings)
    predictions = classifier.predict(test.features)
    total = score(test.labels, predictions, convention, is_cluster=False)
    clusters = score_clusters(test.labels, predictions, test.clusters, convention)
    return [_row(trial, state, "test", None, total), *(_row(trial, state, "test", c, s) for c, s in clusters.items())]


def _cluster_evidence(
    problem: Problem, classifier: Classifier, trial: Trial, start: Start, state: LoopState, settings: LoopSettings
) -> tuple[list[Row], dict[int, Score]]:
    """Scores per cluster for the strategy: of the validation cells in corrected mode, else by Monte-Carlo with rows of their own.

    The reference computes the Monte-Carlo scores in both arms of limited-global, so faithful mode does.
    """
    needed = strategy_named(start.within_pool).needs_cluster_scores
    if not needed and not (settings.mode == "faithful" and trial.scenario == "limited-global"):
        return [], {}
    convention = _convention(settings)
    validation = problem.validation
    if settings.mode == "corrected" and validation is not None:
        predictions = classifier.predict(validation.features)
        return [], score_clusters(validation.labels, predictions, validation.clusters, convention)
    pooled = monte_carlo(state.features[state.labelled], state.answers, settings.mc_splits)
    truth, clusters = state.answers[pooled.rows], start.clusters[state.labelled[pooled.rows]]
    scores = score_clusters(truth, pooled.predictions, clusters, convention, rows=pooled.rows)
    total = score(truth, pooled.predictions, convention, is_cluster=False)
    rows = [_row(trial, state, "mc", None, total), *(_row(trial, state, "mc", c, s) for c, s in scores.items())]
    return rows, scores


def _row(trial: Trial, state: LoopState, split: str, cluster: int | None, found: Score) -> Row:
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
    }
