"""Units cover a patient's cells once; parts join to shards of the same names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cells_cohort import add_patient, small_cohort

from ctc_ray.config import load_config
from ctc_ray.embed import Embedder
from ctc_ray.embed.compute import embed_unit
from ctc_ray.embed.stage import plan_embed
from ctc_ray.embed.units import consolidate, finished_parts, parts_folder, units_of
from ctc_ray.errors import SchemaError
from ctc_ray.records import State
from ctc_ray.schema import embeddings_schema, unpack_pixels

PATIENT = "Müller 3"


@pytest.fixture(scope="module")
def embed() -> Embedder:
    return Embedder.load(precision="fp32")


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
    assert sum(embed_unit(cohort.store, unit, embed, None) for unit in units) == 9
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
    assert embed_unit(cohort.store, unit, embed, None) == 0
    consolidate(cohort.store, "out", [unit])
    assert cohort.store.read_table("out/part-000.parquet").num_rows == 0


def test_counts_above_full_scale_are_refused_and_full_scale_mends_it(tmp_path: Path, embed: Embedder) -> None:
    cohort = small_cohort(tmp_path / "c", {PATIENT: "train"}, cells=3)
    add_patient(cohort, PATIENT, np.full((2, 3, 48, 48), 60_000, np.uint16))
    (unit,) = units_of(cohort.store, PATIENT, cohort.shards(cohort.cells(PATIENT)), "parts", 5)
    with pytest.raises(SchemaError, match=r"embed\.full_scale"):
        embed_unit(cohort.store, unit, embed, None)
    assert embed_unit(cohort.store, unit, embed, 65_535) == 2


def test_plan_before_any_encoder_says_what_is_missing(tmp_path: Path) -> None:
    cohort = small_cohort(tmp_path / "c", {PATIENT: "train"}, cells=3)
    (row,) = plan_embed(load_config(), cohort)
    assert (row.state, "run pretrain" in row.why) == (State.ABSENT, True)
    (row,) = plan_embed(load_config(None, ["embed.encoder=default"]), cohort)
    assert (row.state, "nothing is embedded" in row.why) == (State.ABSENT, True)
