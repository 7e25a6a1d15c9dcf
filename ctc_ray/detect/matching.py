"""Match detected cells with CellSearch events: same field, near centres, overlapping boxes, one to one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from ctc_ray.errors import SchemaError


@dataclass(frozen=True)
class Boxes:
    """Axis-parallel boxes in px of the field; row, column order, origin at the top left.

    Attributes:
        field: (N,) int, frame number.
        low: (N, 2) float, row and column of the near corner.
        high: (N, 2) float, row and column of the far corner.
    """

    field: npt.NDArray[np.int64]
    low: npt.NDArray[np.float64]
    high: npt.NDArray[np.float64]

    def __post_init__(self) -> None:
        if self.low.shape != (len(self.field), 2) or self.high.shape != self.low.shape:
            raise SchemaError(f"boxes need (N, 2) corners for N fields; got {self.low.shape} and {self.high.shape}")
        if (self.high < self.low).any():
            raise SchemaError("a box has its far corner before its near corner: order the corners first")

    def __len__(self) -> int:
        return len(self.field)

    @property
    def centre(self) -> npt.NDArray[np.float64]:
        """(N, 2) row and column of the centres."""
        return (self.low + self.high) / 2

    @property
    def area(self) -> npt.NDArray[np.float64]:
        """(N,) area in px squared."""
        return np.asarray(np.prod(self.high - self.low, axis=1), dtype=np.float64)

    @classmethod
    def around(
        cls, field: npt.NDArray[np.int64], centre: npt.NDArray[np.float64], diameter_px: npt.NDArray[np.float64]
    ) -> Boxes:
        """Squares of the given side around centres (N, 2)."""
        half = np.asarray(diameter_px, dtype=np.float64)[:, None] / 2
        return cls(np.asarray(field, dtype=np.int64), centre - half, centre + half)


@dataclass(frozen=True)
class Pairs:
    """Matched objects: `left[i]` belongs to `right[i]`, their centres `distance_px[i]` apart."""

    left: npt.NDArray[np.int64]
    right: npt.NDArray[np.int64]
    distance_px: npt.NDArray[np.float64]


def centre_distance(left: Boxes, right: Boxes) -> npt.NDArray[np.float64]:
    """Euclidean distance (N, M) in px of the centres; infinite between fields."""
    apart = np.linalg.norm(left.centre[:, None] - right.centre[None], axis=2)
    return np.where(left.field[:, None] == right.field[None], apart, np.inf)


def admissible(left: Boxes, right: Boxes, *, tolerance_px: float, min_overlap: float) -> npt.NDArray[np.bool_]:
    """Say which pairs could be one object.

    Args:
        left: N boxes.
        right: M boxes.
        tolerance_px: the centres lie within this in each axis.
        min_overlap: the intersection covers more than this share of either box.

    Returns:
        (N, M) bool.

    Source: ACCEPT's rule (same frame, centres within 30 px in each axis, intersection above 75 % of either box).
    """
    same = left.field[:, None] == right.field[None]
    near = (np.abs(left.centre[:, None] - right.centre[None]) <= tolerance_px).all(axis=2)
    extent = np.minimum(left.high[:, None], right.high[None]) - np.maximum(left.low[:, None], right.low[None])
    intersection = np.prod(np.clip(extent, 0, None), axis=2)
    smaller = np.minimum(left.area[:, None], right.area[None])
    covered = np.divide(intersection, smaller, out=np.zeros_like(intersection), where=smaller > 0)
    return np.asarray(same & near & (covered > min_overlap))


def assign(distance_px: npt.NDArray[np.float64], allowed: npt.NDArray[np.bool_]) -> Pairs:
    """Pair objects one to one: as many pairs as can be, and of those the set with the least total distance.

    Args:
        distance_px: (N, M); entries that are not allowed may be infinite.
        allowed: (N, M) bool.

    Returns:
        Pairs sorted by `left`.

    Source: optimal assignment (Kuhn-Munkres); ACCEPT takes the first that fits.
    """
    rows, columns = np.nonzero(allowed)
    if len(rows) == 0:
        empty = np.zeros(0, np.int64)
        return Pairs(empty, empty, np.zeros(0))
    kept_rows, kept_columns = np.unique(rows), np.unique(columns)
    block, ok = distance_px[np.ix_(kept_rows, kept_columns)], allowed[np.ix_(kept_rows, kept_columns)]
    forbidden = (
        float(block[ok].sum()) + 1.0
    )  # dearer than all allowed pairs together, so the number of pairs comes first
    left, right = linear_sum_assignment(np.where(ok, block, forbidden))
    chosen = ok[left, right]
    left, right = left[chosen], right[chosen]
    return Pairs(kept_rows[left].astype(np.int64), kept_columns[right].astype(np.int64), block[left, right])
