"""The paper's real-world experiment, simulated: search the weakest cluster for the cells that the classifier misses.

The classifier starts with many labels. The expert has a few minutes a loop and looks at cells of one region that the classifier
gave its prevalent wrong class; those that turn out to be of the other class are learnt from, the rest is put aside. Unlabelled cells of
a release have no truth, so a share of the labelled training cells is hidden at the start and searched.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from ctc_ray.errors import ConfigError
from ctc_ray.hil.evidence import HeldOut, held_out_predictions, predictions_of_test
from ctc_ray.hil.labellers import NO_CLASS, Labeller
from ctc_ray.hil.pools import BACKGROUND, Ints, Labels, Problem
from ctc_ray.hil.scores import score_clusters
from ctc_ray.hil.settings import LoopSettings, Search, Start, Target
from ctc_ray.hil.state import LoopState
from ctc_ray.hil.strategies import Choose
from ctc_ray.hil.svm import Classifier

_START_STREAM = 0x72617265


def rare_positive(
    problem: Problem, strategy: str, seed: int, main_cluster: int | None, settings: LoopSettings
) -> Start:
    """Hide a share of the training cells; what to look for among them is chosen before each loop (`choose_target`).

    Every strategy chooses inside the region but `random`, which looks everywhere and is given as many finds a loop, of the same class,
    as `cluster-f1` (chance within the region) makes with the same seed.

    Raises:
        ConfigError: faithful mode, numbers that leave nothing to look at, or an unknown main cluster.

    Source: paper, Methods, "Real-world HiL experiment". Departures (each a fault that `LoopSettings.faults` can leave in): region and
    class are chosen on held-out labelled cells instead of the test set, and anew before each loop; predictions are renewed each loop.
    The background is never the region.
    """
    if settings.mode == "faithful":
        raise ConfigError(
            "rare-positive has no faithful mode, since the paper's expert cannot be asked again: use --mode corrected"
        )
    num = len(problem.train)
    num_hidden = round(settings.held_back * num)
    looks = int(settings.budget_s / settings.seconds_per_cell)
    if not 1 <= num_hidden <= num - 2 or looks < 1:
        raise ConfigError(
            f"rare-positive hides {num_hidden} of {num} training cells and looks at {looks} a loop: it needs at least one of each and "
            "two labels to start with; change hil.held_back, hil.budget_s or hil.seconds_per_cell"
        )
    clusters = problem.train_clusters_filled
    known = _regions(problem)
    if main_cluster is not None and main_cluster not in known:
        raise ConfigError(f"rare-positive: --main-cluster {main_cluster} is none of {', '.join(map(str, known))}")
    order = np.random.default_rng([seed, _START_STREAM]).permutation(num)
    labelled, hidden = order[num_hidden:], np.sort(order[:num_hidden])
    search = Search(everywhere=strategy == "random", main_cluster=main_cluster)
    within_pool = "random" if strategy == "cluster-f1" else strategy
    return Start(clusters, labelled, hidden, (looks,) * settings.loops, within_pool, search)


def choose_target(
    problem: Problem,
    state: LoopState,
    seen_by: Classifier,
    search: Search,
    former: Target | None,
    settings: LoopSettings,
    found: HeldOut | None = None,
) -> Target | None:
    """What the next loop looks for: the cluster with the lowest F1 on held-out cells, the class that is missed most often there.

    A cluster without a mistake, or without a cell in the pool that could be one, is passed over for the next weakest.

    Args:
        problem: for its validation cells.
        state: with the classifier of this loop.
        seen_by: classifier whose predictions say which cells are looked at.
        search: a main cluster is the only region; planned targets are taken as they are.
        former: target of the loop before.
        settings: faults `test-target` and `fixed-target`, and number of Monte-Carlo splits.
        found: held-out predictions of this loop's classifier, where they are there already.

    Returns:
        The target; None where there is nothing to look for.

    Raises:
        ConfigError: no cluster has a CTC among the held-out cells, or `fixed-target` has no mistake to start from.
    """
    if search.planned is not None:
        return search.planned[state.loop]
    fixed = settings.keeps("fixed-target")
    if fixed and former is not None:
        return former
    if settings.keeps("test-target"):
        found = predictions_of_test(problem, _classifier(state))
    elif found is None:
        known = state.labelled
        answers, clusters = state.answers, state.clusters[known]
        found = held_out_predictions(problem, _classifier(state), state.features[known], answers, clusters, settings)
    for cluster in _weakest_first(found, _regions(problem), search.main_cluster):
        target = _missed_most(found, cluster)
        if target is not None and len(cells_to_view(state, seen_by, target)):
            return target
    if fixed:
        raise ConfigError(
            "rare-positive: the first classifier makes no mistake to look for, and the reference stops here; leave out "
            "--fault fixed-target"
        )
    return None


def cells_to_view(state: LoopState, seen_by: Classifier, target: Target) -> Ints:
    """Cells of the pool, in its order, of the region and predicted to be of the other class than the one to find."""
    other = seen_by.predict(state.features[state.pool]) != target.finds
    inside = other if target.cluster is None else other & (state.clusters[state.pool] == target.cluster)
    found: Ints = state.pool[inside]
    return found


def search_pool(
    state: LoopState,
    target: Target | None,
    seen_by: Classifier,
    choose: Choose,
    expert: Labeller,
    rng: np.random.Generator,
) -> tuple[Ints, Labels]:
    """One loop of a search: which cells were looked at, and the answers that are learnt from.

    Args:
        state: with classifier and count.
        target: where to look and what for; None: nothing.
        seen_by: classifier whose predictions say which cells are looked at.
        choose: strategy for what to look at first.
        expert: who answers.
        rng: for the strategy.

    Returns:
        Positions (K,) in the order of looking, and answers (K,), `NO_CLASS` where a cell is not of the class that is looked for.
    """
    pool = state.pool[:0] if target is None or target.quota == 0 else cells_to_view(state, seen_by, target)
    if target is None or len(pool) == 0:
        return pool, np.empty(0, np.int8)
    count = state.count if target.quota is None else len(pool)
    chosen = choose(dataclasses.replace(state, pool=pool, count=count), rng)
    answers = expert.answer(chosen)
    if target.quota is not None:
        enough = np.cumsum(answers == target.finds) >= target.quota
        stop = int(np.argmax(enough)) + 1 if enough.any() else len(chosen)
        chosen, answers = chosen[:stop], answers[:stop]
    return chosen, np.where(answers == target.finds, answers, NO_CLASS).astype(np.int8)


def _regions(problem: Problem) -> list[int]:
    return [int(c) for c in np.unique(problem.train_clusters_filled) if c != BACKGROUND]


def _classifier(state: LoopState) -> Classifier:
    if state.classifier is None:
        raise ConfigError("a search needs a fitted classifier in the state")
    return state.classifier


def _weakest_first(found: HeldOut, regions: list[int], main_cluster: int | None) -> list[int]:
    """The main cluster alone where it is given, else all regions with a score, lowest F1 first."""
    if main_cluster is not None:
        return [main_cluster]
    scores = score_clusters(found.truth, found.predictions, found.clusters, "null", regions)
    defined = {c: float(s.f1) for c, s in scores.items() if s.f1 is not None}
    if not defined:
        raise ConfigError(
            "rare-positive: no cluster has a CTC among the held-out cells, so none is the weakest: label more cells"
        )
    return sorted(defined, key=lambda c: (defined[c], c))


def _missed_most(found: HeldOut, cluster: int) -> Target | None:
    """The class that is missed most often in a cluster, CTC where both are alike; None without a mistake."""
    inside = found.clusters == cluster
    missed = int(np.sum(inside & (found.truth == 1) & (found.predictions == 0)))
    false = int(np.sum(inside & (found.truth == 0) & (found.predictions == 1)))
    return Target(cluster, int(missed >= false)) if missed + false else None
