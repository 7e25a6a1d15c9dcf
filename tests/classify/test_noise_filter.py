"""The noise filter: what it learns from, that it comes back the same, and its scores of every patient."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import polars as pl
import pytest

from ctc_ray.classify.noise_filter import NOISE_SCHEMA, NoiseFilter, choose_cells
from ctc_ray.classify.noise_stage import load_noise_filter, plan_filter, plan_filter_noise, run_filter_noise
from ctc_ray.cohort import Cohort
from ctc_ray.config import FilterNoiseConfig, RunConfig
from ctc_ray.errors import LabelError, MissingInputError, StaleOutputError
from ctc_ray.labels.transfer import import_labels
from ctc_ray.latent.embeddings import read_selected
from ctc_ray.records import State, read_record

CONFIG = RunConfig(filter_noise=FilterNoiseConfig(per_class=30, pca_dim=6, unit_cells=50))
FOLDER = "classifiers/svm/noise"
LABEL_OF_KIND = {"ctc": "ctc", "leukocyte": "non_ctc", "point_event": "non_ctc", "smear": "artefact"}


def label(cohort: Cohort, kinds: dict[str, str], patients: list[str], path: Path) -> None:
    names = [
        name
        for patient in patients
        for name in cohort.read_columns(cohort.cells(patient), ["cell_id"])["cell_id"].to_pylist()
    ]
    rows = {"cell_id": names, "label": [LABEL_OF_KIND[kinds[name]] for name in names]}
    pl.DataFrame(rows).write_csv(path / "labels.csv")
    import_labels(cohort, path / "labels.csv", reader="anna")


@pytest.fixture(scope="module")
def filtered(tmp_path_factory: pytest.TempPathFactory, mixture: ModuleType) -> Any:
    path = tmp_path_factory.mktemp("filtered")
    made = mixture.build_cohort(path, num_cells=120)
    label(made.cohort, made.kinds, ["007", "12", "P4"], path)
    run_filter_noise(CONFIG, made.cohort)
    return made


@pytest.fixture
def copied(filtered: Any, tmp_path: Path) -> Cohort:
    shutil.copytree(filtered.cohort.store.local_path(), tmp_path / "cohort")
    return Cohort.open(str(tmp_path / "cohort"))


def scores_of(cohort: Cohort, patient: str) -> pl.DataFrame:
    columns = NOISE_SCHEMA.names
    return pl.DataFrame(pl.from_arrow(cohort.read_columns(f"{FOLDER}/{patient}", columns))).sort("cell_id")


def labelled(num_noise: int, num_clean: int) -> pl.DataFrame:
    names = [f"n{i:03d}" for i in range(num_noise)] + [f"c{i:03d}" for i in range(num_clean)]
    labels = ["artefact"] * num_noise + [("ctc", "non_ctc")[i % 2] for i in range(num_clean)]
    return pl.DataFrame({"cell_id": names, "patient": "p", "label": labels})


def test_as_many_artefacts_as_others_are_drawn_whatever_the_row_order() -> None:
    frame = labelled(50, 400)
    drawn = choose_cells(frame, per_class=30, seed=1)
    assert drawn["is_noise"].sum() == 30 == drawn.height // 2
    assert (drawn["is_noise"] == (drawn["label"] == "artefact")).all()
    assert drawn["cell_id"].is_sorted()
    assert drawn.equals(choose_cells(frame.reverse(), per_class=30, seed=1))
    assert not drawn.equals(choose_cells(frame, per_class=30, seed=2))
    assert choose_cells(frame, per_class=400, seed=1).height == 100


@pytest.mark.parametrize(("noise", "clean"), [(9, 400), (400, 9), (0, 20)])
def test_too_few_cells_of_a_kind_are_refused_with_both_counts(noise: int, clean: int) -> None:
    with pytest.raises(LabelError, match=rf"there are {noise} and {clean}: label more"):
        choose_cells(labelled(noise, clean), per_class=400, seed=1)


def test_filter_has_a_pca_of_its_own_and_comes_back_identical() -> None:
    rng = np.random.default_rng(0)
    is_noise = np.arange(80) % 2 == 0
    vectors = (rng.normal(size=(80, 10)) + 2 * is_noise[:, None]).astype(np.float32)
    made = NoiseFilter.fit(vectors, is_noise, pca_dim=4)
    centred = vectors - vectors.mean(axis=0)
    _, _, axes = np.linalg.svd(centred.astype(np.float64), full_matrices=False)
    np.testing.assert_allclose(np.abs(made.classifier.pca.components), np.abs(axes[:4]), atol=1e-4)
    loaded = NoiseFilter.from_bytes(made.to_bytes())
    new = rng.normal(size=(30, 10)).astype(np.float32)
    np.testing.assert_array_equal(loaded.probability(new), made.probability(new))
    table = loaded.table([f"{i}" for i in range(30)], new)
    assert table.schema == NOISE_SCHEMA
    assert table["is_noise"].to_pylist() == [p >= 0.5 for p in made.probability(new).tolist()]


def test_every_embedded_cell_is_scored_by_the_saved_filter(filtered: Any) -> None:
    saved = load_noise_filter(filtered.cohort, "svm")
    for patient in filtered.cohort.patient_ids():
        scores = scores_of(filtered.cohort, patient)
        ids, vectors = read_selected(filtered.cohort, "dino", [patient], filtered.kinds.keys())
        assert scores["cell_id"].to_list() == ids
        np.testing.assert_allclose(scores["probability"].to_numpy(), saved.probability(vectors), atol=1e-6)
        embedded = [path.rsplit("/", 1)[-1] for path in filtered.cohort.shards(f"embeddings/dino/{patient}")]
        assert [path.rsplit("/", 1)[-1] for path in filtered.cohort.shards(f"{FOLDER}/{patient}")] == embedded


def test_artefacts_of_patients_that_were_not_labelled_are_found(filtered: Any) -> None:
    scores = scores_of(filtered.cohort, "P5").with_columns(
        truth=pl.col("cell_id").replace_strict(filtered.kinds) == "smear"
    )
    assert np.mean((scores["is_noise"] == scores["truth"]).to_numpy()) > 0.9


def test_filter_learns_from_training_patients_alone(filtered: Any) -> None:
    record = read_record(filtered.cohort.store, FOLDER)
    assert record is not None
    assert set(record.inputs) == {"labels", "embeddings/007", "embeddings/12"}
    assert record.counts["noise"] == record.counts["clean"] <= 30


def test_second_run_reuses_and_a_new_patient_is_scored_alone(copied: Cohort, mixture: ModuleType) -> None:
    result = run_filter_noise(CONFIG, copied)
    assert (result.units_computed, result.units_reused) == (0, 6)
    copied.add_patients({"new": "cartridge"})
    mixture.write_patient(copied, "new", num_cells=30, seed=8, spread=1.6)
    assert [row.unit for row in plan_filter_noise(CONFIG, copied) if row.state is State.ABSENT] == ["new"]
    result = run_filter_noise(CONFIG, copied)
    assert (result.units_computed, result.units_reused, result.counts["cells"]) == (1, 6, 30)


def test_other_labels_make_the_filter_stale_until_forced(copied: Cohort, tmp_path: Path) -> None:
    drawn = plan_filter(CONFIG.filter_noise, copied).cells
    contradicted = drawn.filter("is_noise")["cell_id"][0]  # a tie is unsure, which is no label to learn from
    pl.DataFrame({"cell_id": [contradicted], "label": ["ctc"]}).write_csv(tmp_path / "other.csv")
    import_labels(copied, tmp_path / "other.csv", reader="berta")
    before = scores_of(copied, "P5")
    with pytest.raises(StaleOutputError, match="--force"):
        run_filter_noise(CONFIG, copied)
    assert run_filter_noise(CONFIG, copied, force=True).units_computed == 6
    assert not scores_of(copied, "P5").equals(before)


def test_filter_without_labels_or_before_training_names_what_is_missing(tmp_path: Path, mixture: ModuleType) -> None:
    made = mixture.build_cohort(tmp_path, num_cells=20)
    with pytest.raises(LabelError, match="no labelled cell"):
        run_filter_noise(CONFIG, made.cohort)
    with pytest.raises(MissingInputError, match="ctc-ray filter-noise"):
        load_noise_filter(made.cohort, "svm")


@pytest.mark.ray
def test_noise_scored_by_ray_equals_one_process(copied: Cohort, ray_cluster: None) -> None:
    before = scores_of(copied, "P5")
    for patient in ("P5", "P6"):
        copied.store.delete(f"{FOLDER}/{patient}/_record.json")
    assert run_filter_noise(CONFIG, copied).units_computed == 2
    after = scores_of(copied, "P5")
    assert after.drop("probability").equals(before.drop("probability"))
    np.testing.assert_allclose(after["probability"], before["probability"], atol=1e-6)
    record = read_record(copied.store, f"{FOLDER}/P5")
    assert record is not None
    assert record.units_computed == 4
    assert record.workers[0]["node"] != "local"
