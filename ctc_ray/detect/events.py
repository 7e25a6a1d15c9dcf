"""CellSearch's event gallery of one patient: where each event lies, and whether the operator called it a CTC."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl

from ctc_ray.errors import CartridgeError
from ctc_ray.records import FailureRow, digest_of
from ctc_ray.storage import Store

if TYPE_CHECKING:  # the room of segmentation loads torch
    from ctc_ray.segment.archive_xml import ArchiveEvent, RejectedEvent

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
CELLS_NAME, PICTURES_NAME = "cells.dlm", "pic.dlm"
"""Tables of CellTracks-XP, which older archives have instead of an xml."""


def find_events_file(store: Store, patient: str) -> str:
    """Path of a patient's event xml: in the folder named as the patient, or below where a folder holds only one folder.

    Without an xml it is that of `cells.dlm`, as archives of CellTracks-XP have it.

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
        tables = [path for path in files if path.rsplit("/", 1)[-1] == CELLS_NAME]
        if tables:
            return tables[0]
        below = [name for name in store.list_folders(folder) if not name.startswith(".")]
        below = ["processed"] if "processed" in below else below
        if len(below) != 1:
            break
        folder = f"{folder}/{below[0]}"
    raise CartridgeError(
        f"{store.describe(patient)} holds no CellSearch event xml: check --cellsearch (one folder a patient below it)"
    )


@dataclass(frozen=True)
class Gallery:
    """The events of one patient.

    Attributes:
        events: columns of EVENTS_FRAME in the order of the file.
        set_aside: one row for each record that is no usable event, with its number and the reason.
    """

    events: pl.DataFrame
    set_aside: tuple[FailureRow, ...]


def read_gallery(store: Store, path: str) -> Gallery:
    """Read the event file that `find_events_file` found: an archive's xml, or the tables of CellTracks-XP.

    Raises:
        CartridgeError: as `read_events`, or a table of CellTracks-XP cannot be read.
        MissingInputError: a file is not there.
    """
    where = store.describe(path)
    if not path.lower().endswith(".dlm"):
        return _gallery_of_xml(store.read_bytes(path), where)
    from ctc_ray.segment.celltracks_xp import read_cells, read_pictures  # the room of segmentation loads torch

    pictures = _beside(path, PICTURES_NAME)
    frames = read_pictures(store.read_bytes(pictures), store.describe(pictures))
    return _gallery(*read_cells(store.read_bytes(path), frames, where), where)


def digest_events(store: Store, path: str) -> str:
    """Digest of all files that `read_gallery` reads."""
    digest = digest_of(store.read_bytes(path))
    if not path.lower().endswith(".dlm"):
        return digest
    pictures = _beside(path, PICTURES_NAME)
    return digest_of([digest, digest_of(store.read_bytes(pictures)) if store.exists(pictures) else None])


def read_events(data: bytes, where: str) -> pl.DataFrame:
    """Read the events of an archive's xml.

    Args:
        data: content of the file.
        where: file that a message names.

    Returns:
        Columns of EVENTS_FRAME in the order of the file. All records count as events of the gallery (the denominator of
        CellSearch's predictive value); a record that does not tell the operator's decision is no CTC. Records that cannot
        be read are left out; `read_gallery` lists them.

    Raises:
        CartridgeError: it is no archive's xml, does not tell the grid of frames, lists an event twice, or places most of its
            events outside of their frames (as archives do that number their frames from another corner).
    """
    return _gallery_of_xml(data, where).events


def _gallery_of_xml(data: bytes, where: str) -> Gallery:
    from ctc_ray.segment.archive_xml import read_archive  # the room of segmentation loads torch

    archive = read_archive(data, where)
    if archive.geometry is None:
        raise CartridgeError(
            f"{where} does not tell the grid of frames (runs/record: numrows, numcols, camxsize, camysize), "
            "without which events cannot be placed: export the archive again"
        )
    return _gallery(archive.events, archive.rejected, where)


def _gallery(listed: Sequence[ArchiveEvent], rejected: Sequence[RejectedEvent], where: str) -> Gallery:
    rows = [
        (event.event_id, event.field, event.top, event.left, event.bottom + 1, event.right + 1, bool(event.is_ctc))
        for event in listed
    ]
    events = pl.DataFrame(rows, schema=EVENTS_FRAME, orient="row")
    if events["event_id"].n_unique() != events.height:
        raise CartridgeError(f"{where} lists an event number twice: export the archive again")
    outside = [event for event in rejected if event.outside]
    if len(outside) > events.height:
        first = outside[0]
        raise CartridgeError(
            f"{where}: {len(outside)} of {len(outside) + events.height} events lie outside of their frames, the first is event "
            f"{first.event_id}: {first.reason}. The archive numbers its frames in another order, and cannot be compared"
        )
    set_aside = [
        FailureRow(
            f"{where} event {event.event_id}",
            CartridgeError.__name__,
            f"{where}, event {event.event_id}: {event.reason}",
        )
        for event in rejected
    ]
    return Gallery(events, tuple(set_aside))


def _beside(path: str, name: str) -> str:
    return f"{path.rsplit('/', 1)[0]}/{name}"
