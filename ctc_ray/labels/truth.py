"""Match detected cells to the phantom's truth, and draw the cells that the simulated expert labels. Runs without Ray."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import polars as pl
from scipy.spatial import cKDTree

from ctc_ray.errors import LabelError
from ctc_ray.labels.labeller import unit_hash
from ctc_ray.phantom.kinds import CellKind

_ARTEFACT_KINDS = frozenset({CellKind.SMEAR, CellKind.DEBRIS})
_MIN_OTHERS = 20
"""Others labelled of a patient with hardly a CTC: the classifier must also know patients that have none."""


def label_of_kind(kind: str) -> str:
    """Label that an expert gives an object of a phantom kind.

    Raises:
        LabelError: the kind is unknown.
    """
    try:
        known = CellKind(kind)
    except ValueError as error:
        raise LabelError(
            f"truth holds the unknown kind {kind!r}; known are {', '.join(item.value for item in CellKind)}"
        ) from error
    if known.is_ctc:
        return "ctc"
    return "artefact" if known in _ARTEFACT_KINDS else "non_ctc"


def match_points(
    points_N2: npt.NDArray[np.floating], others_M2: npt.NDArray[np.floating], radius_px: float
) -> npt.NDArray[np.int64]:
    """Match two sets of points one to one, nearest pairs first.

    Args:
        points_N2: (N, 2) row, column in px, finite.
        others_M2: (M, 2) row, column in px, finite.
        radius_px: pairs farther apart than this are no match.

    Returns:
        (N,) index into `others_M2`, -1 without a match; no index comes twice. Equal distances: the smaller N, then M, first.
    """
    found = np.full(len(points_N2), -1, np.int64)
    if not len(points_N2) or not len(others_M2):
        return found
    near = cKDTree(points_N2).sparse_distance_matrix(cKDTree(others_M2), radius_px, output_type="ndarray")
    taken = np.zeros(len(others_M2), bool)
    for pair in near[np.lexsort((near["j"], near["i"], near["v"]))]:
        if found[pair["i"]] < 0 and not taken[pair["j"]]:
            found[pair["i"]] = pair["j"]
            taken[pair["j"]] = True
    return found


def true_labels(cells: pl.DataFrame, truth: pl.DataFrame, radius_px: float) -> pl.DataFrame:
    """Label every detection of one patient from the truth.

    Args:
        cells: columns cell_id, field, row, col (centroid, px of the field) of one patient.
        truth: columns field, row, col, kind of the same patient.
        radius_px: how far a truth row may lie from the centroid.

    Returns:
        `cells` with `kind` (null: nothing there) and `label`; a detection of nothing is `non_ctc`. Sorted by cell_id.

    Raises:
        LabelError: the truth holds an unknown kind.
    """
    ordered = cells.sort("cell_id")
    kinds: list[str | None] = [None] * ordered.height
    fields = ordered["field"].to_numpy()
    points = ordered.select("row", "col").to_numpy().astype(np.float64)
    for field in np.unique(fields):
        here = np.flatnonzero(fields == field)
        there = truth.filter(pl.col("field") == int(field)).sort("row", "col")
        found = match_points(points[here], there.select("row", "col").to_numpy().astype(np.float64), radius_px)
        names = there["kind"].to_list()
        for index, match in zip(here[found >= 0], found[found >= 0], strict=True):
            kinds[index] = names[match]
    labels = ["non_ctc" if kind is None else label_of_kind(kind) for kind in kinds]
    return ordered.with_columns(kind=pl.Series(kinds, dtype=pl.String), label=pl.Series(labels, dtype=pl.String))


def draw_cells(labelled: pl.DataFrame, *, per_patient: int, balanced: bool, seed: int) -> pl.DataFrame:
    """Draw the cells of one patient that the expert labels.

    Args:
        labelled: columns cell_id and label.
        per_patient: cells at most.
        balanced: as many others as CTCs (and at least 20 others); else cells as they come.
        seed: of the draw.

    Returns:
        The drawn rows, in the order drawn. The draw depends on seed and cell ids alone, not on the order of rows.
    """
    ranked = (
        labelled.with_columns(
            rank=pl.Series([unit_hash(seed, "draw", name) for name in labelled["cell_id"]], dtype=pl.Float64)
        )
        .sort("rank", "cell_id")
        .drop("rank")
    )
    if not balanced:
        return ranked.head(per_patient)
    is_ctc = pl.col("label") == "ctc"
    ctc = ranked.filter(is_ctc).head(max(1, per_patient // 2))
    num_others = min(per_patient - ctc.height, max(ctc.height, _MIN_OTHERS))
    others = ranked.filter(~is_ctc).head(num_others)
    drawn = set(ctc["cell_id"]) | set(others["cell_id"])
    return ranked.filter(pl.col("cell_id").is_in(list(drawn)))
