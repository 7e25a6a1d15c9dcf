"""The index: against brute force, filters, and growth."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import polars as pl
import pytest

from ctc_ray.cohort import Cohort
from ctc_ray.config import IndexConfig, RunConfig
from ctc_ray.errors import ConfigError, MissingInputError, SchemaError, StaleOutputError
from ctc_ray.index.build import new_index, open_index, prepared, stored_vectors
from ctc_ray.index.search import CellIndex, similar
from ctc_ray.index.stage import plan_index, run_index
from ctc_ray.latent.embeddings import read_selected
from ctc_ray.records import State, read_record

CONFIG = RunConfig()
L2 = RunConfig(index=IndexConfig(metric="l2"))


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory, mixture: ModuleType) -> Any:
    made = mixture.build_cohort(tmp_path_factory.mktemp("indexed"), num_cells=60)
    run_index(CONFIG, made.cohort)
    return made


@pytest.fixture
def copied(indexed: Any, tmp_path: Path) -> Cohort:
    shutil.copytree(indexed.cohort.store.local_path(), tmp_path / "cohort")
    return Cohort.open(str(tmp_path / "cohort"))


def everything(cohort: Cohort, kinds: dict[str, str]) -> tuple[list[str], np.ndarray]:
    return read_selected(cohort, "dino", cohort.patient_ids(), kinds.keys())


def test_neighbours_agree_with_brute_force(indexed: Any) -> None:
    ids, vectors = everything(indexed.cohort, indexed.kinds)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    queries = ids[::40]
    found = similar(CONFIG, indexed.cohort, queries, k=7, exclude_same_cell=False)
    for query in queries:
        scores = unit @ unit[ids.index(query)]
        order = [i for i in np.argsort(-scores, kind="stable") if ids[i] != query][:7]
        rows = found.filter(pl.col("query") == query)
        np.testing.assert_allclose(rows["similarity"], scores[order], atol=1e-5)
        assert rows["rank"].to_list() == list(range(1, 8))
        assert set(rows["cell_id"]) == {ids[i] for i in order}


def test_other_detection_of_the_same_physical_cell_is_left_out(indexed: Any) -> None:
    cells = indexed.cohort.read_columns("cells/007", ["cell_id"])["cell_id"].to_pylist()
    with_twin = similar(CONFIG, indexed.cohort, [cells[-2]], k=5, exclude_same_cell=False)
    without = similar(CONFIG, indexed.cohort, [cells[-2]], k=5)
    assert with_twin["cell_id"][0] == cells[-1]
    assert without.height == 5
    assert not {cells[-1], cells[-2]} & set(without["cell_id"])


def test_neighbours_have_the_place_and_patient_of_their_cell(indexed: Any) -> None:
    query = next(iter(indexed.kinds))
    found = similar(CONFIG, indexed.cohort, [query], k=4, patients=["P4", "Müller 3"])
    assert set(found["patient"]) <= {"P4", "Müller 3"}
    assert found.columns == ["query", "rank", "cell_id", "patient", "field", "row", "col", "similarity"]
    for row in found.iter_rows(named=True):
        table = indexed.cohort.read_columns(f"cells/{row['patient']}", ["cell_id", "field", "row", "col"])
        cell = pl.DataFrame(pl.from_arrow(table)).filter(pl.col("cell_id") == row["cell_id"]).row(0, named=True)
        assert (cell["field"], cell["row"], cell["col"]) == (row["field"], row["row"], row["col"])


def test_filter_gives_the_nearest_of_the_patient_not_the_rest_of_the_nearest(indexed: Any) -> None:
    query = next(iter(indexed.kinds))
    filtered = similar(CONFIG, indexed.cohort, [query], k=60, patients=["P4"])
    assert filtered.height == 60
    every = similar(CONFIG, indexed.cohort, [query], k=1000)
    assert every.height == 6 * 60 - 1
    assert every.filter(pl.col("patient") == "P4")["cell_id"].to_list() == filtered["cell_id"].to_list()


def test_neighbours_of_a_ctc_are_ctcs(indexed: Any) -> None:
    ctcs = [name for name, kind in indexed.kinds.items() if kind == "ctc"][:10]
    found = similar(CONFIG, indexed.cohort, ctcs, k=10)
    share = np.mean([indexed.kinds[name] == "ctc" for name in found["cell_id"]])
    prevalence = np.mean([kind == "ctc" for kind in indexed.kinds.values()])
    assert share > 0.9 > prevalence


def test_l2_gives_the_negative_distance(copied: Cohort, indexed: Any) -> None:
    with pytest.raises(StaleOutputError, match="--force"):
        run_index(L2, copied)
    run_index(L2, copied, force=True)
    ids, vectors = everything(copied, indexed.kinds)
    found = similar(L2, copied, [ids[3]], k=3, exclude_same_cell=False)
    distances = np.linalg.norm(vectors - vectors[3], axis=1)
    np.testing.assert_allclose(found["similarity"], -np.sort(distances)[1:4], atol=1e-3)


def test_search_by_vector_finds_the_cell_itself(indexed: Any) -> None:
    ids, vectors = everything(indexed.cohort, indexed.kinds)
    index = CellIndex.open(indexed.cohort, "dino", num_threads=1)
    found = index.similar_to_vectors(vectors[[5, 9]], k=2)
    assert found.filter(pl.col("rank") == 1)["cell_id"].to_list() == [ids[5], ids[9]]
    assert found["query"].to_list() == ["0", "0", "1", "1"]
    assert len(index) == len(ids)


def test_new_patients_are_added_and_the_rest_is_reused(copied: Cohort, mixture: ModuleType) -> None:
    assert run_index(CONFIG, copied).units_reused == 6
    before = stored_vectors(open_index(copied.store, "index/dino/index.faiss"))
    copied.add_patients({"new": "cartridge"})
    mixture.write_patient(copied, "new", num_cells=20, seed=4, spread=1.6)
    assert [row.unit for row in plan_index(CONFIG, copied) if row.state is State.ABSENT] == ["new"]
    result = run_index(CONFIG, copied)
    assert (result.units_computed, result.units_reused, result.counts["cells"]) == (1, 6, 380)
    after = stored_vectors(open_index(copied.store, "index/dino/index.faiss"))
    np.testing.assert_array_equal(after[:360], before)
    cells = pl.DataFrame(pl.from_arrow(copied.store.read_table("index/dino/cells.parquet")))
    assert cells["position"].to_list() == list(range(380))
    record = read_record(copied.store, "index/dino")
    assert record is not None
    assert (record.units_computed, record.units_reused) == (1, 6)


def test_extended_index_equals_one_built_at_once(copied: Cohort, mixture: ModuleType) -> None:
    copied.add_patients({"new": "cartridge"})
    mixture.write_patient(copied, "new", num_cells=20, seed=4, spread=1.6)
    run_index(CONFIG, copied)
    query = copied.read_columns("cells/new", ["cell_id"])["cell_id"][0].as_py()
    extended = similar(CONFIG, copied, [query], k=30)
    copied.store.delete_folder("index")
    run_index(CONFIG, copied)
    assert similar(CONFIG, copied, [query], k=30).equals(extended)


def test_patient_embedded_anew_makes_the_index_stale(copied: Cohort) -> None:
    record = read_record(copied.store, "embeddings/dino/P5")
    assert record is not None
    copied.store.write_json("embeddings/dino/P5/_record.json", {**record.__dict__, "identity": "another"})
    assert {row.state for row in plan_index(CONFIG, copied)} == {State.STALE}
    with pytest.raises(StaleOutputError, match="other embeddings"):
        run_index(CONFIG, copied)
    assert run_index(CONFIG, copied, force=True).units_computed == 6


def test_wrong_requests_say_what_to_do(indexed: Any, tmp_path: Path, mixture: ModuleType) -> None:
    query = next(iter(indexed.kinds))
    with pytest.raises(MissingInputError, match="first 'stranger'"):
        similar(CONFIG, indexed.cohort, [query, "stranger"], k=3)
    with pytest.raises(ConfigError, match="no patient 'P99'; it has 007"):
        similar(CONFIG, indexed.cohort, [query], k=3, patients=["P99"])
    with pytest.raises(ConfigError, match="at least one neighbour"):
        similar(CONFIG, indexed.cohort, [query], k=0)
    made = mixture.build_cohort(tmp_path, roles={"007": "train"}, num_cells=20)
    with pytest.raises(MissingInputError, match="ctc-ray index"):
        similar(CONFIG, made.cohort, [query], k=3)
    made.cohort.store.delete_folder("embeddings")
    with pytest.raises(MissingInputError, match="ctc-ray embed"):
        run_index(CONFIG, made.cohort)


def test_damaged_index_and_odd_vectors_are_refused(copied: Cohort) -> None:
    size = copied.store.size("index/dino/index.faiss")
    copied.store.write_bytes("index/dino/index.faiss", b"x" * int(size or 0))
    with pytest.raises(SchemaError, match="no FAISS index"):
        open_index(copied.store, "index/dino/index.faiss")
    with pytest.raises(SchemaError, match="embedding 1 is zero"):
        prepared(np.array([[1, 0], [0, 0]], np.float32), "cosine", "shard")
    with pytest.raises(SchemaError, match="not finite"):
        prepared(np.array([[np.nan, 0]], np.float32), "l2", "shard")
    with pytest.raises(SchemaError, match="holds 0 vectors and its table 1"):
        CellIndex(new_index(2, "l2"), pl.DataFrame({"patient": ["p"], "physical_id": ["c"]}), "l2")


@pytest.mark.slow
@pytest.mark.parametrize("order", ["import torch, faiss", "import faiss, torch"])
def test_faiss_and_torch_live_in_one_process(order: str) -> None:
    """Both bring an OpenMP runtime; either order of import has to compute and end."""
    code = (
        f"{order}\nimport numpy as np\nx = np.random.default_rng(0).normal(size=(2000, 64)).astype('f4')\n"
        "i = faiss.IndexFlatIP(64); i.add(x); d, n = i.search(x[:50], 5)\n"
        "t = torch.from_numpy(x); assert torch.isfinite(t @ t.T).all(); i.search(x[:50], 5); print(n.shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "(50, 5)", done.stderr[-500:]
