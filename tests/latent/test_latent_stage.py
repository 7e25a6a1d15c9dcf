"""The map stage: fitted once, reloaded the same, extended by new patients."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import adjusted_rand_score

from ctc_ray.cohort import Cohort
from ctc_ray.config import LabelsConfig, MapConfig, RunConfig
from ctc_ray.errors import (
    ConfigError,
    MissingInputError,
    ResourceError,
    SchemaError,
    StaleOutputError,
    TooManyFailuresError,
)
from ctc_ray.labels.consensus import read_labels
from ctc_ray.labels.simulated import simulate_expert
from ctc_ray.latent.embeddings import read_selected, read_shard
from ctc_ray.latent.model import load_map, load_pca
from ctc_ray.latent.stage import models_digest, place_cells, plan_map, run_map
from ctc_ray.records import State, read_failures, read_record

CONFIG = RunConfig(labels=LabelsConfig(per_patient=80), map=MapConfig(pca_dim=6, umap_neighbors=20))
FOLDER = "latent/dino/map"


@pytest.fixture(scope="module")
def mapped(tmp_path_factory: pytest.TempPathFactory, mixture: ModuleType) -> Any:
    made = mixture.build_cohort(tmp_path_factory.mktemp("mapped"), num_cells=160)
    simulate_expert(CONFIG, made.cohort, str(made.truth_path))
    run_map(CONFIG, made.cohort)
    return made


@pytest.fixture
def copied(mapped: Any, tmp_path: Path) -> Cohort:
    shutil.copytree(mapped.cohort.store.local_path(), tmp_path / "cohort")
    return Cohort.open(str(tmp_path / "cohort"))


def cells_of(cohort: Cohort, patient: str) -> pl.DataFrame:
    columns = ["cell_id", "patient", "pca", "umap_x", "umap_y", "cluster"]
    return pl.DataFrame(pl.from_arrow(cohort.read_columns(f"{FOLDER}/cells/{patient}", columns))).sort("cell_id")


def test_every_embedded_cell_has_a_place_and_a_cluster(mapped: Any) -> None:
    clusters = load_map(mapped.cohort.store, FOLDER).clusters.num_clusters
    assert clusters >= 2
    for patient in mapped.cohort.patient_ids():
        cells = cells_of(mapped.cohort, patient)
        embedded = mapped.cohort.read_columns(f"embeddings/dino/{patient}", ["cell_id"])["cell_id"].to_pylist()
        assert cells["cell_id"].to_list() == sorted(embedded)
        assert cells.select("umap_x", "umap_y").to_numpy().dtype == np.float32
        assert np.isfinite(cells.select("umap_x", "umap_y").to_numpy()).all()
        assert cells["cluster"].is_between(-1, clusters - 1).all()
        assert mapped.cohort.shards(f"{FOLDER}/cells/{patient}")[1].endswith("part-001.parquet")


def test_kinds_of_cells_lie_in_clusters_of_their_own(mapped: Any) -> None:
    cells = cells_of(mapped.cohort, "P5").filter(pl.col("cluster") >= 0)
    kinds = cells.with_columns(kind=pl.col("cell_id").replace_strict(mapped.kinds))
    purity = kinds.group_by("cluster").agg(
        pl.col("kind").value_counts(sort=True).first().struct.field("count"), pl.len()
    )
    assert purity["count"].sum() / purity["len"].sum() > 0.9


def test_reloaded_map_places_cells_as_the_fitted_one_did(mapped: Any) -> None:
    latent_map = load_map(mapped.cohort.store, FOLDER)
    for patient in ("007", "P5"):
        ids, vectors = read_selected(mapped.cohort, "dino", [patient], mapped.kinds.keys())
        scores, places, clusters = latent_map.locate(ids, vectors)
        written = cells_of(mapped.cohort, patient)
        np.testing.assert_allclose(scores, np.stack(written["pca"].to_list()), atol=1e-5)
        np.testing.assert_allclose(places, written.select("umap_x", "umap_y").to_numpy(), atol=1e-3)
        assert np.mean(clusters == written["cluster"].to_numpy()) > 0.99
    assert latent_map.digest() == latent_map.summary["models"] == models_digest(mapped.cohort, CONFIG.map)
    np.testing.assert_array_equal(load_pca(mapped.cohort.store, FOLDER).components, latent_map.pca.components)


def test_fitted_cells_keep_their_fitted_place(mapped: Any) -> None:
    latent_map = load_map(mapped.cohort.store, FOLDER)
    written = pl.concat([cells_of(mapped.cohort, patient) for patient in ("007", "12")])
    places = {name: (x, y) for name, x, y in written.select("cell_id", "umap_x", "umap_y").iter_rows()}
    found = np.array([places[str(name)] for name in latent_map.plane_ids])
    np.testing.assert_array_equal(found, latent_map.plane.points)


def test_summary_says_what_was_used(mapped: Any) -> None:
    summary = mapped.cohort.store.read_json(f"{FOLDER}/map.json")
    assert summary["used"]["pca_dim"] == 6
    assert summary["num_plane_cells"] == read_labels(mapped.cohort, ["007", "12"]).height
    assert sum(summary["cluster_sizes"]) == summary["num_clustered_cells"]
    assert any("hdbscan_min_samples" in note for note in summary["notes"])


def test_second_run_reuses_and_new_patients_are_added_alone(copied: Cohort, mixture: ModuleType) -> None:
    assert run_map(CONFIG, copied).units_reused == 6
    models = copied.store.read_bytes(f"{FOLDER}/models/umap.npz")
    copied.add_patients({"new": "cartridge"})
    mixture.write_patient(copied, "new", num_cells=30, seed=8, spread=1.6)
    assert [row.unit for row in plan_map(CONFIG, copied) if row.state is State.ABSENT] == ["new"]
    result = run_map(CONFIG, copied)
    assert (result.units_computed, result.units_reused, result.counts["fits"]) == (1, 6, 0)
    assert cells_of(copied, "new").height == 30
    assert copied.store.read_bytes(f"{FOLDER}/models/umap.npz") == models


def test_half_placed_cohort_is_completed(copied: Cohort) -> None:
    before = cells_of(copied, "12")
    copied.store.delete(f"{FOLDER}/cells/12/_record.json")
    result = run_map(CONFIG, copied)
    assert (result.units_computed, result.units_reused) == (1, 5)
    np.testing.assert_allclose(cells_of(copied, "12")["umap_x"], before["umap_x"], atol=1e-3)


def test_new_labels_leave_the_map_frozen(copied: Cohort) -> None:
    for path in copied.store.list_files("labels"):
        copied.store.delete(path)
    rows = plan_map(CONFIG, copied)
    assert rows[0].state is State.COMPLETE
    assert "labels changed since" in rows[0].why
    assert run_map(CONFIG, copied).units_computed == 0


def test_other_settings_are_stale_until_forced(copied: Cohort) -> None:
    other = CONFIG.model_copy(update={"map": CONFIG.map.model_copy(update={"umap_seed": 5})})
    assert plan_map(other, copied)[0].state is State.STALE
    with pytest.raises(StaleOutputError, match=r"other settings.*--force"):
        run_map(other, copied)
    before = models_digest(copied, CONFIG.map)
    result = run_map(other, copied, force=True)
    assert (result.units_computed, result.counts["fits"]) == (6, 1)
    assert models_digest(copied, other.map) != before
    record = read_record(copied.store, f"{FOLDER}/cells/P5")
    assert record is not None
    assert record.inputs["map"] == models_digest(copied, other.map)


def test_patient_embedded_anew_is_stale_until_forced(copied: Cohort) -> None:
    mixture_ids, vectors = read_shard(copied.store, "embeddings/dino/P5/part-000.parquet")
    record = read_record(copied.store, "embeddings/dino/P5")
    assert record is not None
    copied.store.write_json("embeddings/dino/P5/_record.json", {**record.__dict__, "identity": "another"})
    with pytest.raises(StaleOutputError, match="P5 were embedded anew"):
        run_map(CONFIG, copied)
    assert run_map(CONFIG, copied, force=True).units_computed == 1
    assert len(mixture_ids) == len(vectors) == 80


def test_map_without_roles_or_embeddings_names_the_command(tmp_path: Path, mixture: ModuleType) -> None:
    made = mixture.build_cohort(tmp_path, roles={"P5": "final"}, num_cells=20)
    with pytest.raises(MissingInputError, match="ctc-ray split"):
        run_map(CONFIG, made.cohort)
    made.cohort.add_patients({"late": "cartridge"})
    made.cohort.write_patients(made.cohort.patients().with_columns(role=pl.lit("train")))
    with pytest.raises(MissingInputError, match="ctc-ray embed"):
        run_map(CONFIG, made.cohort)


def test_map_of_a_handful_of_cells_is_refused(tmp_path: Path, mixture: ModuleType) -> None:
    made = mixture.build_cohort(tmp_path, roles={"007": "train"}, num_cells=6)
    with pytest.raises(SchemaError, match="at least 10 cells"):
        run_map(CONFIG, made.cohort)


def sliced(unit_cells: int, **settings: Any) -> RunConfig:
    return CONFIG.model_copy(update={"map": CONFIG.map.model_copy(update={"unit_cells": unit_cells, **settings})})


def test_cells_placed_in_slices_equal_those_placed_whole(copied: Cohort) -> None:
    before = cells_of(copied, "P5")
    names = copied.shards(f"{FOLDER}/cells/P5")
    copied.store.delete(f"{FOLDER}/cells/P5/_record.json")
    assert run_map(sliced(9), copied).units_computed == 1
    after = cells_of(copied, "P5")
    assert after["cell_id"].equals(before["cell_id"])
    np.testing.assert_allclose(after["umap_y"], before["umap_y"], atol=1e-3)
    same = (after["cluster"] == before["cluster"]).to_numpy()
    assert np.mean(same) > 0.99  # rounding can move a cell across a border
    assert copied.shards(f"{FOLDER}/cells/P5") == names
    record = read_record(copied.store, f"{FOLDER}/cells/P5")
    assert record is not None
    assert (record.units_computed, record.counts["cells"]) == (18, 160)
    assert not copied.store.list_files(f"{FOLDER}/cells/P5/_parts", recursive=True)


def test_killed_placing_goes_on_with_the_slices_that_are_missing(
    copied: Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied.store.delete(f"{FOLDER}/cells/P5/_record.json")
    calls = 0

    def stop_after_three(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise KeyboardInterrupt
        return place_cells(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr("ctc_ray.latent.stage.place_cells", stop_after_three)
        with pytest.raises(KeyboardInterrupt):
            run_map(sliced(40), copied)
    assert read_record(copied.store, f"{FOLDER}/cells/P5") is None
    assert run_map(sliced(40), copied).units_computed == 1
    record = read_record(copied.store, f"{FOLDER}/cells/P5")
    assert record is not None
    assert (record.units_computed, record.units_reused) == (1, 3)
    assert cells_of(copied, "P5").height == 160


def test_patient_with_unreadable_embeddings_is_set_aside_and_the_others_are_placed(copied: Cohort) -> None:
    for patient in ("P5", "P6"):
        copied.store.delete(f"{FOLDER}/cells/{patient}/_record.json")
    path = "embeddings/dino/P5/part-001.parquet"
    good = copied.store.read_bytes(path)
    copied.store.write_bytes(path, b"no parquet at all" + good[17:-4] + b"XXXX")
    with pytest.raises(TooManyFailuresError, match=r"1 of 2 patients.*'P5'.*Parquet"):
        run_map(CONFIG, copied)
    assert read_record(copied.store, f"{FOLDER}/cells/P6") is not None
    copied.store.delete(f"{FOLDER}/cells/P6/_record.json")
    result = run_map(sliced(50, max_failure_fraction=0.5), copied)
    assert (result.units_computed, result.set_aside) == (1, 1)
    assert read_failures(copied.store, "map")["unit"].to_list() == ["P5"]
    copied.store.write_bytes(path, good)
    assert run_map(CONFIG, copied).set_aside == 0
    assert read_failures(copied.store, "map").is_empty()


def test_fast_map_is_fitted_on_a_sample_and_says_what_it_used(copied: Cohort) -> None:
    given = {"profile": "fast", "name": "quick", "pca_dim": 6, "max_fit_cells": 110}
    config = RunConfig(map=MapConfig.model_validate(given))
    assert run_map(config, copied).units_computed == 6
    summary = copied.store.read_json("latent/dino/quick/map.json")
    assert summary["used"]["placing_epochs"] == 30
    assert summary["used"]["backend"] == "cpu"
    assert summary["num_plane_cells"] == 110
    made, paper = load_map(copied.store, "latent/dino/quick"), load_map(copied.store, FOLDER)
    assert (made.plane.placing_epochs, paper.plane.placing_epochs) == (30, 100)
    assert made.digest() == summary["models"]


def test_map_written_before_the_fast_profile_keeps_its_digest(mapped: Any) -> None:
    latent_map = load_map(mapped.cohort.store, FOLDER)
    with np.load(io.BytesIO(mapped.cohort.store.read_bytes(f"{FOLDER}/models/umap.npz"))) as file:
        arrays = {name: file[name] for name in file.files if name not in ("placing_epochs", "backend")}
    older = io.BytesIO()
    np.savez(older, **arrays)
    mapped.cohort.store.write_bytes("older/models/umap.npz", older.getvalue())
    for name in ("models/clusters.npz", "models/pca.safetensors", "map.json"):
        mapped.cohort.store.write_bytes(f"older/{name}", mapped.cohort.store.read_bytes(f"{FOLDER}/{name}"))
    assert load_map(mapped.cohort.store, "older").digest() == latent_map.digest()
    assert set(CONFIG.map.identity()) == {
        *("name", "encoder", "pca_dim", "umap_neighbors", "umap_min_dist", "umap_seed", "hdbscan_min_cluster_size"),
        *("hdbscan_min_samples", "hdbscan_selection", "hdbscan_epsilon", "max_fit_cells", "cluster_with"),
    }


def test_map_without_test_cells_is_compared_with_the_other(copied: Cohort) -> None:
    pool = sliced(50, name="pool", cluster_with="pool", compare_with="map")
    result = run_map(pool, copied)
    folder = "latent/dino/pool/agreement/map"
    assert result.paths == ("latent/dino/pool", folder)
    found = copied.store.read_json(f"{folder}/agreement.json")
    first, second = (
        pl.concat([map_cells(copied, name, patient) for patient in copied.patient_ids()]) for name in ("pool", "map")
    )
    assert first["cell_id"].equals(second["cell_id"])
    assert found["num_cells"] == first.height == 960
    assert found["adjusted_rand"] == pytest.approx(adjusted_rand_score(first["cluster"], second["cluster"]))
    shared = pl.DataFrame(pl.from_arrow(copied.store.read_table(f"{folder}/shared_cells.parquet")))
    assert shared["num_cells"].sum() == 960
    assert shared.filter("matched")["num_cells"].sum() == pytest.approx(found["equal_share"] * 960)
    sample = pl.DataFrame(pl.from_arrow(copied.store.read_table(f"{folder}/cells.parquet")))
    assert sample.height == found["trustworthiness_cells"] == 960  # fewer than the sample may hold
    assert 0.5 < found["trustworthiness"] <= 1
    record = read_record(copied.store, folder)
    run_map(pool, copied)
    assert read_record(copied.store, folder) == record


def map_cells(cohort: Cohort, name: str, patient: str) -> pl.DataFrame:
    table = cohort.read_columns(f"latent/dino/{name}/cells/{patient}", ["cell_id", "cluster"])
    return pl.DataFrame(pl.from_arrow(table)).sort("cell_id")


def test_comparison_with_itself_or_with_no_map_is_refused(copied: Cohort) -> None:
    with pytest.raises(ConfigError, match="is the map itself"):
        run_map(sliced(50, compare_with="map"), copied)
    with pytest.raises(MissingInputError, match=r"nowhere.*ctc-ray map"):
        run_map(sliced(50, compare_with="nowhere"), copied)


@pytest.mark.ray
def test_map_placed_by_ray_equals_one_process(copied: Cohort, ray_cluster: None) -> None:
    before = {patient: cells_of(copied, patient) for patient in copied.patient_ids()}
    for patient in copied.patient_ids():
        copied.store.delete(f"{FOLDER}/cells/{patient}/_record.json")
    assert run_map(sliced(50), copied).units_computed == 6
    for patient, cells in before.items():
        np.testing.assert_allclose(cells_of(copied, patient)["umap_x"], cells["umap_x"], atol=1e-3)
        record = read_record(copied.store, f"{FOLDER}/cells/{patient}")
        assert record is not None
        assert record.units_computed == 4
        assert record.workers[0]["node"] != "local"


@pytest.mark.ray
def test_cuml_on_a_cluster_without_gpu_is_refused_before_it_waits(copied: Cohort, ray_cluster: None) -> None:
    with pytest.raises(ResourceError, match=r"needs a GPU.*map\.backend=cpu"):
        run_map(sliced(50, name="other", backend="cuml"), copied)
