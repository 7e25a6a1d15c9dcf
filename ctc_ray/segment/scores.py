"""How well instances agree with masks, and the choice of thresholds on held-out images."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from stardist.matching import matching_dataset

from ctc_ray.segment.instances import instances_from_candidates
from ctc_ray.segment.model import StarDist
from ctc_ray.segment.patches import Pair
from ctc_ray.segment.weights import Thresholds

Labels = npt.NDArray[np.int32]
PROB_GRID = tuple(round(0.30 + 0.05 * index, 2) for index in range(9))
NMS_GRID = (0.3, 0.4, 0.5)
IOU_GRID = (0.3, 0.5, 0.7)


def average_precision(truth: Sequence[Labels], found: Sequence[Labels], *, iou: float) -> float:
    """TP / (TP + FP + FN) over all objects of all images, objects matched one to one at an intersection over union.

    Args:
        truth: label images (H, W), 0 background.
        found: label images of the same shapes.
        iou: smallest intersection over union of a match, 0 to 1.

    Source: stardist `matching.matching_dataset`, its `accuracy` (called AP there and in the StarDist paper).
    """
    score = matching_dataset(truth, found, thresh=iou, show_progress=False)
    return float(score.accuracy)


def optimise_thresholds(model: StarDist, pairs: Sequence[Pair]) -> Thresholds:
    """Choose the probability and overlap cuts that give the best mean AP at IoU 0.3, 0.5 and 0.7.

    Args:
        model: trained network.
        pairs: labelled images that are not the test set.

    Returns:
        The best of a grid; of equals the first.

    Source: stardist `StarDist2D.optimize_thresholds` (same measure; its search over the probability is a golden section).
    """
    candidates = [model.candidates(pair.image, prob_thresh=min(PROB_GRID)) for pair in pairs]
    truth = [pair.labels for pair in pairs]
    best, best_score = Thresholds(0.5, 0.4), -1.0
    for nms, prob in itertools.product(NMS_GRID, PROB_GRID):
        found = [instances_from_candidates(some.above(prob), nms_thresh=nms).labels for some in candidates]
        score = float(np.mean([average_precision(truth, found, iou=iou) for iou in IOU_GRID]))
        if score > best_score:
            best, best_score = Thresholds(prob=prob, nms=nms), score
    return best
