"""How far adjacent fields of a cartridge overlap, measured from their pixels.

The xml of an archive steps by a full camera width, as if fields abutted; the stage leaves a strip that both neighbours
show. It is found by correlating strips of the DAPI page (nuclei are dense, so a narrow strip holds some) and adding up
the evidence of several seams.

Source: phase correlation of adjacent strips. Departure: detail is brought out by a filter of a few pixels and compared at each
overlap in turn. The cross-power spectrum of whole border strips finds the same overlaps on phantoms, but one pixel off where
the overlap is narrow (6 and 10 px).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from ctc_ray.segment.archive_xml import Geometry

FloatArray = npt.NDArray[np.float32]
MAX_OVERLAP_PX = 80
MIN_OVERLAP_PX = 6
"""Below, nuclei that two abutting fields share look like an overlap."""
MAX_SHEAR_PX = 2
"""Neighbours may be shifted this much along their seam."""
MIN_CORRELATION = 0.35
"""Mean over the seams; phantom fields give 0.9 and more at their overlap."""
MIN_EVIDENCE = 12.0
"""Mean correlation x root of the number of a strip's pixels; unrelated strips stay below about 5."""
MAX_SEAMS = 12


def seams_of(geometry: Geometry, frames: Iterable[int]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Pairs of adjacent frames, at most `MAX_SEAMS` each, spread over the cartridge.

    Args:
        geometry: the grid.
        frames: frame numbers that can be read.

    Returns:
        Pairs (left, right) and pairs (upper, lower).
    """
    placed = {geometry.place(frame): frame for frame in frames}
    beside = [(frame, placed[row, col + 1]) for (row, col), frame in sorted(placed.items()) if (row, col + 1) in placed]
    below = [(frame, placed[row + 1, col]) for (row, col), frame in sorted(placed.items()) if (row + 1, col) in placed]
    return _spread(beside), _spread(below)


def _spread(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    if len(pairs) <= MAX_SEAMS:
        return pairs
    return [pairs[round(index)] for index in np.linspace(0, len(pairs) - 1, MAX_SEAMS)]


def seam_correlation(first: np.ndarray, second: np.ndarray) -> FloatArray:
    """Correlation at each overlap of two fields, of which the second lies to the right of the first.

    Args:
        first: (H, W) counts; for fields above each other pass both transposed.
        second: (H, W) counts.

    Returns:
        (MAX_OVERLAP_PX + 1,) float32, -1 to 1: for an overlap of d columns the correlation of both strips, best over shears;
        zero below `MIN_OVERLAP_PX` - 1.
    """
    limit = min(MAX_OVERLAP_PX, first.shape[1] - 1)
    one, other = _flattened(first[:, -limit:]), _flattened(second[:, :limit])
    correlation = np.zeros(MAX_OVERLAP_PX + 1, dtype=np.float32)
    height = one.shape[0]
    for overlap in range(MIN_OVERLAP_PX - 1, limit + 1):
        left, right = one[:, limit - overlap :], other[:, :overlap]
        for shear in range(-MAX_SHEAR_PX, MAX_SHEAR_PX + 1):
            above = left[max(0, shear) : height + min(0, shear)]
            below = right[max(0, -shear) : height + min(0, -shear)]
            norm = float(np.sqrt((above**2).sum() * (below**2).sum()))
            if norm > 0:
                correlation[overlap] = max(correlation[overlap], float((above * below).sum()) / norm)
    return correlation


def overlap_from(correlations: Sequence[FloatArray], seam_px: int) -> int:
    """Overlap that the seams agree on.

    Args:
        correlations: of each seam, from `seam_correlation`.
        seam_px: length of a seam in pixels.

    Returns:
        Pixels; 0 where none stands out.
    """
    if not correlations:
        return 0
    mean = np.mean(correlations, axis=0)
    best = MIN_OVERLAP_PX + int(np.argmax(mean[MIN_OVERLAP_PX:]))
    # Fields that abut share the nuclei on their border: the correlation then rises towards an overlap of zero.
    is_peak = mean[best] > mean[best - 1]
    certain = mean[best] >= MIN_CORRELATION and mean[best] * np.sqrt(best * seam_px) >= MIN_EVIDENCE
    return best if is_peak and certain else 0


def _flattened(strip: np.ndarray) -> FloatArray:
    """Keep detail of a few pixels alone.

    Uneven background and the sensor's columns are common to all fields; and a nucleus on the border of two fields that
    merely abut looks alike on both sides as far as its coarse shape goes.
    """
    pixels = strip.astype(np.float32)
    pixels -= np.median(pixels, axis=0, keepdims=True)
    detail = ndimage.gaussian_filter(pixels, 0.8, mode="nearest") - ndimage.gaussian_filter(pixels, 2.0, mode="nearest")
    limit = 6 * float(np.std(detail)) + 1e-6
    return np.asarray(np.clip(detail, -limit, limit), dtype=np.float32)
