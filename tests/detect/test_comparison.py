from __future__ import annotations

from typing import Any

import polars as pl

from ctc_ray.detect.comparison import (
    PPV_FRAME,
    PatientInput,
    describe_events,
    judge_by_labels,
    judge_by_truth,
    match_events,
    matches_frame,
    sensitivity_rows,
    summarise_patient,
    total_row,
)
from ctc_ray.detect.events import EVENTS_FRAME

RULE = {"tolerance_px": 30.0, "min_overlap": 0.75}


def _detections(*rows: tuple[str, str, int, float, float, float]) -> pl.DataFrame:
    names = ["cell_id", "physical_id", "field", "row", "col", "probability"]
    frame = pl.DataFrame(list(rows), schema=names, orient="row")
    return frame.with_columns(diameter_px=pl.lit(20.0), field=pl.col("field").cast(pl.Int16))


def _candidates(*rows: tuple[str, str]) -> pl.DataFrame:
    return pl.DataFrame(list(rows), schema=["cell_id", "physical_id"], orient="row")


def _events(*rows: tuple[str, int, float, float, bool]) -> pl.DataFrame:
    values = [(name, field, r - 12, c - 12, r + 12, c + 12, ctc) for name, field, r, c, ctc in rows]
    return pl.DataFrame(values, schema=EVENTS_FRAME, orient="row")


def _judged(**labels: bool) -> pl.DataFrame:
    rows = [(name, value, "truth") for name, value in labels.items()]
    return pl.DataFrame(rows, schema={"cell_id": pl.String, "is_ctc": pl.Boolean, "judged_by": pl.String}, orient="row")


def _case(**changes: Any) -> PatientInput:
    """Candidates a (matches the CTC event 1), b (matches nothing, is a CTC), c (matches the non-CTC event 2); event 3 is missed."""
    values: dict[str, Any] = {
        "patient": "007",
        "candidates": _candidates(("a", "pa"), ("b", "pb"), ("c", "pc")),
        "detections": _detections(
            ("a", "pa", 1, 100, 100, 0.9),
            ("b", "pb", 1, 300, 300, 0.8),
            ("c", "pc", 2, 100, 100, 0.7),
            ("d", "pd", 2, 500, 500, 0.3),
        ),
        "events": _events(
            ("1", 1, 103, 98, True), ("2", 2, 100, 105, False), ("3", 2, 502, 500, True), ("4", 1, 900, 900, True)
        ),
        "judgements": _judged(a=True, b=True, c=False),
    }
    return PatientInput(**{**values, **changes})


def _row(case: PatientInput) -> dict[str, Any]:
    matched = match_events(case.candidates, case.detections, case.events, **RULE)
    return summarise_patient(case, matched, describe_events(case))


def test_summarise_patient_mixed_findings_counts_as_by_hand() -> None:
    row = _row(_case())
    assert row == {
        "patient": "007",
        "num_candidates": 3,
        "num_judged": 3,
        "num_model_ctc": 2,
        "model_ppv": 2 / 3,
        "num_events": 4,
        "num_cellsearch_ctc": 3,
        "cellsearch_ppv": 0.75,
        "num_both": 1,
        "num_model_only": 1,
        "num_cellsearch_only": 2,
        "num_cellsearch_ctc_segmented": 2,
    }
    assert row["num_both"] + row["num_cellsearch_only"] == row["num_cellsearch_ctc"]


def test_summarise_patient_nothing_judged_leaves_the_model_unknown() -> None:
    row = _row(_case(judgements=_judged()))
    assert (row["model_ppv"], row["num_model_ctc"], row["num_model_only"]) == (None, None, None)
    assert row["num_both"] == 1


def test_summarise_patient_no_events_has_no_predictive_value() -> None:
    row = _row(_case(events=_events()))
    assert (row["cellsearch_ppv"], row["num_events"], row["num_model_only"]) == (None, 0, 2)


def test_summarise_patient_ctc_event_matched_by_a_neighbour_that_is_no_ctc_is_missed() -> None:
    row = _row(_case(judgements=_judged(a=False, b=True, c=False)))
    assert (row["num_both"], row["num_model_only"], row["num_cellsearch_only"]) == (0, 1, 3)
    assert row["num_both"] + row["num_model_only"] == row["num_model_ctc"]


def test_matches_frame_every_object_appears_with_its_finder() -> None:
    case = _case()
    frame = matches_frame(case, match_events(case.candidates, case.detections, case.events, **RULE))
    assert {tuple(row) for row in frame.select("cell_id", "event_id", "event_is_ctc", "found_by").iter_rows()} == {
        ("a", "1", True, "both"),
        ("c", "2", False, "both"),
        ("b", None, None, "model"),
        (None, "3", True, "cellsearch"),
        (None, "4", True, "cellsearch"),
    }


