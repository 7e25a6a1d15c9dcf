"""From output maps to instances: exactly the stock `predict_instances(sparse=True)`, without TensorFlow.

The package `stardist` supplies non-maximum suppression and polygons (C++); this module supplies what its TensorFlow
model class does around them: normalisation, padding, the choice of candidates, rendering.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from stardist.geometry import dist_to_coord, polygons_to_label
from stardist.nms import non_maximum_suppression_sparse

logger = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

BORDER_GRID_CELLS = 2
"""Candidates this near to the border of the maps are left out. Source: stardist `models/base.py`, argument `b`."""
MIN_DISTANCE_PX = 1e-3
"""Distances below are raised to this. Source: stardist `models/base.py`, `_prep`."""
DEFAULT_MAX_CANDIDATES = 200_000
"""Above this number non-maximum suppression takes minutes (stardist issue 195); a dense field has about 25,000."""


@dataclass(frozen=True)
class Candidates:
    """Positions of the maps above the threshold, not yet suppressed.

    Attributes:
        prob: (M,) float32, 0 to 1.
        dist: (M, n_rays) float32, pixels.
        points: (M, 2) int64, (row, column) pixels of the image.
        shape: (H, W) of the image.
        num_dropped: candidates left out by the cap.
    """

    prob: FloatArray
    dist: FloatArray
    points: IntArray
    shape: tuple[int, int]
    num_dropped: int = 0

    def above(self, prob_thresh: float) -> Candidates:
        """Those strictly above a higher threshold."""
        kept = self.prob > prob_thresh
        return Candidates(self.prob[kept], self.dist[kept], self.points[kept], self.shape, self.num_dropped)


@dataclass(frozen=True)
class Instances:
    """The objects of one image, best first.

    Attributes:
        labels: (H, W) int32; 0 is background, k + 1 is object k of the other arrays.
        points: (N, 2) int64, StarDist's centres (row, column) in pixels.
        prob: (N,) float32, object probability, falling.
        polygons: (N, 2, n_rays) float32, vertices as (row, column) in pixels.
        num_candidates: candidates before suppression.
        num_dropped: candidates left out by the cap, 0 if it was not reached.
    """

    labels: npt.NDArray[np.int32]
    points: IntArray
    prob: FloatArray
    polygons: FloatArray
    num_candidates: int = 0
    num_dropped: int = 0

    def __len__(self) -> int:
        """Number of objects."""
        return len(self.points)


def normalize_percentile(image: npt.ArrayLike, low: float = 1.0, high: float = 99.8) -> FloatArray:
    """Scale an image so that its `low` percentile becomes 0 and its `high` percentile 1, without clipping.

    Args:
        image: (H, W) or (H, W, C), any real dtype; channels are scaled one by one.
        low: percentile in 0 to 100.
        high: percentile in 0 to 100.

    Returns:
        float32 of the image's shape; all zero for a constant image.

    Source: csbdeep `utils.normalize(image, 1, 99.8)`, as the StarDist examples call it (not its default of 3).
    """
    pixels = np.asarray(image)
    planes = np.moveaxis(pixels, -1, 0) if pixels.ndim == 3 else pixels[None]
    limits = np.stack([image_percentiles(plane, (low, high)) for plane in planes], axis=-1).astype(np.float32)
    below, above = limits if pixels.ndim == 3 else limits[:, 0]
    scaled = pixels.astype(np.float32)
    scaled -= below
    scaled /= above - below + np.float32(1e-20)
    return scaled


def image_percentiles(plane: np.ndarray, percentiles: tuple[float, ...]) -> npt.NDArray[np.floating[Any]]:
    """Percentiles of an image, those of `np.percentile`; 8 and 16 bit images are counted instead of sorted.

    Args:
        plane: (H, W), any real dtype.
        percentiles: 0 to 100.
    """
    if plane.dtype not in (np.uint8, np.uint16) or plane.size == 0:
        return np.asarray(np.percentile(plane, percentiles))
    ranks = np.cumsum(np.bincount(plane.ravel(), minlength=1))
    place = (plane.size - 1) * (np.asarray(percentiles) / 100)
    lower = np.searchsorted(ranks, np.floor(place), side="right").astype(np.float64)
    upper = np.searchsorted(ranks, np.ceil(place), side="right").astype(np.float64)
    part = place - np.floor(place)
    # NumPy interpolates from the nearer side; the same sums give the same bits.
    return np.where(part < 0.5, lower + (upper - lower) * part, upper - (upper - lower) * (1 - part))


def pad_to_multiple(image: FloatArray, multiple: tuple[int, int]) -> FloatArray:
    """Pad by reflection at the end of both axes, up to a multiple.

    Args:
        image: (H, W, C) float32.
        multiple: rows and columns that the sides must be a multiple of.

    Source: stardist `models/base.py`, `StarDistPadAndCropResizer`.
    """
    pad_row, pad_column = ((-side) % step for side, step in zip(image.shape[:2], multiple, strict=True))
    padded: FloatArray = np.pad(image, ((0, pad_row), (0, pad_column), (0, 0)), mode="reflect")
    return padded


def candidates_at(
    positions: IntArray,
    prob: FloatArray,
    dist: FloatArray,
    *,
    map_shape: tuple[int, int],
    shape: tuple[int, int],
    grid: tuple[int, int],
    max_candidates: int = DEFAULT_MAX_CANDIDATES,
) -> Candidates:
    """Choose the positions of the *padded* maps that may be objects, among those above the probability threshold.

    Args:
        positions: (M, 2) integers, (row, column) on the grid, in row-major order.
        prob: (M,) float32.
        dist: (M, n_rays) float32, pixels.
        map_shape: (H', W') of the maps of the padded image.
        shape: (H, W) of the image before padding; positions beyond it are left out.
        grid: pixels (row, column) between two positions.
        max_candidates: the most probable are kept, the rest is left out and logged.

    Source: stardist `models/base.py`, `_predict_sparse_generator`; the cap is ours.
    """
    points = positions * np.asarray(grid, dtype=np.int64)
    last = np.asarray(map_shape) - BORDER_GRID_CELLS
    kept = np.all((positions >= BORDER_GRID_CELLS) & (positions < last) & (points < np.asarray(shape)), axis=1)
    points, prob, dist = points[kept], prob[kept], dist[kept]
    num_dropped = max(0, len(points) - max_candidates)
    if num_dropped:
        logger.warning("%d candidates: only the %d most probable are kept", len(points), max_candidates)
        best = np.sort(np.argsort(prob, kind="stable")[::-1][:max_candidates])
        points, prob, dist = points[best], prob[best], dist[best]
    return Candidates(prob, np.maximum(np.float32(MIN_DISTANCE_PX), dist), points, shape, num_dropped)


def instances_from_candidates(candidates: Candidates, *, nms_thresh: float) -> Instances:
    """Suppress overlapping candidates and draw the rest.

    Args:
        candidates: positions of one image.
        nms_thresh: a polygon goes when its overlap with a more probable one, over the *smaller* of both areas, is
            above this.

    Source: stardist `models/model2d.py`, `_instances_from_prediction`.
    """
    # The C++ code reports through OpenMP threads; their number is the caller's (OMP_NUM_THREADS).
    points, prob, dist, _ = non_maximum_suppression_sparse(
        candidates.dist, candidates.prob, candidates.points, nms_thresh=nms_thresh
    )
    labels = polygons_to_label(dist, points, prob=prob, shape=candidates.shape)
    polygons = dist_to_coord(dist, points)
    return Instances(labels, points, prob, polygons, len(candidates.prob), candidates.num_dropped)
