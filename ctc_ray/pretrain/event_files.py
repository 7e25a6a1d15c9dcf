"""Metrics as TensorBoard event files, made in memory so that a store of any kind can take them in one put."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

_FILE_VERSION: Final = "brain.Event:2"
_NOT_SCALARS: Final = frozenset({"step", "unix_time_s", "collapse"})


def event_file_name(step: int) -> str:
    """Name of the event file whose last row is that of a step; names sort by step, as TensorBoard reads them."""
    return f"events.out.tfevents.{step:010d}"


def event_file_step(name: str) -> int | None:
    """The step in a name of `event_file_name`, None in any other name."""
    digits = name.removeprefix("events.out.tfevents.")
    return int(digits) if digits != name and digits.isdecimal() else None


def encode_events(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Encode rows of metrics.

    Args:
        rows: each with `step`, `unix_time_s` and numbers by name; `collapse`, a kind of collapse or empty, becomes the scalar
            `collapsed`, 1 or 0.

    Returns:
        The bytes of one event file: one event a row, at its step and time, its scalars below the tag `pretrain/`.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "events"
        writer = RecordWriter(str(file))
        for number, row in enumerate(rows):
            time_s = float(row["unix_time_s"])
            if number == 0:
                writer.write(Event(wall_time=time_s, file_version=_FILE_VERSION).SerializeToString())
            values = {name: float(value) for name, value in row.items() if name not in _NOT_SCALARS}
            values["collapsed"] = float(bool(row.get("collapse")))
            summary = Summary(
                value=[Summary.Value(tag=f"pretrain/{name}", simple_value=value) for name, value in values.items()]
            )
            event = Event(wall_time=time_s, step=int(row["step"]), summary=summary)
            writer.write(event.SerializeToString())
        writer.close()
        return file.read_bytes()
