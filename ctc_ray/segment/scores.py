"""How well instances agree with masks, and the choice of thresholds on held-out images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from stardist.matching import intersection_over_union, matching_dataset

from ctc_ray.segment.instances import Candidates, Instances, instances_from_candidates
from ctc_ray.segment.model import StarDist
from ctc_ray.segment.training_images import Pair
from ctc_ray.segment.weights import Thresholds

Labels = npt.NDArray[np.int32]
LOWEST_PROB = 0.1
"""Probability cuts below this are not looked at: the background alone would give most of the candidates."""
NMS_GRID = (0.3, 0.4, 0.5)
"""Source: stardist `StarDist2D.optimize_thresholds`, `nms_threshs`."""
IOU_GRID = (0.3, 0.5, 0.7)
"""Source: the same, `iou_threshs`."""


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
        The best overlap cut of `NMS_GRID`, and of all probability cuts of at least `LOWEST_PROB` the best; of equals the
        first. Where nothing is found at any cut, 0.5 and 0.4.

    Source: stardist `StarDist2D.optimize_thresholds` (same measure and overlap cuts). Departure: its golden section tries
    some twenty probability cuts and may end in a local maximum; here every cut that changes an instance is tried.
    """
    candidates = [model.candidates(pair.image, prob_thresh=LOWEST_PROB) for pair in pairs]
    truth = [pair.labels for pair in pairs]
    best = max((best_cut(candidates, truth, nms_thresh=nms) for nms in NMS_GRID), key=lambda cut: cut.score)
    return Thresholds(prob=best.prob, nms=best.nms) if best.score > 0 else Thresholds(prob=0.5, nms=0.4)


@dataclass(frozen=True)
class Cut:
    """A pair of thresholds and the mean AP over `IOU_GRID` that it gives."""

    prob: float
    nms: float
    score: float


def best_cut(candidates: Sequence[Candidates], truth: Sequence[Labels], *, nms_thresh: float) -> Cut:
    """The probability cut of the highest mean AP over `IOU_GRID`, at one overlap cut.

    Suppression goes from the most probable candidate down, and the more probable instance is drawn on top, so a higher
    cut only takes instances away and changes none that stays: one suppression holds the results of every cut.

    Args:
        candidates: of each image, above `LOWEST_PROB`.
        truth: label images (H, W), 0 background.
        nms_thresh: as for `instances_from_candidates`.

    Returns:
        The cut halfway between the last instance that is kept and the next.
    """
    probs, gains = [], []
    for some, labels in zip(candidates, truth, strict=True):
        found = instances_from_candidates(some, nms_thresh=nms_thresh)
        visible, overlap = _overlaps(labels, found)
        probs.append(found.prob[visible])
        gains.append(np.stack([matches_gained(overlap >= iou) for iou in IOU_GRID], axis=1))
    num_true = sum(len(np.unique(labels[labels > 0])) for labels in truth)
    prob, gain = np.concatenate(probs), np.concatenate(gains)
    order = np.argsort(-prob, kind="stable")
    prob, matched = prob[order], np.cumsum(gain[order], axis=0)
    num_found = np.arange(1, len(prob) + 1)[:, None]
    scores = np.mean(matched / np.maximum(1, num_found + num_true - matched), axis=1)
    following = np.append(prob[1:], np.float32(LOWEST_PROB))
    # A cut cannot stand between equal probabilities.
    scores[following >= prob] = -1.0
    if not len(scores) or scores.max() <= 0:
        return Cut(0.5, nms_thresh, 0.0)
    at = int(np.argmax(scores))
    return Cut(_between(float(following[at]), float(prob[at])), nms_thresh, float(scores[at]))


def _between(low: float, high: float) -> float:
    """The middle of two probabilities, in few digits where they leave room."""
    middle = (low + high) / 2
    return round(middle, 4) if low < round(middle, 4) < high else middle


def _overlaps(truth: Labels, found: Instances) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Instances with a pixel of their own, most probable first, and their IoU (true objects, those instances)."""
    (true_numbers, true), (numbers, drawn) = _consecutive(truth), _consecutive(found.labels)
    shape = (len(true_numbers) + 1, len(numbers) + 1)
    shared = np.bincount((true * shape[1] + drawn).ravel(), minlength=shape[0] * shape[1]).reshape(shape)
    iou = np.asarray(intersection_over_union(shared), dtype=np.float32)
    order = np.argsort(-found.prob[numbers - 1], kind="stable")
    return numbers[order] - 1, iou[1:, 1:][:, order]


def _consecutive(labels: Labels) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The labels of an image, rising and without 0, and the image with 1, 2, ... in their place."""
    numbers = np.unique(labels[labels > 0]).astype(np.int64)
    return numbers, np.searchsorted(np.append(0, numbers), labels).astype(np.int64)


def matches_gained(matches: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """How many one-to-one matches more there are with each further instance.

    Args:
        matches: (T, N), whether true object t and instance n overlap enough.

    Returns:
        (N,) 0 or 1; the sum of the first k is the size of a maximum matching between the first k columns and all rows.

    Source: augmenting paths (Kuhn's algorithm), column by column; stardist `matching` solves an assignment of the same
    size for each cut.
    """
    partner: dict[int, int] = {}
    rows_of = [np.flatnonzero(column) for column in matches.T]

    def augment(column: int, seen: set[int]) -> bool:
        for row in rows_of[column].tolist():
            if row not in seen:
                seen.add(row)
                if row not in partner or augment(partner[row], seen):
                    partner[row] = column
                    return True
        return False

    return np.array([augment(column, set()) for column in range(matches.shape[1])], dtype=np.int64)
