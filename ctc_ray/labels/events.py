"""Label events: immutable batches of who answered what about which cell, and when.

A batch is one Parquet file `labels/<batch>.parquet`. Events are only ever added: a reader who changes an answer adds an
event, and undo is an event too (`undoes`). `ctc_ray.labels.consensus` turns events into labels.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from ctc_ray.cohort import Cohort
from ctc_ray.errors import LabelError, StaleOutputError
from ctc_ray.records import State
from ctc_ray.schema import LABELS, LABELS_SCHEMA, check_columns

FOLDER = "labels"
_IDENTITY_KEY = b"ctc_ray.identity"
_BATCH_PATTERN = re.compile(r"[^/\\\s._][^/\\\0\n]*")


@dataclass(frozen=True)
class LabelEvent:
    """One answer of one reader about one cell; the fields are the columns of `LABELS_SCHEMA`."""

    cell_id: str
    patient: str
    label: str | None
    """One of `LABELS`; None where the event only undoes another."""
    reader: str
    source: str
    """Where the answer came from: `gallery`, `simulated`, the name of an imported file."""
    at: datetime
    """Time zone aware."""
    crop_sha: str = ""
    """`crop_digest` of the pixels that the reader saw; empty where unknown."""
    field: int | None = None
    row: float | None = None
    col: float | None = None
    seconds: float | None = None
    """Time that the answer took."""
    strategy: str | None = None
    """Which query strategy showed the cell."""
    undoes: str | None = None
    """`event_id` that this event cancels."""
    event_id: str = ""
    """Empty: derived from the content by `event_id_of`."""


def crop_digest(crop: npt.NDArray[np.generic] | bytes) -> str:
    """Digest of a crop's pixels: blake2b, 32 hexadecimal characters, over the bytes as stored (C order)."""
    data = crop if isinstance(crop, bytes) else np.ascontiguousarray(crop).tobytes()
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def event_id_of(event: LabelEvent) -> str:
    """Name an event by its content, so that writing the same event twice gives one event."""
    key = [event.cell_id, event.label, event.reader, event.source, event.at.isoformat(), event.strategy, event.undoes]
    return hashlib.blake2b(json.dumps(key).encode(), digest_size=12).hexdigest()


def events_table(events: Iterable[LabelEvent]) -> pa.Table:
    """Put events into a table of `LABELS_SCHEMA`, ids filled in.

    Raises:
        LabelError: an unknown label, a time without zone, an event that neither labels nor undoes, or one id twice.
    """
    rows = []
    for event in events:
        if event.label is not None and event.label not in LABELS:
            raise LabelError(
                f"cell {event.cell_id}: unknown label {event.label!r} by {event.reader}; valid are {', '.join(LABELS)}"
            )
        if event.label is None and event.undoes is None:
            raise LabelError(
                f"cell {event.cell_id}: the event by {event.reader} has neither a label nor what it undoes"
            )
        if event.at.tzinfo is None:
            raise LabelError(f"cell {event.cell_id}: the event's time {event.at} has no time zone; give UTC")
        rows.append({**event.__dict__, "event_id": event.event_id or event_id_of(event)})
    table = pa.Table.from_pylist(rows, schema=LABELS_SCHEMA)
    _refuse_repeated_ids(table["event_id"].to_pylist(), "the new events")
    return table


def batch_path(batch: str) -> str:
    """Path of a batch below the cohort.

    Raises:
        LabelError: the name cannot be a file name.
    """
    if not _BATCH_PATTERN.fullmatch(batch):
        raise LabelError(f"batch {batch!r} cannot name a file: no slashes, and no leading dot, space or underscore")
    return f"{FOLDER}/{batch}.parquet"


def write_batch(cohort: Cohort, batch: str, events: pa.Table, *, identity: str, force: bool = False) -> str:
    """Write a batch once.

    Args:
        cohort: where.
        batch: name of the file, without suffix.
        events: table of `LABELS_SCHEMA`.
        identity: what the batch was made from; stored in the file's metadata.
        force: replace a batch of another identity.

    Returns:
        Path below the cohort. A batch of the same identity is left as it is.

    Raises:
        StaleOutputError: the batch exists with another identity and `force` is not set.
    """
    path = batch_path(batch)
    state = batch_state(cohort, batch, identity)
    if state is State.COMPLETE:
        return path
    if state is State.STALE and not force:
        raise StaleOutputError(
            f"{cohort.store.describe(path)} holds labels made from other inputs, and batches are immutable: "
            "choose another batch name, or run again with --force to replace it"
        )
    table = check_columns(events, LABELS_SCHEMA, path)
    cohort.store.write_table(path, table.replace_schema_metadata({_IDENTITY_KEY: identity.encode()}))
    return path


def batch_state(cohort: Cohort, batch: str, identity: str) -> State:
    """Compare a batch with what it should be made from."""
    path = batch_path(batch)
    if not cohort.store.exists(path):
        return State.ABSENT
    metadata = cohort.store.read_schema(path).metadata or {}
    return State.COMPLETE if metadata.get(_IDENTITY_KEY, b"").decode() == identity else State.STALE


def read_events(cohort: Cohort) -> pl.DataFrame:
    """Read every batch: columns of `LABELS_SCHEMA`, sorted by time and id; empty where there are none.

    Raises:
        SchemaError: a batch lacks a column.
        LabelError: an unknown label, or one event id in two places.
    """
    paths = cohort.store.list_files(FOLDER, ".parquet")
    tables = [
        check_columns(cohort.store.read_table(path), LABELS_SCHEMA, cohort.store.describe(path)) for path in paths
    ]
    table = pa.concat_tables(tables) if tables else LABELS_SCHEMA.empty_table()
    frame = pl.DataFrame(pl.from_arrow(table))
    unknown = frame.filter(pl.col("label").is_not_null() & ~pl.col("label").is_in(list(LABELS)))
    if unknown.height:
        first = unknown.row(0, named=True)
        raise LabelError(
            f"{cohort.store.describe(FOLDER)}: event {first['event_id']} has the unknown label {first['label']!r}; "
            f"valid are {', '.join(LABELS)}"
        )
    _refuse_repeated_ids(frame["event_id"].to_list(), cohort.store.describe(FOLDER))
    return frame.sort("at", "event_id")


def _refuse_repeated_ids(ids: list[str], where: str) -> None:
    if len(set(ids)) == len(ids):
        return
    seen: set[str] = set()
    repeated = sorted({name for name in ids if name in seen or seen.add(name)})  # type: ignore[func-returns-value]
    raise LabelError(
        f"{where}: event {repeated[0]} is there twice ({len(repeated)} such): remove the batch that repeats it"
    )
