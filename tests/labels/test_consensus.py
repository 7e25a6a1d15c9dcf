"""The consensus rule, against a slow reading of its own words."""

from __future__ import annotations

import random
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctc_ray.config import LabelsConfig, RunConfig
from ctc_ray.errors import LabelError
from ctc_ray.labels.consensus import (
    consensus,
    digest_labels,
    labels_digest,
    one_per_physical_cell,
    read_labels,
    with_class,
)
from ctc_ray.labels.events import LabelEvent, events_table
from ctc_ray.labels.simulated import simulate_expert
from ctc_ray.schema import LABELS

AT = datetime(2025, 1, 1, tzinfo=UTC)


def event(number: int, reader: str, label: str | None, cell: str = "c", undoes: str | None = None) -> LabelEvent:
    return LabelEvent(
        cell, "p", label, reader, "test", AT + timedelta(seconds=number), undoes=undoes, event_id=f"e{number}"
    )


def labels_of(*events: LabelEvent) -> dict[str, str]:
    frame = consensus(pl.DataFrame(pl.from_arrow(events_table(events))))
    return dict(frame.select("cell_id", "label").iter_rows())


def test_consensus_takes_the_majority_of_readers() -> None:
    assert labels_of(event(1, "a", "ctc"), event(2, "b", "ctc"), event(3, "c", "unsure")) == {"c": "ctc"}


def test_consensus_of_a_tie_is_unsure() -> None:
    frame = consensus(pl.DataFrame(pl.from_arrow(events_table([event(1, "a", "ctc"), event(2, "b", "non_ctc")]))))
    assert frame.row(0, named=True) == {
        "cell_id": "c",
        "patient": "p",
        "label": "unsure",
        "num_readers": 2,
        "agreement": 0.5,
    }


def test_consensus_counts_only_the_latest_answer_of_a_reader() -> None:
    assert labels_of(event(1, "a", "ctc"), event(2, "a", "non_ctc"), event(3, "a", "artefact")) == {"c": "artefact"}


def test_consensus_after_undo_takes_the_earlier_answer_again() -> None:
    assert labels_of(event(1, "a", "ctc"), event(2, "a", "non_ctc"), event(3, "a", None, undoes="e2")) == {"c": "ctc"}


def test_consensus_after_undo_of_the_only_answer_has_no_label() -> None:
    assert labels_of(event(1, "a", "ctc"), event(2, "a", None, undoes="e1")) == {}


def test_consensus_after_redo_takes_the_answer_again() -> None:
    redo = event(3, "a", None, undoes="e2")
    assert labels_of(event(1, "a", "ctc"), event(2, "a", None, undoes="e1"), redo) == {"c": "ctc"}


@pytest.mark.parametrize(
    ("undo", "message"),
    [
        (event(2, "a", None, undoes="e9"), "which no batch holds"),
        (event(2, "b", None, undoes="e1"), "only their own"),
        (event(0, "a", None, undoes="e1"), "not older"),
    ],
)
def test_consensus_with_an_impossible_undo_is_refused(undo: LabelEvent, message: str) -> None:
    with pytest.raises(LabelError, match=message):
        labels_of(event(1, "a", "ctc"), undo)


@settings(max_examples=60, deadline=None)
@given(
    answers=st.lists(
        st.tuples(st.sampled_from("xyz"), st.sampled_from("abcd"), st.sampled_from(LABELS)), min_size=1, max_size=25
    ),
    seed=st.integers(0, 5),
)
def test_consensus_agrees_with_a_slow_reading_of_the_rule(answers: list[tuple[str, str, str]], seed: int) -> None:
    events = [event(i, reader, label, cell) for i, (cell, reader, label) in enumerate(answers)]
    expected = {}
    for cell in {cell for cell, _, _ in answers}:
        latest = {reader: label for name, reader, label in answers if name == cell}
        votes = Counter(latest.values()).most_common()
        tie = len(votes) > 1 and votes[0][1] == votes[1][1]
        expected[cell] = "unsure" if tie else votes[0][0]
    random.Random(seed).shuffle(events)
    assert labels_of(*events) == expected


def test_labels_digest_does_not_depend_on_row_order_but_on_labels() -> None:
    frame = pl.DataFrame({"cell_id": ["a", "b"], "label": ["ctc", "unsure"]})
    assert digest_labels(frame) == digest_labels(frame.reverse())
    assert digest_labels(frame) != digest_labels(frame.with_columns(label=pl.lit("ctc")))


def test_class_of_unsure_cells_is_left_out() -> None:
    frame = pl.DataFrame({"cell_id": list("abcd"), "label": ["ctc", "non_ctc", "artefact", "unsure"]})
    assert with_class(frame).select("cell_id", "is_ctc").rows() == [("a", 1), ("b", 0), ("c", 0)]


def test_one_detection_of_a_physical_cell_stays_the_most_probable(tmp_path: Path, mixture: ModuleType) -> None:
    made = mixture.build_cohort(tmp_path, roles={"007": "train"}, num_cells=30)
    config = RunConfig(labels=LabelsConfig(per_patient=30, balanced=False))
    simulate_expert(config, made.cohort, str(made.truth_path))
    labels = read_labels(made.cohort)
    kept = one_per_physical_cell(made.cohort, labels)
    cells = pl.DataFrame(pl.from_arrow(made.cohort.read_columns("cells/007", ["cell_id", "prob"])))
    twins = cells.tail(2).sort("prob", descending=True)["cell_id"].to_list()
    assert (labels.height, kept.height) == (30, 29)
    assert twins[0] in kept["cell_id"]
    assert twins[1] not in kept["cell_id"]
    assert labels_digest(made.cohort, ["007"]) == digest_labels(labels)


def test_labelled_cell_that_was_segmented_away_is_reported(tmp_path: Path, mixture: ModuleType) -> None:
    made = mixture.build_cohort(tmp_path, roles={"007": "train"}, num_cells=30)
    labels = pl.DataFrame({"cell_id": ["gone"], "patient": ["007"], "label": ["ctc"]})
    with pytest.raises(LabelError, match=r"gone.*relink"):
        one_per_physical_cell(made.cohort, labels)
