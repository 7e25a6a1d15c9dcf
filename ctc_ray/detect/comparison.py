"""Compare one patient's candidates with CellSearch: who found which CTC, and how many cells the expert had to look at."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from ctc_ray.detect.matching import Boxes, admissible, assign, centre_distance
from ctc_ray.labels.consensus import with_class

SENSITIVITY_TOLERANCES_PX = (5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0)
MATCHES_FRAME: dict[str, Any] = {
    "patient": pl.String,
    "cell_id": pl.String,
    "event_id": pl.String,
    "distance_px": pl.Float32,
    "event_is_ctc": pl.Boolean,
    "found_by": pl.String,
}
JUDGEMENTS_FRAME: dict[str, Any] = {
    "patient": pl.String,
    "cell_id": pl.String,
    "is_ctc": pl.Boolean,
    "judged_by": pl.String,
}
PPV_FRAME: dict[str, Any] = {
    "patient": pl.String,
    "num_candidates": pl.Int64,
    "num_judged": pl.Int64,
    "num_model_ctc": pl.Int64,
    "model_ppv": pl.Float64,
    "num_events": pl.Int64,
    "num_cellsearch_ctc": pl.Int64,
    "cellsearch_ppv": pl.Float64,
    "num_both": pl.Int64,
    "num_model_only": pl.Int64,
    "num_cellsearch_only": pl.Int64,
    "num_cellsearch_ctc_segmented": pl.Int64,
}
"""The paper's Table 2 and the overlap; see `summarise_patient` for each column."""


@dataclass(frozen=True)
class PatientInput:
    """What the comparison of one patient needs.

    Attributes:
        patient: patient id.
        candidates: CANDIDATES_SCHEMA.
        detections: all detections of the patient: cell_id, physical_id, field, row, col (px in the field), diameter_px, probability.
        events: `ctc_ray.detect.events.EVENTS_FRAME`.
        judgements: cell_id, is_ctc, judged_by for the candidates whose truth is known.
    """

    patient: str
    candidates: pl.DataFrame
    detections: pl.DataFrame
    events: pl.DataFrame
    judgements: pl.DataFrame


def cell_boxes(detections: pl.DataFrame) -> Boxes:
    """Boxes of cells: the square of the equivalent diameter around the centroid.

    The crop window (48 px) would contain nearly every event within the tolerance, so that the overlap rule would say nothing.
    """
    return Boxes.around(
        detections["field"].to_numpy().astype(np.int64), _centres(detections), detections["diameter_px"].to_numpy()
    )


def event_boxes(events: pl.DataFrame) -> Boxes:
    """Boxes of events, in px of their fields."""
    return Boxes(
        events["field"].to_numpy().astype(np.int64),
        events.select("row_low", "col_low").to_numpy().astype(np.float64).reshape(-1, 2),
        events.select("row_high", "col_high").to_numpy().astype(np.float64).reshape(-1, 2),
    )


def match_events(
    candidates: pl.DataFrame, detections: pl.DataFrame, events: pl.DataFrame, *, tolerance_px: float, min_overlap: float
) -> pl.DataFrame:
    """Match candidates and events.

    A candidate stands for a physical cell; each of its detections can match one event of its own field, so that a cell which
    two adjacent fields show, and which CellSearch lists in both, matches both. Within a field the matching is one to one.

    Returns:
        cell_id (of the candidate), event_id, distance_px; one row a match.
    """
    owners = candidates.select("physical_id", pl.col("cell_id").alias("candidate_id"))
    shown = detections.join(owners, on="physical_id", how="inner", maintain_order="left")
    left, right = cell_boxes(shown), event_boxes(events)
    allowed = admissible(left, right, tolerance_px=tolerance_px, min_overlap=min_overlap)
    pairs = assign(centre_distance(left, right), allowed)
    return pl.DataFrame(
        {
            "cell_id": shown["candidate_id"].gather(pairs.left),
            "event_id": events["event_id"].gather(pairs.right),
            "distance_px": pl.Series(pairs.distance_px, dtype=pl.Float32),
        },
    ).sort("cell_id", "event_id")


