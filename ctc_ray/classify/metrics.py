"""F1, recall and precision of CTCs, in total and in each cluster of the latent map. Runs without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ctc_ray.errors import LabelError
from ctc_ray.schema import METRICS_SCHEMA

Convention = Literal["null", "paper"]


def ctc_scores(
    truth_N: npt.NDArray[np.integer],
    predicted_N: npt.NDArray[np.integer],
    *,
    convention: Convention = "null",
    is_cluster: bool = True,
) -> dict[str, Any]:
    """Score predictions, CTC positive.

    Args:
        truth_N: (N,) 1 for CTC, 0 for all else.
        predicted_N: (N,) likewise.
        convention: `null` leaves what has no value undefined; `paper` takes 0 for a division by zero, but an F1 of 1 for a
            cluster in which neither truth nor prediction holds a CTC (but some cell).
        is_cluster: whether the cells are one cluster.

    Returns:
        `f1`, `recall`, `precision` (float or None), `num_cells`, `num_ctc`, and `reason`, which says why a value is None.

    Raises:
        LabelError: lengths differ, or a value is neither 0 nor 1.

    Source: reference, binary F1 with zero_division 0; a cluster with only non-CTC labels and predictions scores 1.
    """
    truth, predicted = np.asarray(truth_N), np.asarray(predicted_N)
    if truth.shape != predicted.shape or truth.ndim != 1:
        raise LabelError(f"truth has shape {truth.shape}, predictions {predicted.shape}: give one of each a cell")
    for name, given in (("truth", truth), ("predictions", predicted)):
        odd = sorted(set(np.unique(given).tolist()) - {0, 1})
        if odd:
            raise LabelError(f"{name} hold {odd}; 1 is CTC, 0 is all else")
    hits = int(np.sum((truth == 1) & (predicted == 1)))
    num_ctc, num_predicted = int(truth.sum()), int(predicted.sum())
    values: dict[str, float | None] = {
        "f1": _ratio(2 * hits, num_ctc + num_predicted),
        "recall": _ratio(hits, num_ctc),
        "precision": _ratio(hits, num_predicted),
    }
    reason = _reason(len(truth), num_ctc, num_predicted)
    if convention == "paper" and len(truth):
        values = {name: 0.0 if value is None else value for name, value in values.items()}
        if is_cluster and num_ctc + num_predicted == 0:
            values["f1"] = 1.0
        reason = None
    return {**values, "num_cells": len(truth), "num_ctc": num_ctc, "reason": reason}


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _reason(num_cells: int, num_ctc: int, num_predicted: int) -> str | None:
    if num_cells == 0:
        return "no labelled cell"
    if num_ctc == 0 and num_predicted == 0:
        return "no CTC labelled and none predicted"
    if num_ctc == 0:
        return "no CTC labelled: recall has no value"
    if num_predicted == 0:
        return "no CTC predicted: precision has no value"
    return None


def metrics_rows(
    split: str,
    truth_N: npt.NDArray[np.integer],
    predicted_N: npt.NDArray[np.integer],
    clusters_N: npt.NDArray[np.integer],
    *,
    all_clusters: Sequence[int] = (),
    convention: Convention = "null",
) -> list[dict[str, Any]]:
    """Rows of `METRICS_SCHEMA`: the total first (cluster None), then each cluster, ascending.

    Args:
        split: role of the patients scored.
        truth_N: (N,) 1 or 0.
        predicted_N: (N,) 1 or 0.
        clusters_N: (N,) cluster of each cell, -1 background.
        all_clusters: clusters that get a row also where no cell lies in them.
        convention: as in `ctc_scores`.

    Raises:
        LabelError: as `ctc_scores`.
    """
    total = ctc_scores(truth_N, predicted_N, convention=convention, is_cluster=False)
    rows = [{"split": split, "cluster": None, **total}]
    for cluster in sorted({*np.unique(clusters_N).tolist(), *all_clusters}):
        here = np.asarray(clusters_N) == cluster
        scores = ctc_scores(np.asarray(truth_N)[here], np.asarray(predicted_N)[here], convention=convention)
        rows.append({"split": split, "cluster": int(cluster), **scores})
    return rows


def metrics_table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Rows of `metrics_rows` as a table of `METRICS_SCHEMA`."""
    return pa.Table.from_pylist(list(rows), schema=METRICS_SCHEMA)
