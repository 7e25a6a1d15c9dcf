"""CellSearch's event gallery of one patient: where each event lies, and whether the operator called it a CTC."""

from __future__ import annotations

from typing import Any

import polars as pl

from ctc_ray.errors import CartridgeError
from ctc_ray.storage import Store

EVENTS_FRAME: dict[str, Any] = {
    "event_id": pl.String,
    "field": pl.Int16,
    "row_low": pl.Float64,
    "col_low": pl.Float64,
    "row_high": pl.Float64,
    "col_high": pl.Float64,
    "is_ctc": pl.Boolean,
}
"""Columns of `read_events`; the box in px of the field, its far edge exclusive."""
_MAX_DEPTH = 6
_SLACK_PX = 64
"""How far a box may reach out of its frame before the coordinates are held to be wrong."""


def find_events_file(store: Store, patient: str) -> str:
    """Path of a patient's event xml: in the folder named as the patient, or below where a folder holds only one folder.

    Raises:
        CartridgeError: there is no such folder, no xml in it, or more than one and none named as the patient.
    """
    folder = patient
    for _ in range(_MAX_DEPTH):
        files = [path for path in store.list_files(folder) if not path.rsplit("/", 1)[-1].startswith(".")]
        found = [path for path in files if path.lower().endswith(".xml")]
        named = [path for path in found if path.rsplit("/", 1)[-1][:-4] == patient]
        if len(found) == 1 or len(named) == 1:
            return named[0] if named else found[0]
        if found:
            raise CartridgeError(
                f"{store.describe(folder)} holds {len(found)} xml files and none is {patient}.xml: keep one"
            )
        below = [name for name in store.list_folders(folder) if not name.startswith(".")]
        below = ["processed"] if "processed" in below else below
        if len(below) != 1:
            break
        folder = f"{folder}/{below[0]}"
    raise CartridgeError(
        f"{store.describe(patient)} holds no CellSearch event xml: check --cellsearch (one folder a patient below it)"
    )


def read_events(data: bytes, where: str) -> pl.DataFrame:
    """Read the events of an archive's xml.

    Args:
        data: content of the file.
        where: file that a message names.

    Returns:
        Columns of EVENTS_FRAME in the order of the file. All records count as events of the gallery (the denominator of
        CellSearch's predictive value); a record that does not tell the operator's decision is no CTC.

    Raises:
        CartridgeError: it is no archive's xml, does not tell the grid of frames, lists an event twice, or places one outside of
            its frame (as archives do that number their frames from another corner).
    """
    from ctc_ray.segment.archive_xml import read_archive  # the room of segmentation loads torch

    archive = read_archive(data, where)
    if archive.geometry is None:
        raise CartridgeError(
            f"{where} does not tell the grid of frames (runs/record: numrows, numcols, camxsize, camysize), "
            "without which events cannot be placed: export the archive again"
        )
    rows = [
        (event.event_id, event.field, event.top, event.left, event.bottom + 1, event.right + 1, bool(event.is_ctc))
        for event in archive.events
    ]
    events = pl.DataFrame(rows, schema=EVENTS_FRAME, orient="row")
    if events["event_id"].n_unique() != events.height:
        raise CartridgeError(f"{where} lists an event number twice or not at all: export the archive again")
    outside = events.filter(
        (pl.col("row_low") < -_SLACK_PX)
        | (pl.col("col_low") < -_SLACK_PX)
        | (pl.col("row_high") > archive.geometry.field_height_px + _SLACK_PX)
        | (pl.col("col_high") > archive.geometry.field_width_px + _SLACK_PX)
    )
    if outside.height:
        first = outside.row(0, named=True)
        raise CartridgeError(
            f"{where}: {outside.height} of {events.height} events lie outside of their frames, the first is event "
            f"{first['event_id']} of frame {first['field']}: the archive numbers its frames in another order, "
            "and cannot be compared"
        )
    return events
