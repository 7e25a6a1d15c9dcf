"""The paper's real-world experiment, simulated: search the weakest cluster for the cells that the classifier misses.

The classifier starts with many labels. The expert has a few minutes a loop and looks at cells of one region that the classifier
gave its prevalent wrong class; those that turn out to be of the other class are learnt from, the rest is put aside. Unlabelled cells of
a release have no truth, so a share of the labelled training cells is hidden at the start and searched.
"""

from __future__ import annotations

import numpy as np

from ctc_ray.errors import ConfigError
from ctc_ray.hil.evidence import held_out_predictions
from ctc_ray.hil.pools import BACKGROUND, Problem
from ctc_ray.hil.scores import score_clusters
from ctc_ray.hil.settings import LoopSettings, Search, Start
from ctc_ray.hil.svm import Classifier

_START_STREAM = 0x72617265


def rare_positive(
    problem: Problem, strategy: str, seed: int, main_cluster: int | None, settings: LoopSettings
) -> Start:
    """Hide a share of the training cells and decide what to look for among them.

    The region is the cluster (background aside) with the lowest F1 on held-out cells, or `main_cluster`. The class to find is the one
    that the classifier misses most often there. Every strategy chooses inside the region but `random`, which looks everywhere
    and is given as many finds a loop as `cluster-f1` (chance within the region) makes with the same seed.

    Raises:
        ConfigError: faithful mode, numbers that leave nothing to look at, an unknown main cluster, or no mistake to mend.

    Source: paper, Methods, "Real-world HiL experiment". Departures: the region is chosen on held-out labelled cells instead of the
    test set; predictions are renewed each loop (the reference keeps the first ones).
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
    order = np.random.default_rng([seed, _START_STREAM]).permutation(num)
    labelled, hidden = order[num_hidden:], np.sort(order[:num_hidden])
    clusters = problem.train_clusters_filled
    cluster, finds = _region(problem, labelled, main_cluster, settings)
    targeted = strategy != "random"
    search = Search(cluster if targeted else None, finds)
    within_pool = "random" if strategy == "cluster-f1" else strategy
    return Start(clusters, labelled, hidden, (looks,) * settings.loops, within_pool, search)


def _region(
    problem: Problem, labelled: np.ndarray, main_cluster: int | None, settings: LoopSettings
) -> tuple[int, int]:
    """The cluster to look in and the class to find there."""
    features, answers = problem.train.features[labelled], problem.train.labels[labelled]
    clusters = problem.train_clusters_filled
    found = held_out_predictions(
        problem, Classifier.fit(features, answers), features, answers, clusters[labelled], settings
    )
    known = [int(c) for c in np.unique(clusters) if c != BACKGROUND]
    if main_cluster is None:
        scores = score_clusters(found.truth, found.predictions, found.clusters, "null", known)
        defined = {c: float(s.f1) for c, s in scores.items() if s.f1 is not None}
        if not defined:
            raise ConfigError(
                "rare-positive: no cluster has a CTC among the held-out cells, so none is the weakest: label more cells"
            )
        main_cluster = min(defined, key=lambda c: (defined[c], c))
    elif main_cluster not in known:
        raise ConfigError(f"rare-positive: --main-cluster {main_cluster} is none of {', '.join(map(str, known))}")
    inside = found.clusters == main_cluster
    missed = int(np.sum(inside & (found.truth == 1) & (found.predictions == 0)))
    false = int(np.sum(inside & (found.truth == 0) & (found.predictions == 1)))
    if missed + false == 0:
        raise ConfigError(
            f"rare-positive: the classifier makes no mistake in cluster {main_cluster}: there is nothing to mend"
        )
    return main_cluster, int(missed >= false)
