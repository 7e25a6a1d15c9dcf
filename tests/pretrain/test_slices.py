"""Slices read exactly their rows."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctc_ray.errors import SchemaError
from ctc_ray.pretrain.slices import Slice, read_slice, slices_of
from ctc_ray.storage import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path)
    store.write_table("a.parquet", pa.table({"n": list(range(50)), "m": [0] * 50}), row_group_size=7)
    return store


@given(st.integers(0, 50), st.integers(0, 50))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_slice_holds_its_rows(store: Store, a: int, b: int) -> None:
    start, stop = sorted((a, b))
    table = read_slice(store, Slice("a.parquet", start, stop), ["n"])
    assert table["n"].to_pylist() == list(range(start, stop))
    assert table.column_names == ["n"]


@given(st.lists(st.integers(0, 30), max_size=4), st.integers(1, 12))
@settings(max_examples=20, deadline=None)
def test_slices_cover_every_row_once(rows: list[int], size: int) -> None:
    shards = {f"s{i}": n for i, n in enumerate(rows)}
    covered = [(part.shard, row) for part in slices_of(shards, size) for row in range(part.start, part.stop)]
    assert covered == [(shard, row) for shard, n in shards.items() for row in range(n)]
    assert all(0 < part.stop - part.start <= size for part in slices_of(shards, size))


def test_slice_beyond_the_shard_raises(store: Store) -> None:
    with pytest.raises(SchemaError, match="50 rows"):
        read_slice(store, Slice("a.parquet", 40, 60), ["n"])


def test_damaged_shard_raises(store: Store) -> None:
    store.write_bytes("b.parquet", b"PAR1 no parquet")
    with pytest.raises(SchemaError, match="cannot be read"):
        read_slice(store, Slice("b.parquet", 0, 1), ["n"])
