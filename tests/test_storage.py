import os
import pickle
from pathlib import Path

import pyarrow as pa
import pytest

from ctc_ray.errors import ConfigError, MissingInputError, SchemaError
from ctc_ray.storage import StorageError, Store


def test_store_write_replaces_whole_files_and_leaves_no_temporary(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write_bytes("a/b.bin", b"one")
    store.write_bytes("a/b.bin", b"two and more")
    assert store.read_bytes("a/b.bin") == b"two and more"
    assert store.size("a/b.bin") == 12
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.bin"]


def test_store_failed_write_keeps_the_former_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.write_bytes("a.bin", b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"a\.bin.*No space left"):
        store.write_bytes("a.bin", b"new")
    monkeypatch.undo()
    assert store.read_bytes("a.bin") == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_store_interrupted_write_is_not_listed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write_bytes("x/part.parquet", b"1")
    (tmp_path / "x" / ".tmp-123-part.parquet").write_bytes(b"half")
    assert store.list_files("x") == ["x/part.parquet"]


def test_store_lists_files_and_folders_with_odd_names(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for name in ("007", "12", "Müller 3"):
        store.write_bytes(f"cells/{name}/part-000.parquet", b"x")
    assert store.list_folders("cells") == ["007", "12", "Müller 3"]
    assert store.list_files("cells", ".parquet", recursive=True) == [
        f"cells/{n}/part-000.parquet" for n in ("007", "12", "Müller 3")
    ]
    assert store.list_files("nowhere") == []


def test_store_survives_pickling_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store("here")
    store.write_bytes("a", b"1")
    data = pickle.dumps(store)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert pickle.loads(data).read_bytes("a") == b"1"


def test_store_table_round_trip_keeps_field_metadata(tmp_path: Path) -> None:
    field = pa.field("pixels", pa.binary(4), nullable=False, metadata={"shape": "[4]"})
    table = pa.table([pa.array([b"abcd", b"\0\0\0\0"], pa.binary(4))], schema=pa.schema([field]))
    store = Store(tmp_path)
    store.write_table("t.parquet", table)
    assert store.read_table("t.parquet").equals(table)
    assert store.read_schema("t.parquet").field("pixels").metadata[b"shape"] == b"[4]"
    assert store.num_rows("t.parquet") == 2


def test_store_missing_file_and_broken_parquet_are_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(MissingInputError, match="absent"):
        store.read_bytes("absent")
    store.write_bytes("broken.parquet", b"PAR1 but not really")
    with pytest.raises(SchemaError, match=r"broken\.parquet cannot be read as Parquet"):
        store.read_table("broken.parquet")


def test_store_unknown_scheme_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="cannot open"):
        Store("nosuch://bucket/cohort")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_store_unwritable_folder_is_one_clear_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="cannot write"):
        Store(tmp_path).write_bytes("a", b"1")
    tmp_path.chmod(0o700)


def test_store_file_in_the_way_of_a_folder_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "cells").write_bytes(b"I am a file")
    with pytest.raises(StorageError, match="cannot write"):
        Store(tmp_path).write_bytes("cells/P01/part-000.parquet", b"1")
