"""After a new segmentation, carry labels to the nearest cell, and list what could not be carried."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import timedelta

import numpy as np
import polars as pl
from scipy.spatial import cKDTree

from ctc_ray.cohort import Cohort
from ctc_ray.config import RunConfig
from ctc_ray.errors import MissingInputError
from ctc_ray.labels.consensus import active_events
from ctc_ray.labels.crops import digest_crops
from ctc_ray.labels.events import LabelEvent, batch_path, event_id_of, events_table, read_events, write_batch
from ctc_ray.records import FailureRow, StageResult, digest_of, write_failures

STAGE = "relink"
RADIUS_PX = 5.0
"""How far the new cell may lie from the old one's centroid. Source: design."""
_LATER = timedelta(microseconds=1)
"""A carried answer stands just behind the one it replaces, so that it keeps its order among the reader's answers."""


def relink(config: RunConfig, cohort: Cohort) -> StageResult:
    """Carry every answer whose cell is gone to the nearest cell of the same field within 5 px.

    Each old event is undone by a new one of the same reader, with the new cell's id, in one batch `relink-<digest>`; an answer
    that finds no cell is undone alone, and listed in `failures/relink/<batch>.parquet`. Nothing is edited or deleted.

    Args:
        config: not used; every stage takes it.
        cohort: segmented anew; patients without cells keep their events as they are.

    Returns:
        `units_computed` answers carried, `units_reused` answers whose cell is still there, `set_aside` answers not carried.

    Raises:
        MissingInputError: there are no labels.
    """
    started = time.monotonic()
    events = read_events(cohort)
    if events.is_empty():
        raise MissingInputError(f"{cohort.store.uri} has no labels to relink")
    carried: list[LabelEvent] = []
    lost: list[LabelEvent] = []
    kept = 0
    for (patient,), answers in active_events(events).group_by("patient", maintain_order=True):
        folder = cohort.cells(str(patient))
        if not cohort.shards(folder):
            kept += answers.height
            continue
        cells = pl.DataFrame(pl.from_arrow(cohort.read_columns(folder, ["cell_id", "field", "row", "col"])))
        orphans = answers.filter(~pl.col("cell_id").is_in(cells["cell_id"].to_list()))
        kept += answers.height - orphans.height
        found, missed = _carry(cohort, folder, orphans, cells)
        carried += found
        lost += missed
    if not carried and not lost:
        return StageResult(STAGE, 0, kept, seconds=time.monotonic() - started)
    batch = f"relink-{digest_of(sorted(str(event.undoes) for event in carried + lost))}"
    table = events_table([*carried, *lost])
    write_batch(cohort, batch, table, identity=digest_of(sorted(table["event_id"].to_pylist())))
    rows = [
        FailureRow(
            f"event {event.undoes}",
            "LabelError",
            f"no cell within {RADIUS_PX:g} px of patient {event.patient}, field {event.field}, row {event.row}, col {event.col}",
        )
        for event in lost
    ]
    write_failures(cohort.store, STAGE, batch, rows)
    return StageResult(STAGE, len(carried), kept, len(lost), {}, (batch_path(batch),), time.monotonic() - started)


def _carry(
    cohort: Cohort, folder: str, orphans: pl.DataFrame, cells: pl.DataFrame
) -> tuple[list[LabelEvent], list[LabelEvent]]:
    """Events that carry the orphans of one patient, and events that only undo those without a cell."""
    names = cells["cell_id"].to_list()
    fields = cells["field"].to_numpy()
    places = cells.select("row", "col").to_numpy().astype(np.float64)
    found: list[LabelEvent] = []
    missed: list[LabelEvent] = []
    for row in orphans.iter_rows(named=True):
        values = {**row, "undoes": row["event_id"], "event_id": "", "at": row["at"] + _LATER}
        event = LabelEvent(**{**values, "source": STAGE})
        known = row["row"] is not None and row["col"] is not None
        here = np.flatnonzero((fields == row["field"]) & known)
        distance, index = cKDTree(places[here]).query((row["row"], row["col"])) if len(here) else (np.inf, 0)
        if distance > RADIUS_PX:
            missed.append(_named(replace(event, label=None)))
            continue
        target = int(here[index])
        moved = replace(
            event, cell_id=names[target], row=float(places[target][0]), col=float(places[target][1]), crop_sha=""
        )
        found.append(moved)
    digests = digest_crops(cohort.store, cohort.shards(folder), sorted({event.cell_id for event in found}))
    return [_named(replace(event, crop_sha=digests[event.cell_id])) for event in found], missed


def _named(event: LabelEvent) -> LabelEvent:
    return replace(event, event_id=event_id_of(event))
