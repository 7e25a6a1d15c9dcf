"""Label events: ids, batches, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from ctc_ray.cohort import Cohort
from ctc_ray.errors import LabelError, StaleOutputError
from ctc_ray.labels.events import (
    LabelEvent,
    batch_path,
    crop_digest,
    event_id_of,
    events_table,
    read_events,
    write_batch,
)
from ctc_ray.schema import LABELS_SCHEMA

AT = datetime(2025, 1, 1, tzinfo=UTC)
EVENT = LabelEvent("c1", "007", "ctc", "anna", "gallery", AT, field=3, row=1.5, col=2.5)


def test_event_id_follows_from_the_content() -> None:
    assert event_id_of(EVENT) == event_id_of(replace(EVENT))
    changed = [
        replace(EVENT, label="non_ctc"),
        replace(EVENT, reader="ben"),
        replace(EVENT, at=AT + timedelta(seconds=1)),
    ]
    assert len({event_id_of(EVENT), *map(event_id_of, changed)}) == 4


def test_crop_digest_tells_one_pixel_apart() -> None:
    crop = np.zeros((3, 48, 48), np.uint8)
    other = crop.copy()
    other[2, 47, 47] = 1
    assert crop_digest(crop) == crop_digest(crop.tobytes())
    assert crop_digest(crop) != crop_digest(other)


def test_events_come_back_from_all_batches_in_order_of_time(tmp_path: Path) -> None:
    cohort = Cohort.open(str(tmp_path), create=True)
    late = replace(EVENT, cell_id="c2", at=AT + timedelta(days=1))
    write_batch(cohort, "a", events_table([late]), identity="1")
    write_batch(cohort, "Müller 3", events_table([EVENT]), identity="2")
    events = read_events(cohort)
    assert events["cell_id"].to_list() == ["c1", "c2"]
    assert events.columns == LABELS_SCHEMA.names
    assert events.row(0, named=True)["row"] == 1.5


def test_events_of_a_cohort_without_labels_are_an_empty_table(tmp_path: Path) -> None:
    assert read_events(Cohort.open(str(tmp_path), create=True)).height == 0


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (replace(EVENT, label="tumour"), "unknown label 'tumour'.*valid are ctc"),
        (replace(EVENT, label=None), "neither a label nor what it undoes"),
        (replace(EVENT, at=AT.replace(tzinfo=None)), "no time zone"),
    ],
)
def test_event_with_a_fault_is_refused(event: LabelEvent, message: str) -> None:
    with pytest.raises(LabelError, match=message):
        events_table([event])


def test_event_given_twice_is_refused() -> None:
    with pytest.raises(LabelError, match="there twice"):
        events_table([EVENT, EVENT])


def test_batch_is_written_once_and_replaced_only_by_force(tmp_path: Path) -> None:
    cohort = Cohort.open(str(tmp_path), create=True)
    path = write_batch(cohort, "a", events_table([EVENT]), identity="1")
    before = cohort.store.read_bytes(path)
    write_batch(cohort, "a", events_table([]), identity="1")
    assert cohort.store.read_bytes(path) == before
    with pytest.raises(StaleOutputError, match=r"immutable.*--force"):
        write_batch(cohort, "a", events_table([]), identity="2")
    write_batch(cohort, "a", events_table([]), identity="2", force=True)
    assert read_events(cohort).height == 0


@pytest.mark.parametrize("name", ["../x", "", ".hidden", "a/b"])
def test_batch_name_that_is_no_file_name_is_refused(name: str) -> None:
    with pytest.raises(LabelError, match="cannot name a file"):
        batch_path(name)
