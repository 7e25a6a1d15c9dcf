"""The one human-in-the-loop loop: a strategy chooses, a labeller answers, the classifier learns, the test set scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ctc_ray.errors import ConfigError
from ctc_ray.hil import faithful
from ctc_ray.hil.evidence import held_out_predictions
from ctc_ray.hil.labellers import NO_CLASS, Labeller, SimulatedLabeller
from ctc_ray.hil.pools import Ints, Labels, Problem
from ctc_ray.hil.scenarios import scenario_named
from ctc_ray.hil.scores import Convention, Score, score, score_clusters
from ctc_ray.hil.settings import LoopSettings, Search, Start
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
    for loop in range(settings.loops + 1):
        classifier = Classifier.fit(state.features[state.labelled], state.answers)
        rows += _test_rows(problem, classifier, trial, state, settings)
        mc_rows, cluster_scores = _cluster_evidence(problem, classifier, trial, start, state, settings)
        rows += mc_rows
        if loop == settings.loops:
            break
        told = state.with_evidence(classifier, cluster_scores, start.counts[loop])
        rng = np.random.default_rng([trial.seed, _LOOP_STREAM, loop])
        if start.search is None:
            chosen = choose(told, rng)
            state = state.with_labels(chosen, expert.answer(chosen), repeats=settings.mode == "faithful")
        else:
            state = state.with_labels(*search_pool(told, start.search, choose, expert, rng))
    return rows


def _start(problem: Problem, trial: Trial, settings: LoopSettings, labeller: Labeller | None) -> Start:
    """The situation before the first loop; the random arm of a search is told how many cells the targeted arm found."""
    start = scenario_named(trial.scenario)(problem, trial.strategy, trial.seed, trial.main_cluster, settings)
    if start.search is None or start.search.cluster is not None:
        return start
    targeted = dataclasses.replace(trial, strategy="cluster-f1")
    totals = [row for row in run_trial(problem, targeted, settings, labeller) if row["cluster"] is None]
    labels = [int(row["num_train"]) for row in totals if row["split"] == "test"]
    quotas = tuple(np.diff(labels).tolist())
    return dataclasses.replace(start, search=dataclasses.replace(start.search, quotas=quotas))


def search_pool(
    state: LoopState, search: Search, choose: Choose, expert: Labeller, rng: np.random.Generator
) -> tuple[Ints, Labels]:
    """One loop of a search: which cells were looked at, and the answers that are learnt from.

    Args:
        state: with classifier and count.
        search: where to look and what for.
        choose: strategy for what to look at first.
        expert: who answers.
        rng: for the strategy.

    Returns:
        Positions (K,) in the order of looking, and answers (K,), `NO_CLASS` where a cell is not of the class that is looked for.
    """
    if state.classifier is None:
        raise ConfigError("a search needs a fitted classifier in the state")
    other = state.classifier.predict(state.features[state.pool]) != search.finds
    inside = other if search.cluster is None else other & (state.clusters[state.pool] == search.cluster)
    pool = state.pool[inside]
    count = state.count if search.quotas is None else len(pool)
    chosen = choose(dataclasses.replace(state, pool=pool, count=count), rng)
    answers = expert.answer(chosen)
    if search.quotas is not None:
        enough = np.cumsum(answers == search.finds) >= search.quotas[state.loop]
        stop = int(np.argmax(enough)) + 1 if enough.any() else len(chosen)
        stop = stop if search.quotas[state.loop] else 0
        chosen, answers = chosen[:stop], answers[:stop]
    return chosen, np.where(answers == search.finds, answers, NO_CLASS).astype(np.int8)


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
    known = state.labelled
    found = held_out_predictions(
        problem, classifier, state.features[known], state.answers, start.clusters[known], settings
    )
    truth, predictions = found.truth, found.predictions
    scores = score_clusters(truth, predictions, found.clusters, convention, rows=found.rows)
    if not found.is_monte_carlo:
        return [], scores
    total = score(truth, predictions, convention, is_cluster=False)
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
        "num_viewed": state.num_viewed,
    }
