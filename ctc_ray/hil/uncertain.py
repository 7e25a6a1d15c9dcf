"""Strategies that ask about the cells of which the classifier is least sure.

All take the state of the loop and a random generator and give positions of the pool, each once, the first choice first.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from ctc_ray.errors import ConfigError
from ctc_ray.hil.pools import Floats, Ints, Labels
from ctc_ray.hil.state import LoopState
from ctc_ray.hil.svm import Classifier, decide, fit, gamma_scale, pairwise_squared_distances, rbf_kernel

COMMITTEE = 10
"""Members of the committee. Source: Abe and Mamitsuka (ICML 1998) take 10 to 20 bags."""
_FOLDS = 5


def decisions(state: LoopState, cells: Ints) -> Floats:
    """Decision values (K,) of cells at positions (K,); CTC above zero.

    Raises:
        ConfigError: the state has no classifier yet.
    """
    if state.classifier is None:
        raise ConfigError("this strategy needs a fitted classifier in the state")
    return state.classifier.decision_function(state.features[cells])


def choose_margin(state: LoopState, rng: np.random.Generator) -> Ints:
    """Take the cells nearest to the classifier's border; ties in random order.

    Source: Tong and Koller, Support vector machine active learning, JMLR 2:45 (2001), "simple margin".
    """
    shuffled = rng.permutation(state.pool)
    return shuffled[np.argsort(np.abs(decisions(state, shuffled)), kind="stable")[: state.count]]


def choose_entropy(state: LoopState, rng: np.random.Generator) -> Ints:
    """Take the cells whose probability of being a CTC has the highest entropy; ties in random order.

    Of two classes the entropy is highest at probability one half. That is not the classifier's border: classes weighted alike
    put the border where rare CTCs have a probability below one half.

    Source: Shannon entropy as in Settles, Active learning literature survey (2009), section 3.1; probabilities by Platt's method.
    """
    shuffled = rng.permutation(state.pool)
    return shuffled[np.argsort(np.abs(probabilities(state, shuffled) - 0.5), kind="stable")[: state.count]]


def choose_qbc(state: LoopState, rng: np.random.Generator) -> Ints:
    """Take the cells on which classifiers fitted to resampled labels disagree most.

    Ties, of which ten votes give many, go to the smaller mean distance from the borders, then to chance.

    Source: query by bagging, Abe and Mamitsuka, ICML 1998; disagreement as vote entropy (Engelson and Dagan, ACL 1996). Departure:
    resampled within each class, since few labels hold few CTCs.
    """
    shuffled = rng.permutation(state.pool)
    values = committee_decisions(state, shuffled, rng)
    split = np.abs((values > 0).mean(axis=0) - 0.5)
    return shuffled[np.lexsort((np.abs(values.mean(axis=0)), split))[: state.count]]


def choose_uncertainty_ensemble(state: LoopState, rng: np.random.Generator) -> Ints:
    """Take cells that any of three measures of doubt ranks high: in turn the next of each ranking.

    The measures are the distance from the border (margin), the distance of the probability from one half (entropy), and the spread of the
    probabilities that a committee on resampled labels gives. Each errs in its own way: the border of classes weighted alike lies where
    rare CTCs are improbable, the probabilities of few labels are ill calibrated, and a committee is of one mind far from all labels. What
    one of them misses another asks about.

    Source: this project. Fusion of rankings by the best place (CombMIN of Fox and Shaw, TREC-2 1994); the measures as in `choose_margin`,
    `choose_entropy` and `choose_qbc`, the last by the spread of probabilities instead of votes.
    """
    shuffled = rng.permutation(state.pool)
    slope, offset = _platt(state)
    committee = expit(slope * committee_decisions(state, shuffled, rng) + offset)
    own = decisions(state, shuffled)
    measures = (np.abs(own), np.abs(expit(slope * own + offset) - 0.5), -committee.std(axis=0))
    best_place = np.min([np.argsort(np.argsort(values, kind="stable")) for values in measures], axis=0)
    return shuffled[np.argsort(best_place, kind="stable")[: state.count]]


def committee_decisions(state: LoopState, cells: Ints, rng: np.random.Generator) -> Floats:
    """Decision values (M, K) of cells at positions (K,) by classifiers fitted to labels resampled within each class."""
    return np.stack([_resampled(state, rng).decision_function(state.features[cells]) for _ in range(COMMITTEE)])


def _resampled(state: LoopState, rng: np.random.Generator) -> Classifier:
    rows = [np.flatnonzero(state.answers == label) for label in np.unique(state.answers)]
    drawn = np.concatenate([rng.choice(group, len(group)) for group in rows])
    return Classifier.fit(state.features[state.labelled[drawn]], state.answers[drawn])


def probabilities(state: LoopState, cells: Ints) -> Floats:
    """Probability (K,) of being a CTC of cells at positions (K,).

    Decision values of the classifier go through a sigmoid that was fitted to the decision values of labelled cells, each from
    classifiers that did not know them. Where the labels have one class, the share of CTCs is that class's prior for all.

    Source: Platt, Probabilistic outputs for support vector machines (1999); targets softened as he says.
    """
    slope, offset = _platt(state)
    found: Floats = expit(slope * decisions(state, cells) + offset)
    return found


def _platt(state: LoopState) -> tuple[float, float]:
    return sigmoid(held_out_decisions(state.features[state.labelled], state.answers), state.answers)


def held_out_decisions(features: Floats, labels: Labels) -> Floats:
    """Decision value (L,) of each labelled cell by a classifier fitted to four fifths of the others.

    Args:
        features: (L, D).
        labels: (L,) 0 or 1.

    Folds are dealt out within each class in the order of labelling, so that nothing is drawn here.
    """
    squared = pairwise_squared_distances(features)
    fold = np.empty(len(labels), np.int64)
    for label in (0, 1):
        rows = np.flatnonzero(labels == label)
        fold[rows] = np.arange(len(rows)) % _FOLDS
    values = np.zeros(len(labels))
    for number in range(_FOLDS):
        held, kept = np.flatnonzero(fold == number), np.flatnonzero(fold != number)
        if len(held) == 0 or len(kept) == 0:
            continue
        gamma = gamma_scale(features[kept])
        decision = fit(rbf_kernel(squared[np.ix_(kept, kept)], gamma), labels[kept], gamma)
        values[held] = decide(rbf_kernel(squared[np.ix_(held, kept[decision.support])], gamma), decision)
    return values


def sigmoid(values: Floats, labels: Labels) -> tuple[float, float]:
    """Slope and offset of P(CTC) = 1 / (1 + exp(-(slope * value + offset))), by Platt's softened likelihood.

    Args:
        values: (L,) decision values.
        labels: (L,) 0 or 1.
    """
    positive = int(labels.sum())
    negative = len(labels) - positive
    targets = np.where(labels == 1, (positive + 1.0) / (positive + 2.0), 1.0 / (negative + 2.0))

    def loss(at: Floats) -> tuple[float, Floats]:
        scores = at[0] * values + at[1]
        residual = expit(scores) - targets
        cost = float(np.sum(np.logaddexp(0.0, scores) - targets * scores))
        return cost, np.array([residual @ values, residual.sum()])

    start = np.array([0.0, np.log((positive + 1.0) / (negative + 1.0))])
    found = minimize(loss, start, jac=True, method="L-BFGS-B")
    return float(found.x[0]), float(found.x[1])