def test_match_events_cell_seen_in_two_fields_matches_the_event_of_each() -> None:
    detections = _detections(("a", "pa", 1, 100, 1380, 0.9), ("a2", "pa", 2, 100, 6, 0.4))
    events = _events(("1", 1, 100, 1378, True), ("2", 2, 100, 8, True))
    matched = match_events(_candidates(("a", "pa")), detections, events, **RULE)
    assert matched.select("cell_id", "event_id").rows() == [("a", "1"), ("a", "2")]


def test_match_events_two_candidates_one_event_takes_the_nearer() -> None:
    detections = _detections(("a", "pa", 1, 100, 100, 0.9), ("b", "pb", 1, 104, 100, 0.9))
    matched = match_events(_candidates(("a", "pa"), ("b", "pb")), detections, _events(("1", 1, 103, 100, True)), **RULE)
    assert matched["cell_id"].to_list() == ["b"]
    assert matched["distance_px"].to_list() == [1.0]


def test_describe_events_missed_event_names_the_cell_that_scored_low() -> None:
    described = describe_events(_case()).filter(pl.col("event_id") == "3")
    assert described["nearest_cell_id"].to_list() == ["d"]
    assert abs(described["nearest_probability"][0] - 0.3) < 1e-6
    assert describe_events(_case()).filter(pl.col("event_id") == "4")["nearest_cell_id"].to_list() == [None]


def test_sensitivity_rows_larger_tolerance_never_matches_fewer() -> None:
    rows = sensitivity_rows(_case(), **RULE)
    counts = [row["num_matches"] for row in rows]
    assert counts == sorted(counts)
    assert 30.0 in [row["tolerance_px"] for row in rows]


def test_judge_by_truth_candidate_beside_a_ctc_does_not_take_its_truth() -> None:
    detections = _detections(("a", "pa", 1, 100, 100, 0.9), ("b", "pb", 1, 100, 108, 0.9))
    truth = pl.DataFrame(
        {"field": [1], "row": [100.0], "col": [99.0], "kind": ["ctc"]}, schema_overrides={"field": pl.Int16}
    )
    judged = judge_by_truth(_candidates(("b", "pb")), detections, truth, {"ctc"}, 12.0)
    assert judged.rows() == [("b", False, "truth")]
    judged = judge_by_truth(_candidates(("a", "pa")), detections, truth, {"ctc"}, 12.0)
    assert judged.rows() == [("a", True, "truth")]


def test_judge_by_labels_unsure_is_not_judged() -> None:
    labels = pl.DataFrame({"cell_id": ["a", "b", "c"], "label": ["ctc", "unsure", "artefact"]})
    judged = judge_by_labels(_candidates(("a", "pa"), ("b", "pb"), ("c", "pc")), labels)
    assert judged.rows() == [("a", True, "labels"), ("c", False, "labels")]


def test_total_row_some_patients_unjudged_does_not_sum_what_is_unknown() -> None:
    rows = [_row(_case()), _row(_case(judgements=_judged()))]
    total = total_row(pl.DataFrame(rows, schema=PPV_FRAME)).row(0, named=True)
    assert total["patient"] is None
    assert (total["num_events"], total["num_cellsearch_ctc"], total["cellsearch_ppv"]) == (8, 6, 0.75)
    assert (total["num_model_ctc"], total["model_ppv"]) == (None, None)


def test_total_row_paper_counts_give_the_paper_values() -> None:
    """Source: paper, Table 2."""
    candidates = [91, 135, 91, 38, 225, 71, 50, 23, 23, 148]
    ctcs = [77, 104, 76, 24, 124, 34, 31, 20, 14, 130]
    events = [239, 531, 219, 101, 1197, 168, 133, 167, 93, 790]
    found = [74, 107, 80, 23, 113, 38, 35, 20, 16, 144]
    rows = [
        {**dict.fromkeys(PPV_FRAME, 0), "patient": str(i), "num_candidates": a, "num_judged": a, "num_model_ctc": b,
         "num_events": c, "num_cellsearch_ctc": d}
        for i, (a, b, c, d) in enumerate(zip(candidates, ctcs, events, found, strict=True))
    ]  # fmt: skip
    total = total_row(pl.DataFrame(rows, schema=PPV_FRAME)).row(0, named=True)
    assert (total["num_model_ctc"], total["num_candidates"]) == (634, 895)
    assert round(total["model_ppv"], 3) == 0.708
    assert round(total["cellsearch_ppv"], 3) == 0.179
