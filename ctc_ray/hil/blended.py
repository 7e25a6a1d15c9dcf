"""Strategies that want both: cells of which the classifier is unsure, and not many alike.

All take the state of the loop and a random generator and give positions of the pool, each once, the first choice first.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from sklearn.linear_model import LogisticRegression

from ctc_ray.hil.diverse import candidates, herd
from ctc_ray.hil.pools import Floats, Ints
from ctc_ray.hil.quotas import members_of, share_out, shrunken_error_rates
from ctc_ray.hil.state import LoopState
from ctc_ray.hil.svm import gamma_scale, squared_distances
from ctc_ray.hil.uncertain import choose_margin, decisions, probabilities

SHORTLIST = 10
"""Cells on the shortlist of cluster-margin for each cell wanted. Source: Citovsky et al., k_m = 10 k_t (Open Images)."""


def choose_cluster_margin(state: LoopState, rng: np.random.Generator) -> Ints:
    """Shortlist the cells nearest to the border, group them, and take from the groups in turn, the smallest group first.

    Source: Citovsky et al., Batch active learning at scale, NeurIPS 2021 (Cluster-Margin). Departure: average-linkage groups
    are made of the shortlist, as many as cells are wanted, instead of the whole pool once at a distance to be tuned.
    """
    count = min(state.count, len(state.pool))
    shortlist = choose_margin(dataclasses.replace(state, count=SHORTLIST * count), rng)
    if len(shortlist) <= count:
        return shortlist
    groups = fcluster(linkage(state.features[shortlist], "average"), count, criterion="maxclust")
    queues = [shortlist[groups == group] for group in np.unique(groups)]  # each by rising distance from the border
    queues.sort(key=len)
    chosen: list[int] = []
    turn = 0
    while len(chosen) < count:
        chosen += [int(queue[turn]) for queue in queues if turn < len(queue)]
        turn += 1
    return np.array(chosen[:count], dtype=np.int64)


def choose_uncertainty_herding(state: LoopState, rng: np.random.Generator) -> Ints:
    """As maxherding, but unsure cells need to be covered more, and a label covers less the more labels there are.

    Source: Bae, Oliveira and Sutherland, Uncertainty herding: one active learning method for all label budgets, ICLR 2025
    (uncertainty 1 - (p1 - p2), radius from the distances of labelled cells). Departures: probabilities by Platt's method instead of a
    temperature; the radius is the median distance of a labelled cell to its nearest labelled neighbour, the source's minimum being zero
    where two are alike, and never above the width of the classifier's kernel.
    """
    cells = candidates(state, rng)
    return cells[_herd_unsure(state, cells, min(state.count, len(cells)))]


def _herd_unsure(state: LoopState, cells: Ints, count: int) -> Ints:
    everything = np.concatenate([state.labelled, cells])
    unsure = 1.0 - np.abs(2.0 * probabilities(state, everything) - 1.0)
    gamma = max(gamma_scale(state.features[everything]), _labelled_gamma(state))
    return herd(state, cells, gamma, unsure, count)


def _labelled_gamma(state: LoopState) -> float:
    """1 / (2 r^2) with the median distance r of a labelled cell to its nearest labelled neighbour; 0 where r is zero."""
    features = state.features[state.labelled]
    if len(features) < 2:
        return 0.0
    squared = squared_distances(features, features)
    np.fill_diagonal(squared, np.inf)
    radius_squared = float(np.median(squared.min(axis=1)))
    return 1.0 / (2.0 * radius_squared) if radius_squared > 0 else 0.0


def choose_badge(state: LoopState, rng: np.random.Generator) -> Ints:
    """Spread over the gradients that the cells would give a linear head if its own call were right.

    A gradient is long where the head is unsure and points where the cell lies; k-means++ takes the longest first and then cells by their
    squared distance from those taken.

    Source: Ash et al., Deep batch active learning by diverse, uncertain gradient lower bounds, ICLR 2020. Departure: the head is a logistic
    regression on the features; of its two classes one gradient is kept, the other being its negative.
    """
    cells = rng.permutation(state.pool)
    gradients = _gradients(state, cells)
    lengths = np.einsum("nd,nd->n", gradients, gradients)
    chosen = [int(np.argmax(lengths))] if len(cells) and state.count else []
    nearest = np.full(len(cells), np.inf)
    while len(chosen) < min(state.count, len(cells)):
        nearest = np.minimum(nearest, squared_distances(gradients, gradients[chosen[-1:]])[:, 0])
        nearest[chosen] = 0.0
        if nearest.sum() <= 0:  # nothing but copies is left
            rest = np.setdiff1d(np.arange(len(cells)), chosen)
            chosen += rest[: state.count - len(chosen)].tolist()
            break
        chosen.append(int(rng.choice(len(cells), p=nearest / nearest.sum())))
    return cells[chosen]


def _gradients(state: LoopState, cells: Ints) -> Floats:
    features = state.features[cells]
    with_offset: Floats = np.concatenate([features, np.ones((len(cells), 1))], axis=1)
    if len(np.unique(state.answers)) < 2:
        return with_offset
    head = LogisticRegression(class_weight="balanced", max_iter=1_000)
    probability = head.fit(state.features[state.labelled], state.answers).predict_proba(features)[:, 1]
    residual = probability - (probability > 0.5)
    gradients: Floats = with_offset * residual[:, None]
    return gradients


def choose_random_mix(state: LoopState, rng: np.random.Generator) -> Ints:
    """Take half by margin and half at random: the random half sees what the classifier is wrongly sure of.

    Source: epsilon-greedy mixing, a common practice; half and half as in `docs/hil.md`.
    """
    count = min(state.count, len(state.pool))
    unsure = choose_margin(dataclasses.replace(state, count=(count + 1) // 2), rng)
    rest = np.setdiff1d(state.pool, unsure)
    return np.concatenate([unsure, rng.choice(rest, count - len(unsure), replace=False)])


def choose_cluster_herding(state: LoopState, rng: np.random.Generator) -> Ints:
    """Draw from clusters by the mistakes expected in them, and inside a cluster herd over its unsure cells.

    A cluster's quota follows its shrunken error rate times its cells in the pool: where most mistakes are waiting. Inside it
    cells are taken as by uncertainty-herding, which avoids the alike.

    Source: this project. The paper's idea of looking where the classifier is weak, with an error rate that few labels can carry instead
    of F1, and with the choice inside the cluster left to margin and diversity instead of chance.
    """
    members = members_of(state)
    available = np.array([len(cells) for cells in members.values()])
    weights = shrunken_error_rates(state, list(members)) * available
    quotas = share_out(state.count, weights, available)
    drawn = []
    for cells, quota in zip(members.values(), quotas, strict=True):
        if quota:
            inside = dataclasses.replace(state, pool=cells, count=int(quota))
            drawn.append(choose_uncertainty_herding(inside, rng))
    chosen = np.concatenate(drawn) if drawn else np.empty(0, np.int64)
    return chosen[np.argsort(np.abs(decisions(state, chosen)), kind="stable")]
