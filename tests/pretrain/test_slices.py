"""Slices read exactly their rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from cells_cohort import cells_table
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctc_ray.errors import SchemaError
from ctc_ray.pretrain.slices import SLICE_ROWS, Slice, read_crops, read_slice, share_of, slices_of
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


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=5), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_shares_cover_every_row_once_and_are_even(rows: list[int], size: int) -> None:
    shards = {f"s{i}": n for i, n in enumerate(rows)}
    shares = [share_of(shards, rank, size) for rank in range(size)]
    covered = [(part.shard, row) for share in shares for part in share for row in range(part.start, part.stop)]
    assert sorted(covered) == [(shard, row) for shard, n in shards.items() for row in range(n)]
    counts = [sum(part.stop - part.start for part in share) for share in shares]
    assert max(counts) - min(counts) <= 16
    assert all(0 < part.stop - part.start <= SLICE_ROWS for share in shares for part in share)


def test_shares_of_few_rows_differ_by_one_row_at_most() -> None:
    counts = [sum(part.stop - part.start for part in share_of({"a": 7, "b": 60}, rank, 4)) for rank in range(4)]
    assert sorted(counts) == [16, 17, 17, 17]


@pytest.mark.parametrize("order", [1, -1])
def test_crops_come_in_the_order_of_their_cell_id_however_they_are_cut(tmp_path: Path, order: int) -> None:
    store = Store(tmp_path)
    crops = np.random.default_rng(0).integers(0, 255, (11, 4, 48, 48)).astype(np.uint8)
    table = cells_table("7", crops)
    store.write_table("a.parquet", table.slice(0, 8), row_group_size=3)
    store.write_table("b.parquet", table.slice(8), row_group_size=3)
    parts = slices_of({"a.parquet": 8, "b.parquet": 3}, 3)[::order]
    expected = crops[np.argsort(table["cell_id"].to_numpy(zero_copy_only=False))]
    np.testing.assert_array_equal(read_crops(store, parts), expected)


def test_crops_of_two_kinds_raise(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write_table("a.parquet", cells_table("7", np.zeros((2, 3, 48, 48), np.uint8)))
    store.write_table("b.parquet", cells_table("8", np.zeros((2, 4, 48, 48), np.uint8)))
    with pytest.raises(SchemaError, match=r"b\.parquet holds crops of uint8"):
        read_crops(store, slices_of({"a.parquet": 2, "b.parquet": 2}, 9))