def matches_frame(given: PatientInput, matched: pl.DataFrame) -> pl.DataFrame:
    """All candidates and events of a patient with who found each: both, model, cellsearch; columns of MATCHES_FRAME."""
    both = matched.join(given.events.select("event_id", pl.col("is_ctc").alias("event_is_ctc")), on="event_id")
    model = given.candidates.join(matched, on="cell_id", how="anti").select("cell_id")
    cellsearch = given.events.join(matched, on="event_id", how="anti").select(
        "event_id", pl.col("is_ctc").alias("event_is_ctc")
    )
    parts = [
        frame.with_columns(pl.lit(name).alias("found_by"), pl.lit(given.patient).alias("patient"))
        for frame, name in ((both, "both"), (model, "model"), (cellsearch, "cellsearch"))
    ]
    empty = pl.DataFrame(schema=MATCHES_FRAME)
    return (
        pl.concat([empty, *parts], how="diagonal_relaxed")
        .select(pl.col(name).cast(kind) for name, kind in MATCHES_FRAME.items())
        .sort("found_by", "cell_id", "event_id")
    )


def describe_events(given: PatientInput) -> pl.DataFrame:
    """Events with the segmented cell that lies nearest to the centre of each, so that a miss can be explained.

    Returns:
        The columns of `events`, patient, and nearest_cell_id, nearest_distance_px, nearest_probability: null where no cell lies
        in the event's box or within half a diameter of its centre.
    """
    left, right = event_boxes(given.events), cell_boxes(given.detections)
    found: list[tuple[str | None, float | None, float | None]] = []
    for position in range(len(left)):
        here = np.flatnonzero(right.field == left.field[position])
        centre = right.centre[here]
        distance = np.linalg.norm(centre - left.centre[position], axis=1)
        inside = ((centre >= left.low[position]) & (centre <= left.high[position])).all(axis=1)
        side = right.high[here, 0] - right.low[here, 0]
        near = np.flatnonzero(inside | (distance <= side / 2))
        if len(near) == 0:
            found.append((None, None, None))
            continue
        best = near[np.argmin(distance[near])]
        row = given.detections.row(int(here[best]), named=True)
        found.append((row["cell_id"], float(distance[best]), row["probability"]))
    nearest = pl.DataFrame(
        found,
        schema={
            "nearest_cell_id": pl.String,
            "nearest_distance_px": pl.Float32,
            "nearest_probability": pl.Float32,
        },
        orient="row",
    )
    return pl.concat([given.events.with_columns(patient=pl.lit(given.patient)), nearest], how="horizontal")


def shared_ctcs(given: PatientInput, matched: pl.DataFrame) -> pl.DataFrame:
    """Matches of CTC events with a candidate that is a CTC, or that nobody has judged.

    A box of CellSearch can hold a CTC and its neighbour; where only the neighbour is a candidate, the CTC was not found.

    Returns:
        Rows of `match_events`.
    """
    refuted = given.judgements.filter(~pl.col("is_ctc"))
    ctc_events = given.events.filter("is_ctc")
    return matched.join(ctc_events, on="event_id", how="semi").join(refuted, on="cell_id", how="anti")


def summarise_patient(given: PatientInput, matched: pl.DataFrame, described: pl.DataFrame) -> dict[str, Any]:
    """Make one row of the paper's Table 2 with the overlap of the two systems.

    `num_model_ctc` counts the judged candidates that are CTCs and `model_ppv` is their share of `num_judged`: both null where
    nothing is judged. `num_both` counts CTC events that `shared_ctcs` finds, `num_cellsearch_only` the others: they add up to
    `num_cellsearch_ctc`. `num_model_only` counts CTC candidates that match no CTC event.
    `num_cellsearch_ctc_segmented` counts CTC events where a cell was segmented at all.
    """
    hit = shared_ctcs(given, matched)
    judged = given.judgements.join(given.candidates.select("cell_id"), on="cell_id", how="semi")
    ctc_candidates = set(judged.filter("is_ctc")["cell_id"])
    num_judged, num_events, num_ctc = judged.height, given.events.height, int(given.events["is_ctc"].sum())
    segmented = described.filter(pl.col("is_ctc") & pl.col("nearest_cell_id").is_not_null()).height
    return {
        "patient": given.patient,
        "num_candidates": given.candidates.height,
        "num_judged": num_judged,
        "num_model_ctc": len(ctc_candidates) if num_judged else None,
        "model_ppv": share(len(ctc_candidates), num_judged),
        "num_events": num_events,
        "num_cellsearch_ctc": num_ctc,
        "cellsearch_ppv": share(num_ctc, num_events),
        "num_both": hit["event_id"].n_unique(),
        "num_model_only": len(ctc_candidates - set(hit["cell_id"])) if num_judged else None,
        "num_cellsearch_only": num_ctc - hit["event_id"].n_unique(),
        "num_cellsearch_ctc_segmented": segmented,
    }


