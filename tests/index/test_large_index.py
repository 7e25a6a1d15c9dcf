"""The stage where lists or a graph take the place of the flat index: equal answers, growth, resume, set-asides, parallel."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import polars as pl
import pytest

from ctc_ray.cohort import Cohort
from ctc_ray.config import IndexConfig, RunConfig
from ctc_ray.errors import SchemaError, StaleOutputError, TooManyFailuresError
from ctc_ray.index import stage
from ctc_ray.index.build import read_description
from ctc_ray.index.cell_table import CellTable
from ctc_ray.index.search import CellIndex, similar
from ctc_ray.index.stage import plan_index, run_index
from ctc_ray.records import State, read_failures, read_record

FLAT = RunConfig(index=IndexConfig(num_threads=1))
IVF = RunConfig(index=IndexConfig(num_threads=1, exact_below=100, max_failure_fraction=0.2))
HNSW = RunConfig(index=IndexConfig(num_threads=1, kind="hnsw"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, mixture: ModuleType) -> Any:
    made = mixture.build_cohort(tmp_path_factory.mktemp("large"), num_cells=60)
    shutil.copytree(made.cohort.store.local_path(), made.cohort.store.local_path().with_name("plain"))
    run_index(IVF, made.cohort)
    return made


@pytest.fixture
def listed(built: Any, tmp_path: Path) -> Cohort:
    shutil.copytree(built.cohort.store.local_path(), tmp_path / "cohort")
    return Cohort.open(str(tmp_path / "cohort"))


@pytest.fixture
def plain(built: Any, tmp_path: Path) -> Cohort:
    """The same cohort without an index."""
    shutil.copytree(built.cohort.store.local_path().with_name("plain"), tmp_path / "plain")
    return Cohort.open(str(tmp_path / "plain"))


def test_more_cells_than_the_limit_are_kept_in_lists_chosen_by_recall(built: Any) -> None:
    description = read_description(built.cohort.store, "index/dino")
    assert (description["version"], description["kind"], description["cells"]) == (2, "ivf", 360)
    assert description["measured"]["lower_bound"] >= 0.99 or description["depth"] == description["lists"]
    last = [trial["depth"] for trial in description["measured"]["trials"] if trial["nearest"] == 10][-1]
    assert last == description["depth"] == description["depths"]["10"]
    assert not built.cohort.store.exists("index/dino/_parts")


def test_lists_and_graph_answer_as_the_flat_index(built: Any, plain: Cohort) -> None:
    queries = list(built.kinds)[::17]
    run_index(FLAT, plain)
    exact = similar(FLAT, plain, queries, k=5)
    for config, cohort in ((IVF, built.cohort), (HNSW, plain)):
        if config is HNSW:
            with pytest.raises(StaleOutputError, match="another metric or kind"):
                run_index(config, cohort)
            run_index(config, cohort, force=True)
        found = similar(config, cohort, queries, k=5)
        assert found.height == exact.height
        shared = found.join(exact, on=["query", "cell_id"]).height
        assert shared / exact.height >= 0.97
    assert read_description(plain.store, "index/dino")["kind"] == "hnsw"


def test_filter_and_long_answers_are_exact_whatever_the_lists_hold(built: Any, plain: Cohort) -> None:
    run_index(FLAT, plain)
    queries = list(built.kinds)[::60]
    for options in ({"k": 60, "patients": ["P4"]}, {"k": 1000}):
        exact = similar(FLAT, plain, queries, **options)  # type: ignore[arg-type]
        found = similar(IVF, built.cohort, queries, **options)  # type: ignore[arg-type]
        assert found.height == exact.height
        np.testing.assert_allclose(found["similarity"], exact["similarity"], atol=1e-5)


def test_new_patients_join_the_lists_without_moving_the_rest(listed: Cohort, mixture: ModuleType) -> None:
    before = CellIndex.open(listed, "dino").vectors(np.arange(360))
    trained = read_description(listed.store, "index/dino")["trained_cells"]
    listed.add_patients({"new": "cartridge"})
    mixture.write_patient(listed, "new", num_cells=20, seed=4, spread=1.6)
    result = run_index(IVF, listed)
    assert (result.units_computed, result.units_reused, result.counts["cells"]) == (1, 6, 380)
    index = CellIndex.open(listed, "dino")
    np.testing.assert_array_equal(index.vectors(np.arange(360)), before)
    new = listed.read_columns("cells/new", ["cell_id"])["cell_id"].to_pylist()
    np.testing.assert_array_equal(index.positions_of(new), np.arange(360, 380))
    assert similar(IVF, listed, new[:1], k=3, patients=["new"]).height == 3
    assert read_description(listed.store, "index/dino")["trained_cells"] == trained


def test_cohort_that_outgrows_the_flat_index_or_its_lists_is_built_anew(plain: Cohort, mixture: ModuleType) -> None:
    small = RunConfig(index=IndexConfig(num_threads=1, exact_below=360))
    assert run_index(small, plain).units_computed == 6
    plain.add_patients({"new": "cartridge"})
    mixture.write_patient(plain, "new", num_cells=20, seed=4, spread=1.6)
    result = run_index(small, plain)
    assert (result.units_computed, result.units_reused) == (7, 0)
    assert read_description(plain.store, "index/dino")["kind"] == "ivf"
    description = {**read_description(plain.store, "index/dino"), "trained_cells": 50}
    plain.store.write_json("index/dino/index.json", description)
    record = read_record(plain.store, "index/dino")
    assert record is not None
    files = {**record.files, "index.json": plain.store.size("index/dino/index.json")}
    plain.store.write_json("index/dino/_record.json", {**record.__dict__, "files": files})
    plain.add_patients({"newer": "cartridge"})
    mixture.write_patient(plain, "newer", num_cells=20, seed=5, spread=1.6)
    assert run_index(small, plain).units_reused == 0
    assert read_description(plain.store, "index/dino")["trained_cells"] == 400


def test_index_of_version_one_is_read_and_extended(plain: Cohort, mixture: ModuleType) -> None:
    run_index(FLAT, plain)
    query = plain.read_columns("cells/007", ["cell_id"])["cell_id"][0].as_py()
    expected = similar(FLAT, plain, [query], k=9)
    record = read_record(plain.store, "index/dino")
    assert record is not None
    files = {name: size for name, size in record.files.items() if name in ("index.faiss", "cells.parquet")}
    plain.store.write_json("index/dino/_record.json", {**record.__dict__, "files": files})
    for name in ("index.json", "cells.arrow"):
        plain.store.delete(f"index/dino/{name}")
    assert {row.state for row in plan_index(FLAT, plain)} == {State.COMPLETE}
    assert similar(FLAT, plain, [query], k=9).equals(expected)
    plain.add_patients({"new": "cartridge"})
    mixture.write_patient(plain, "new", num_cells=20, seed=4, spread=1.6)
    assert run_index(FLAT, plain).units_reused == 6
    assert read_description(plain.store, "index/dino")["version"] == 2


def test_build_that_was_cut_short_uses_its_finished_parts(plain: Cohort, monkeypatch: pytest.MonkeyPatch) -> None:
    placed: list[str] = []
    place = stage.place

    def stopping(store: Any, config: Any, shard: Any, *rest: Any) -> Any:
        if len(placed) == 5:
            raise KeyboardInterrupt
        placed.append(f"{shard.patient}/{shard.name}")
        return place(store, config, shard, *rest)

    monkeypatch.setattr(stage, "place", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_index(IVF, plain)
    assert read_record(plain.store, "index/dino") is None
    again: list[str] = []

    def counting(store: Any, config: Any, shard: Any, *rest: Any) -> Any:
        again.append(f"{shard.patient}/{shard.name}")
        return place(store, config, shard, *rest)

    monkeypatch.setattr(stage, "place", counting)
    assert run_index(IVF, plain).counts["cells"] == 360
    assert len(placed) == 5
    assert len(again) == 7
    assert not set(placed) & set(again)


@pytest.mark.parametrize("config", [FLAT, IVF], ids=["flat", "ivf"])
def test_patient_that_cannot_be_read_is_set_aside_and_taken_up_later(
    plain: Cohort, mixture: ModuleType, config: RunConfig
) -> None:
    config = RunConfig(index=config.index.model_copy(update={"max_failure_fraction": 0.2}))
    path = "embeddings/dino/P4/part-001.parquet"
    whole = plain.store.read_bytes(path)
    plain.store.write_bytes(path, b"PAR1" + bytes(len(whole) - 4))
    result = run_index(config, plain)
    assert (result.units_computed, result.set_aside, result.counts["cells"]) == (5, 1, 300)
    failures = read_failures(plain.store, "index")
    assert failures.select("unit", "source").row(0) == ("P4", path)
    plain.store.write_bytes(path, whole)
    result = run_index(config, plain)
    assert (result.units_computed, result.units_reused, result.counts["cells"]) == (1, 5, 360)
    assert read_failures(plain.store, "index").is_empty()
    strict = RunConfig(index=config.index.model_copy(update={"max_failure_fraction": 0.0}))
    plain.store.delete_folder("index")
    plain.store.write_bytes(path, b"PAR1")
    with pytest.raises(TooManyFailuresError, match="1 of 6 patients failed"):
        run_index(strict, plain)


def test_patient_of_another_width_is_set_aside(plain: Cohort, mixture: ModuleType) -> None:
    mixture.write_embeddings(plain, "P6", {"part-000.parquet": (["a"], np.ones((1, 5), np.float32))}, "narrow")
    result = run_index(IVF, plain)
    assert result.set_aside == 1
    assert "5 wide, the index 12" in read_failures(plain.store, "index")["message"][0]


def test_table_finds_cells_by_id_and_gives_places_by_position(built: Any) -> None:
    table = CellTable.open(built.cohort.store, "index/dino")
    cells = pl.DataFrame(pl.from_arrow(built.cohort.store.read_table("index/dino/cells.parquet")))
    assert cells["position"].to_list() == list(range(360))
    np.testing.assert_array_equal(table.positions_of(cells["cell_id"].to_list()), np.arange(360))
    assert table.positions_of(["", "zzz", "~"]).tolist() == [-1, -1, -1]
    chosen = np.array([359, 3, 3])
    assert table.at(chosen).equals(cells[chosen].select("cell_id", "patient", "field", "row", "col"))
    assert table.largest_group == 2
    twins = cells.filter(pl.struct("patient", "physical_id").is_duplicated())["position"].to_numpy()
    assert len(twins) == 12
    assert len(np.unique(table.physical[twins])) == 6


def test_damaged_table_is_refused(listed: Cohort) -> None:
    size = listed.store.size("index/dino/cells.arrow")
    listed.store.write_bytes("index/dino/cells.arrow", b"x" * int(size or 0))
    with pytest.raises(SchemaError, match=r"cells\.arrow is damaged"):
        CellIndex.open(listed, "dino")


@pytest.mark.ray
def test_index_built_by_ray_tasks_equals_one_built_here(built: Any, plain: Cohort, ray_cluster: None) -> None:
    run_index(IVF, plain)
    for name in ("index.faiss", "cells.arrow"):
        assert plain.store.read_bytes(f"index/dino/{name}") == built.cohort.store.read_bytes(f"index/dino/{name}")


@pytest.mark.gpu
def test_gpu_answers_as_the_processor(built: Any) -> None:
    from ctc_ray.index.gpu import num_gpus

    if not num_gpus():
        pytest.skip("FAISS sees no GPU")
    vectors = CellIndex.open(built.cohort, "dino").vectors(np.arange(200))
    here = CellIndex.open(built.cohort, "dino", use_gpu=False).similar_to_vectors(vectors, k=5)
    there = CellIndex.open(built.cohort, "dino", use_gpu=True).similar_to_vectors(vectors, k=5)
    np.testing.assert_allclose(there["similarity"], here["similarity"], atol=1e-3)
