"""Units cover a patient's cells once; parts join to shards of the same names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from cells_cohort import add_patient, small_cohort

from ctc_ray.config import EmbedConfig, load_config
from ctc_ray.embed import Embedder
from ctc_ray.embed.compute import EmbedUnits
from ctc_ray.embed.reading import READ_SCHEMA, read_units, streams_of
from ctc_ray.embed.stage import plan_embed
from ctc_ray.embed.units import MAX_UNIT_BYTES, Unit, consolidate, finished_parts, parts_folder, units_of
from ctc_ray.records import State
from ctc_ray.schema import embeddings_schema, unpack_pixels
from ctc_ray.storage import Store

PATIENT = "Müller 3"


@pytest.fixture(scope="module")
def embed() -> Embedder:
    return Embedder.load(precision="fp32")


def _read(store: Store, units: list[Unit]) -> pa.Table:
    rows = pa.Table.from_pylist([unit.to_row() for unit in units])
    return pa.concat_tables(list(read_units(rows, store)))


def _embed(
    store: Store, units: list[Unit], embedder: Embedder, full_scale: float | None = None
) -> list[dict[str, Any]]:
    """Read and embed units as the plan does, without Ray; their status rows."""
    section = EmbedConfig(encoder="default", full_scale=full_scale)
    actor = EmbedUnits(store, section, "fp32", lambda: ("node", 7), embedder)
    rows: list[dict[str, Any]] = actor(_read(store, units)).to_pylist()
    return rows


def test_units_cover_every_row_once(tmp_path: Path) -> None:
    cohort = small_cohort(tmp_path / "c", {PATIENT: "train"}, cells=23, shards=2)
    shards = cohort.shards(cohort.cells(PATIENT))
    units = units_of(cohort.store, PATIENT, shards, "parts", 5)
    rows = [(unit.shard, row) for unit in units for row in range(unit.start, unit.stop)]
    assert rows == [(shard, row) for shard, n in zip(shards, (12, 11), strict=True) for row in range(n)]
    assert len({unit.part for unit in units}) == len(units) == 6


def test_parts_join_to_the_vectors_of_the_cells_in_shards_of_their_names(tmp_path: Path, embed: Embedder) -> None:
    cohort = small_cohort(tmp_path / "c", {PATIENT: "train"}, cells=9, shards=2)
    shards = cohort.shards(cohort.cells(PATIENT))
    output = cohort.embeddings("dino", PATIENT)
    folder = parts_folder(output, "abc")
    units = units_of(cohort.store, PATIENT, shards, folder, 3)
    rows = _embed(cohort.store, units, embed)
    assert [(row["part"], row["node"], row["pid"], row["kind"]) for row in rows] == [
        (u.part, "node", 7, "") for u in units
    ]
    assert finished_parts(cohort.store, folder) == {unit.part for unit in units}
    sizes = consolidate(cohort.store, output, units)
    assert list(sizes) == ["part-000.parquet", "part-001.parquet"]
    for shard in shards:
        cells = cohort.store.read_table(shard)
        table = cohort.store.read_table(f"{output}/{shard.rsplit('/', 1)[-1]}")
        assert table.schema.equals(embeddings_schema(128))
        assert table["cell_id"].to_pylist() == cells["cell_id"].to_pylist()
        assert set(table["patient"].to_pylist()) == {PATIENT}
        vectors = np.stack(table["embedding"].to_numpy())
        expected = embed(unpack_pixels(cells["pixels"], cells.schema.field("pixels")))
        assert np.allclose(vectors, expected, atol=1e-4 * np.abs(expected).max())


def test_patient_without_cells_gives_an_empty_shard(tmp_path: Path, embed: Embedder) -> None:
    cohort = small_cohort(tmp_path / "c", {PATIENT: "train"}, cells=3)
    add_patient(cohort, PATIENT, np.zeros((0, 3, 48, 48), np.uint8))
    (unit,) = units_of(cohort.store, PATIENT, cohort.shards(cohort.cells(PATIENT)), "parts", 5)
    assert [row["kind"] for row in _embed(cohort.store, [unit], embed)] == [""]
    consolidate(cohort.store, "out", [unit])
    assert cohort.store.read_table("out/part-000.parquet").num_rows == 0


def test_counts_above_full_scale_are_refused_and_full_scale_mends_it(tmp_path: Path, embed: Embedder) -> None:
    cohort = small_cohort(tmp_path / "c", {PATIENT: "train"}, cells=3)
    add_patient(cohort, PATIENT, np.full((2, 3, 48, 48), 60_000, np.uint16))
    (unit,) = units_of(cohort.store, PATIENT, cohort.shards(cohort.cells(PATIENT)), "parts", 5)
    (row,) = _embed(cohort.store, [unit], embed)
    assert (row["kind"], "embed.full_scale" in row["message"]) == ("SchemaError", True)
    assert finished_parts(cohort.store, "parts") == set()
    (row,) = _embed(cohort.store, [unit], embed, 65_535)
    assert row["kind"] == ""
    assert cohort.store.num_rows(unit.part) == 2


def test_unit_that_cannot_be_read_is_a_row_with_its_reason_and_the_others_are_embedded(
    tmp_path: Path, embed: Embedder
) -> None:
    cohort = small_cohort(tmp_path / "c", {"007": "train", "12": "test"}, cells=3)
    units = [units_of(cohort.store, p, cohort.shards(cohort.cells(p)), f"parts/{p}", 5)[0] for p in ("007", "12")]
    cohort.store.write_bytes(units[0].shard, b"not Parquet")
    read = _read(cohort.store, units)
    assert read.schema.equals(READ_SCHEMA)
    assert read["cells"].is_null().to_pylist() == [True, False]
    first, second = _embed(cohort.store, units, embed)
    assert (first["kind"], units[0].shard in first["message"], second["kind"]) == ("SchemaError", True, "")
    assert finished_parts(cohort.store, "parts/12") == {units[1].part}


def test_pixels_of_a_unit_are_read_where_they_lie(tmp_path: Path) -> None:
    cohort = small_cohort(tmp_path / "c", {PATIENT: "train"}, cells=20)
    units = units_of(cohort.store, PATIENT, cohort.shards(cohort.cells(PATIENT)), "parts", 7)
    block = _read(cohort.store, units).combine_chunks()
    whole = block["cells"].chunk(0).buffers()[2]
    expected = cohort.store.read_table(units[0].shard)["pixels"].to_pylist()
    for number, unit in enumerate(units):
        (stream,) = streams_of(block.slice(number, 1)["cells"])
        with pa.ipc.open_stream(stream) as reader:
            pixels = reader.read_all()["pixels"]
        assert pixels.to_pylist() == expected[unit.start : unit.stop]
        assert whole.address <= pixels.chunk(0).buffers()[1].address < whole.address + whole.size


def test_units_are_no_larger_than_a_block(tmp_path: Path) -> None:
    cohort = small_cohort(tmp_path / "c", {PATIENT: "train"}, cells=3)
    add_patient(cohort, PATIENT, np.zeros((2500, 3, 48, 48), np.uint16))
    units = units_of(cohort.store, PATIENT, cohort.shards(cohort.cells(PATIENT)), "parts", 1_000_000)
    assert [unit.stop - unit.start for unit in units] == [2427, 73]
    assert 2427 * 2 * 3 * 48 * 48 <= MAX_UNIT_BYTES < 2428 * 2 * 3 * 48 * 48


def test_plan_before_any_encoder_says_what_is_missing(tmp_path: Path) -> None:
    cohort = small_cohort(tmp_path / "c", {PATIENT: "train"}, cells=3)
    (row,) = plan_embed(load_config(), cohort)
    assert (row.state, "run pretrain" in row.why) == (State.ABSENT, True)
    (row,) = plan_embed(load_config(None, ["embed.encoder=default"]), cohort)
    assert (row.state, "nothing is embedded" in row.why) == (State.ABSENT, True)