def sensitivity_rows(given: PatientInput, *, tolerance_px: float, min_overlap: float) -> list[dict[str, Any]]:
    """How many CTC events are matched as the tolerance varies: patient, tolerance_px, min_overlap, num_matches, num_both."""
    rows = []
    for tolerance in sorted({*SENSITIVITY_TOLERANCES_PX, tolerance_px}):
        matched = match_events(
            given.candidates, given.detections, given.events, tolerance_px=tolerance, min_overlap=min_overlap
        )
        ctc = shared_ctcs(given, matched)
        rows.append(
            {
                "patient": given.patient,
                "tolerance_px": tolerance,
                "min_overlap": min_overlap,
                "num_matches": matched.height,
                "num_both": ctc.height,
            }
        )
    return rows


def judge_by_truth(
    candidates: pl.DataFrame,
    detections: pl.DataFrame,
    truth: pl.DataFrame,
    ctc_kinds: Collection[str],
    radius_px: float,
) -> pl.DataFrame:
    """Look the candidates up in a ground-truth table.

    All detections of the patient take part in the one-to-one assignment, not the candidates alone: a candidate beside a CTC
    must not take the truth of the cell that was found there. A detection with no truth row near it is no CTC.

    Args:
        candidates: CANDIDATES_SCHEMA.
        detections: as in `PatientInput`.
        truth: TRUTH_SCHEMA rows of the patient.
        ctc_kinds: kinds that are CTCs.
        radius_px: how far a truth row may lie from a centroid.

    Returns:
        cell_id, is_ctc, judged_by ("truth") of every candidate.
    """
    left = Boxes.around(detections["field"].to_numpy(), _centres(detections), np.zeros(detections.height))
    right = Boxes.around(truth["field"].to_numpy(), _centres(truth), np.zeros(truth.height))
    is_ctc = np.zeros(detections.height, dtype=bool)
    truth_is_ctc = truth["kind"].is_in(list(ctc_kinds)).to_numpy()
    for field in np.unique(left.field):
        here, there = np.flatnonzero(left.field == field), np.flatnonzero(right.field == field)
        distance = np.linalg.norm(left.low[here][:, None] - right.low[there][None], axis=2)
        pairs = assign(distance, distance <= radius_px)
        is_ctc[here[pairs.left]] = truth_is_ctc[there[pairs.right]]
    judged = detections.select("physical_id").with_columns(is_ctc=pl.Series(is_ctc))
    known = judged.group_by("physical_id").agg(pl.col("is_ctc").any())
    return candidates.join(known, on="physical_id", how="inner", maintain_order="left").select(
        "cell_id", "is_ctc", pl.lit("truth").alias("judged_by")
    )


def judge_by_labels(candidates: pl.DataFrame, labels: pl.DataFrame) -> pl.DataFrame:
    """Take the expert's consensus as the truth of the candidates that were labelled.

    Args:
        candidates: CANDIDATES_SCHEMA.
        labels: cell_id, label (one of `ctc_ray.schema.LABELS`).

    Returns:
        cell_id, is_ctc, judged_by ("labels"); `ctc` is a CTC, `non_ctc` and `artefact` are not, `unsure` is not judged.
    """
    known = with_class(labels).select("cell_id", pl.col("is_ctc").cast(pl.Boolean))
    return candidates.join(known, on="cell_id", how="inner", maintain_order="left").select(
        "cell_id", "is_ctc", pl.lit("labels").alias("judged_by")
    )


def share(part: int, whole: int) -> float | None:
    """Fraction, or None of nothing."""
    return part / whole if whole else None


def total_row(ppv: pl.DataFrame) -> pl.DataFrame:
    """Sum of the patients' rows, with the predictive values of the sums; columns of PPV_FRAME, patient null.

    A sum over patients of whom some are not judged is null: it would mix what is known with what is not.
    """
    counts = [name for name in PPV_FRAME if name.startswith("num_")]
    sums: dict[str, Any] = {name: None if ppv[name].null_count() else int(ppv[name].sum()) for name in counts}
    model_ctc = sums["num_model_ctc"]
    sums["patient"] = None
    sums["model_ppv"] = None if model_ctc is None else share(model_ctc, sums["num_judged"])
    sums["cellsearch_ppv"] = share(sums["num_cellsearch_ctc"], sums["num_events"])
    return pl.DataFrame([sums], schema=PPV_FRAME)


def _centres(frame: pl.DataFrame) -> npt.NDArray[np.float64]:
    return np.asarray(frame.select("row", "col").to_numpy(), dtype=np.float64).reshape(-1, 2)
