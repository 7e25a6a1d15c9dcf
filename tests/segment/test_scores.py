"""The choice of thresholds against trying cuts one by one, and against the stock package's golden section."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.optimize import linear_sum_assignment, minimize_scalar

from ctc_ray.segment.instances import Candidates, instances_from_candidates
from ctc_ray.segment.scores import (
    IOU_GRID,
    LOWEST_PROB,
    NMS_GRID,
    Labels,
    average_precision,
    best_cut,
    matches_gained,
)

SIDE, RAYS = 80, 16


def noisy_image(seed: int) -> tuple[Candidates, Labels]:
    """Seven true discs; candidates around them of any quality, and false ones between."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    truth = np.zeros((SIDE, SIDE), np.int32)
    points, dist, prob = [], [], []
    for number in range(1, 8):
        centre, radius = rng.uniform(8, SIDE - 8, 2), rng.uniform(5, 9)
        truth[((rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < radius**2) & (truth == 0)] = number
        for _ in range(6):
            points.append(np.clip(np.round(centre + rng.normal(0, 3, 2)), 2, SIDE - 3))
            dist.append(np.full(RAYS, radius * rng.uniform(0.6, 1.3)))
            prob.append(rng.uniform(0.15, 0.95))
    for _ in range(15):
        points.append(np.round(rng.uniform(4, SIDE - 4, 2)))
        dist.append(np.full(RAYS, rng.uniform(4, 9)))
        prob.append(rng.uniform(LOWEST_PROB + 0.01, 0.7))
    candidates = Candidates(
        np.array(prob, np.float32), np.array(dist, np.float32), np.array(points).astype(np.int64), (SIDE, SIDE)
    )
    return candidates, truth


def slow_score(candidates: Sequence[Candidates], truth: Sequence[Labels], prob: float, nms: float) -> float:
    found = [instances_from_candidates(some.above(prob), nms_thresh=nms).labels for some in candidates]
    return float(np.mean([average_precision(truth, found, iou=iou) for iou in IOU_GRID]))


@pytest.mark.parametrize("nms", NMS_GRID)
def test_best_cut_is_the_best_of_all_cuts_tried_one_by_one(nms: float) -> None:
    candidates, truth = map(list, zip(*(noisy_image(seed) for seed in range(3)), strict=True))
    cut = best_cut(candidates, truth, nms_thresh=nms)
    assert cut.score == pytest.approx(slow_score(candidates, truth, cut.prob, nms), abs=1e-9)
    probs = np.unique(np.concatenate([some.prob for some in candidates]))
    tried = [slow_score(candidates, truth, float(prob), nms) for prob in probs]
    assert cut.score == pytest.approx(max(tried), abs=1e-9)
    assert min(tried) < cut.score - 0.05


def test_best_cut_is_at_least_the_golden_section_of_the_stock_package() -> None:
    candidates, truth = map(list, zip(*(noisy_image(seed) for seed in (7, 8)), strict=True))
    highest = max(float(some.prob.max()) for some in candidates)
    bracket = (highest / 2, highest)
    for nms in NMS_GRID:

        def negative(prob: float, nms: float = nms) -> float:
            return -slow_score(candidates, truth, float(np.clip(prob, *bracket)), nms)

        stock = minimize_scalar(negative, method="golden", bracket=bracket, tol=1e-2, options={"maxiter": 20})
        assert best_cut(candidates, truth, nms_thresh=nms).score >= -stock.fun - 1e-9


def test_no_candidates_give_a_score_of_zero() -> None:
    none = Candidates(
        np.zeros(0, np.float32), np.zeros((0, RAYS), np.float32), np.zeros((0, 2), np.int64), (SIDE, SIDE)
    )
    assert best_cut([none], [noisy_image(0)[1]], nms_thresh=0.4).score == 0.0


@settings(max_examples=40, deadline=None)
@given(arrays.arrays(np.bool_, st.tuples(st.integers(0, 6), st.integers(0, 7))))
def test_gained_matches_add_up_to_an_assignment_of_each_prefix(matches: np.ndarray) -> None:
    gained = matches_gained(matches)
    assert set(np.unique(gained)) <= {0, 1}
    for num in range(matches.shape[1] + 1):
        rows, columns = linear_sum_assignment(matches[:, :num], maximize=True)
        assert gained[:num].sum() == matches[rows, columns].sum()
