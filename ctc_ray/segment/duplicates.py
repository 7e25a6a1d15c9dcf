"""Which detections are one physical cell.

The rule, in this order:

1. Same field: two detections are one cell if the distance of their centroids is below the radius of the smaller one's
   disc, that is, one lies in the middle of the other (non-maximum suppression leaves such pairs where a small outline
   sits in a large one).
2. Different fields of one cartridge, where the grid is known: pairs of detections nearer than `radius_px` in global
   coordinates are joined, nearest pairs first, as long as no cell would then have two detections (or two groups of rule 1)
   in the same field. Two detections that both reach the border of their field may be the two parts of one cell that
   the border cuts: they are joined up to the radius of a disc of both areas together, since the centroids of two parts
   of a disc are never farther apart than its radius.

A physical cell is named after its most probable detection. Nothing is dropped.

Source: reference paper, Methods ("duplicates were removed", no rule given); radius from half a CTC.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

FloatArray = npt.NDArray[np.floating]


def physical_ids(
    cell_ids: Sequence[str],
    *,
    field: npt.NDArray[np.integer],
    global_row: FloatArray,
    global_col: FloatArray,
    radius_px: FloatArray,
    prob: FloatArray,
    border_px: FloatArray,
    merge_radius_px: float,
    across_fields: bool,
) -> list[str]:
    """Name the physical cell of every detection of one cartridge.

    Args:
        cell_ids: N names of detections.
        field: (N,) frame numbers.
        global_row: (N,) centroid rows in pixels of the cartridge.
        global_col: (N,) centroid columns in pixels of the cartridge.
        radius_px: (N,) radii of the discs of equal area, pixels.
        prob: (N,) object probabilities.
        border_px: (N,) distances of the centroids from the nearest border of their field, pixels.
        merge_radius_px: detections of different fields nearer than this may be one cell.
        across_fields: whether global coordinates mean anything (the grid is known).

    Returns:
        For each detection the `cell_id` of its cell's most probable detection (of equals the smallest name).
    """
    if not len(cell_ids):
        return []
    positions = np.stack([global_row, global_col], axis=1).astype(np.float64)
    groups = _Groups(np.asarray(field))
    largest = float(np.max(radius_px, initial=0.0))
    reach = max(merge_radius_px, np.sqrt(2.0) * largest) if across_fields else largest
    first, second, distance = _near_pairs(positions, reach)
    same = field[first] == field[second]
    nested = same & (distance < np.minimum(radius_px[first], radius_px[second]))
    for one, other in zip(first[nested], second[nested], strict=True):
        groups.join(one, other, within_field=True)
    if across_fields:
        cut = border_px < radius_px
        both = np.where(cut[first] & cut[second], np.hypot(radius_px[first], radius_px[second]), 0.0)
        across = np.flatnonzero(~same & (distance < np.maximum(merge_radius_px, both)))
        for index in across[np.lexsort((second[across], first[across], distance[across]))]:
            groups.join(first[index], second[index], within_field=False)
    roots = [groups.root(index) for index in range(len(cell_ids))]
    best: dict[int, int] = {}
    for index in sorted(range(len(cell_ids)), key=lambda index: (-prob[index], cell_ids[index])):
        best.setdefault(roots[index], index)
    return [cell_ids[best[root]] for root in roots]


def _near_pairs(positions: npt.NDArray[np.float64], radius: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    pairs = cKDTree(positions).query_pairs(radius, output_type="ndarray")
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    first, second = pairs[:, 0], pairs[:, 1]
    return first, second, np.linalg.norm(positions[first] - positions[second], axis=1)


class _Groups:
    """Union-find that knows which fields a group covers."""

    def __init__(self, field: np.ndarray) -> None:
        self._parent = list(range(len(field)))
        self._fields = [{int(number)} for number in field]

    def root(self, index: int) -> int:
        while self._parent[index] != index:
            self._parent[index] = self._parent[self._parent[index]]
            index = self._parent[index]
        return index

    def join(self, one: int, other: int, *, within_field: bool) -> None:
        one, other = sorted((self.root(int(one)), self.root(int(other))))
        if one == other or (not within_field and self._fields[one] & self._fields[other]):
            return
        self._parent[other] = one
        self._fields[one] |= self._fields[other]
