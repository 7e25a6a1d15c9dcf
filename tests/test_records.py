import dataclasses
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctc_ray import records
from ctc_ray.errors import SchemaError, StaleOutputError
from ctc_ray.records import FailureRow, Record, State
from ctc_ray.storage import Store

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def _record(identity: str = "i1") -> Record:
    return Record(stage="embed", unit="007", identity=identity, config={"a": 1}, inputs={"cells": "x"})


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(max_size=4), _JSON, max_size=4))
def test_identity_does_not_depend_on_key_order(config: dict[str, object]) -> None:
    backwards = dict(reversed(list(config.items())))
    assert records.identity_of("s", config, {}) == records.identity_of("s", backwards, {})


def test_identity_changes_with_stage_config_and_inputs() -> None:
    base = records.identity_of("s", {"a": 1}, {"p": "x"})
    others = [
        records.identity_of("t", {"a": 1}, {"p": "x"}),
        records.identity_of("s", {"a": 2}, {"p": "x"}),
        records.identity_of("s", {"a": 1}, {"p": "y"}),
    ]
    assert len({base, *others}) == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1, 2}])
def test_identity_refuses_what_does_not_serialise_stably(value: object) -> None:
    with pytest.raises(SchemaError):
        records.identity_of("s", {"a": value}, {})


def test_state_goes_from_absent_to_complete_to_stale(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert records.state_of(store, "e/007", "i1") is State.ABSENT
    records.publish(store, "e/007", {"part-000.parquet": pa.table({"a": [1]})}, _record())
    assert records.state_of(store, "e/007", "i1") is State.COMPLETE
    assert records.state_of(store, "e/007", "i2") is State.STALE


def test_state_is_absent_when_a_recorded_file_is_gone_or_short(tmp_path: Path) -> None:
    store = Store(tmp_path)
    records.publish(store, "e", {"a.bin": b"12345", "b.bin": b"1"}, _record())
    store.write_bytes("e/a.bin", b"123")
    assert records.state_of(store, "e", "i1") is State.ABSENT
    store.delete("e/a.bin")
    assert records.state_of(store, "e", "i1") is State.ABSENT


def test_require_fresh_refuses_stale_output_and_states_the_remedy(tmp_path: Path) -> None:
    store = Store(tmp_path)
    records.publish(store, "e", {"a": b"1"}, _record("old"))
    with pytest.raises(StaleOutputError, match="--force"):
        records.require_fresh(store, "e", "new", force=False)
    assert records.require_fresh(store, "e", "new", force=True) is State.STALE
    assert store.read_bytes("e/a") == b"1"


def test_publish_writes_the_record_last_and_removes_what_the_former_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    records.publish(store, "e", {"old.bin": b"1", "same.bin": b"1"}, _record("one"))
    written: list[str] = []
    plain = Store.write_bytes

    def watch(self: Store, path: str, data: bytes) -> int:
        written.append(path)
        return plain(self, path, data)

    monkeypatch.setattr(Store, "write_bytes", watch)
    records.publish(store, "e", {"same.bin": b"22", "new.bin": b"2"}, _record("two"))
    assert written[-1] == "e/_record.json"
    assert store.list_files("e") == ["e/_record.json", "e/new.bin", "e/same.bin"]


def test_publish_interrupted_before_the_record_leaves_no_complete_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    records.publish(store, "e", {"a.bin": b"1"}, _record("one"))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(records, "write_record", killed)
    with pytest.raises(KeyboardInterrupt):
        records.publish(store, "e", {"a.bin": b"22"}, _record("two"))
    monkeypatch.undo()
    assert records.state_of(store, "e", "two") is State.STALE
    assert records.state_of(store, "e", "one") is State.ABSENT


def test_record_round_trip_carries_versions_and_time(tmp_path: Path) -> None:
    store = Store(tmp_path)
    records.write_record(store, "e", _record())
    back = records.read_record(store, "e")
    assert back is not None
    assert "ray" in back.versions
    assert back.created_at
    assert dataclasses.replace(back, versions={}, created_at="") == _record()


def test_read_record_of_a_foreign_file_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write_json("e/_record.json", {"hello": 1})
    with pytest.raises(SchemaError, match="not a record"):
        records.read_record(store, "e")


def test_failures_are_rewritten_with_their_unit_and_vanish_when_mended(tmp_path: Path) -> None:
    store = Store(tmp_path)
    records.write_failures(store, "segment", "007", [FailureRow("a.tif", "CartridgeError", "truncated")])
    records.write_failures(store, "segment", "Müller 3", [FailureRow("b.tif", "CartridgeError", "empty")])
    assert records.read_failures(store, "segment")["unit"].to_list() == ["007", "Müller 3"]
    records.write_failures(store, "segment", "007", [])
    assert records.read_failures(store, "segment")["source"].to_list() == ["b.tif"]
    assert records.read_failures(store, "segment", "007").is_empty()


def test_worker_tally_sums_units_a_process() -> None:
    tally = records.WorkerTally()
    for node, pid in [("n2", 5), ("n1", 9), ("n2", 5)]:
        tally.add(node, pid)
    assert tally.rows() == [{"node": "n1", "pid": 9, "units": 1}, {"node": "n2", "pid": 5, "units": 2}]
