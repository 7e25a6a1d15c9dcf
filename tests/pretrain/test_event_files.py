"""Metrics reach TensorBoard whole: every step once, in order, with its scalars."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event

from ctc_ray.pretrain.event_files import encode_events, event_file_name, event_file_step


def decode(data: bytes) -> list[Event]:
    """Events of a file by the format's definition: length, its checksum, record, its checksum."""
    events = []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = Event()
        event.ParseFromString(data[12 : 12 + length])
        events.append(event)
        data = data[12 + length + 4 :]
    return events


def row(step: int, **values: float | str) -> dict[str, float | str]:
    return {"step": step, "unix_time_s": 1.7e9 + step, "collapse": "", **values}


def test_every_row_becomes_an_event_with_its_scalars() -> None:
    version, *events = decode(encode_events([row(3, loss=2.5), row(4, loss=2.25, collapse="features")]))
    assert version.file_version == "brain.Event:2"
    assert [(event.step, event.wall_time) for event in events] == [(3, 1.7e9 + 3), (4, 1.7e9 + 4)]
    scalars = [{value.tag: value.simple_value for value in event.summary.value} for event in events]
    assert scalars == [
        {"pretrain/loss": 2.5, "pretrain/collapsed": 0.0},
        {"pretrain/loss": 2.25, "pretrain/collapsed": 1.0},
    ]


def test_tensorboard_reads_the_files_of_a_folder_as_one_run(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for last in (2, 4, 12):
        rows = [row(step, loss=step / 8) for step in (last - 1, last)]
        (tmp_path / event_file_name(last)).write_bytes(encode_events(rows))
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("pretrain/loss")] == [(s, s / 8) for s in (1, 2, 3, 4, 11, 12)]


@given(st.lists(st.integers(0, 10**9), min_size=2, max_size=5))
@settings(max_examples=20, deadline=None)
def test_names_sort_as_their_steps_and_give_them_back(steps: list[int]) -> None:
    names = [event_file_name(step) for step in steps]
    assert sorted(names) == [event_file_name(step) for step in sorted(steps)]
    assert [event_file_step(name) for name in names] == steps


@pytest.mark.parametrize("name", ["metrics.parquet", "events.out.tfevents.17000.host", "events.out.tfevents.", ""])
def test_other_names_have_no_step(name: str) -> None:
    assert event_file_step(name) is None
