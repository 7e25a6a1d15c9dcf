"""The train stage: what it learns from, what it pins, what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import polars as pl
import pytest

from ctc_ray.classify import load_classifier
from ctc_ray.classify.baseline import run_baseline
from ctc_ray.classify.labelled import check_no_leak, labelled_cells
from ctc_ray.classify.metrics import ctc_scores
from ctc_ray.classify.stage import plan_train, run_train
from ctc_ray.cohort import Cohort
from ctc_ray.config import LabelsConfig, RunConfig, TrainConfig
from ctc_ray.errors import LabelError, MissingInputError, RoleLeakError, StaleOutputError
from ctc_ray.labels.simulated import simulate_expert
from ctc_ray.labels.transfer import import_labels
from ctc_ray.latent.embeddings import read_selected
from ctc_ray.records import State, read_record

CONFIG = RunConfig(labels=LabelsConfig(per_patient=80))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, mixture: ModuleType) -> Any:
    made = mixture.build_cohort(tmp_path_factory.mktemp("trained"), num_cells=160, spread=4.0)
    simulate_expert(CONFIG, made.cohort, str(made.truth_path))
    mixture.write_map(made.cohort, made.kinds)
    run_train(CONFIG, made.cohort)
    return made


@pytest.fixture
def copied(trained: Any, tmp_path: Path) -> Cohort:
    shutil.copytree(trained.cohort.store.local_path(), tmp_path / "cohort")
    return Cohort.open(str(tmp_path / "cohort"))


def metrics_of(cohort: Cohort, name: str = "svm") -> pl.DataFrame:
    return pl.DataFrame(pl.from_arrow(cohort.store.read_table(f"classifiers/{name}/metrics.parquet")))


def test_metrics_are_those_of_the_saved_classifier_on_its_labels(trained: Any) -> None:
    cells = labelled_cells(trained.cohort).of("test")
    ids, vectors = read_selected(trained.cohort, "dino", ["P4"], cells["cell_id"].to_list())
    truth = cells.sort("cell_id")["is_ctc"].to_numpy()
    assert ids == cells.sort("cell_id")["cell_id"].to_list()
    scores = ctc_scores(truth, load_classifier(trained.cohort, "svm").predict(vectors))
    row = (
        metrics_of(trained.cohort).filter((pl.col("split") == "test") & pl.col("cluster").is_null()).row(0, named=True)
    )
    assert {name: row[name] for name in scores} == scores
    assert row["f1"] > 0.6


def test_metrics_hold_every_cluster_of_both_scored_roles(trained: Any) -> None:
    metrics = metrics_of(trained.cohort)
    for split in ("validation", "test"):
        assert metrics.filter(pl.col("split") == split)["cluster"].to_list() == [None, -1, 0, 1, 2]
    assert metrics.filter(pl.col("f1").is_null())["reason"].null_count() == 0


def test_record_pins_encoder_map_and_labels(trained: Any) -> None:
    record = read_record(trained.cohort.store, "classifiers/svm")
    assert record is not None
    assert (record.config["encoder"], record.config["map"]) == ("dino", "map")
    assert record.inputs["labels"] == labelled_cells(trained.cohort).digest
    assert record.counts["train_cells"] == labelled_cells(trained.cohort).of("train").height


def test_training_uses_one_detection_of_a_physical_cell(trained: Any) -> None:
    frame = labelled_cells(trained.cohort).frame
    assert frame.select("patient", "physical_id").is_duplicated().sum() == 0
    assert set(frame["role"]) == {"train", "validation", "test"}


def test_second_run_reuses_the_classifier(copied: Cohort) -> None:
    before = copied.store.read_bytes("classifiers/svm/model.skops")
    assert plan_train(CONFIG, copied)[0].state is State.COMPLETE
    assert run_train(CONFIG, copied).units_reused == 1
    assert copied.store.read_bytes("classifiers/svm/model.skops") == before


def test_new_labels_make_the_classifier_stale_and_labels_of_other_roles_do_not(copied: Cohort, tmp_path: Path) -> None:
    file = tmp_path / "more.csv"
    cells = copied.read_columns("cells/P6", ["cell_id"])["cell_id"].to_pylist()[:5]
    pl.DataFrame({"cell_id": cells, "label": ["ctc"] * 5}).write_csv(file)
    import_labels(copied, file, reader="anna")
    assert plan_train(CONFIG, copied)[0].state is State.COMPLETE
    known = set(labelled_cells(copied).frame["cell_id"])
    new = [name for name in copied.read_columns("cells/007", ["cell_id"])["cell_id"].to_pylist() if name not in known]
    pl.DataFrame({"cell_id": new[:5], "label": ["non_ctc"] * 5}).write_csv(file)
    import_labels(copied, file, reader="anna")
    assert plan_train(CONFIG, copied)[0].state is State.STALE
    with pytest.raises(StaleOutputError, match="--force"):
        run_train(CONFIG, copied)
    assert run_train(CONFIG, copied, force=True).units_computed == 1


def test_other_map_makes_the_classifier_stale(copied: Cohort, trained: Any, mixture: ModuleType) -> None:
    mixture.write_map(copied, trained.kinds, version="2")
    assert plan_train(CONFIG, copied)[0].state is State.STALE


def test_unsure_cells_are_left_out(copied: Cohort, tmp_path: Path) -> None:
    before = labelled_cells(copied)
    name, label = before.of("train").select("cell_id", "label").row(0)
    file = tmp_path / "unsure.csv"
    pl.DataFrame({"cell_id": [name], "label": ["artefact" if label == "ctc" else "ctc"]}).write_csv(file)
    import_labels(copied, file, reader="second reader")  # a tie is unsure
    after = labelled_cells(copied)
    assert name not in after.frame["cell_id"]
    assert after.digest != before.digest


def test_missing_labels_map_or_classifier_name_the_command(tmp_path: Path, mixture: ModuleType) -> None:
    made = mixture.build_cohort(tmp_path, num_cells=20)
    with pytest.raises(MissingInputError, match="ctc-ray map"):
        run_train(CONFIG, made.cohort)
    mixture.write_map(made.cohort, made.kinds)
    with pytest.raises(LabelError, match=r"no labelled cell.*import-labels"):
        run_train(CONFIG, made.cohort)
    with pytest.raises(MissingInputError, match="ctc-ray train"):
        load_classifier(made.cohort, "svm")


def test_one_class_alone_leaves_no_classifier(copied: Cohort, tmp_path: Path) -> None:
    for path in copied.store.list_files("labels"):
        copied.store.delete(path)
    file = tmp_path / "one.csv"
    cells = copied.read_columns("cells/007", ["cell_id"])["cell_id"].to_pylist()[:9]
    pl.DataFrame({"cell_id": cells, "label": ["non_ctc"] * 9}).write_csv(file)
    import_labels(copied, file, reader="anna")
    config = CONFIG.model_copy(update={"train": TrainConfig(name="other")})
    with pytest.raises(LabelError, match="there are 0 CTCs"):
        run_train(config, copied)
    assert read_record(copied.store, "classifiers/other") is None


def test_comparison_of_models_is_made_beside_a_finished_classifier_and_kept(
    copied: Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "ctc_ray.classify.model_comparison.MODELS",
        {"svm": {"C": (0.1, 1.0)}, "logistic_regression": {"C": (1.0,)}, "nearest_neighbours": {"n_neighbors": (5,)}},
    )
    comparing = CONFIG.model_copy(update={"train": TrainConfig(compare_models=True)})
    before = read_record(copied.store, "classifiers/svm")
    assert before is not None
    assert plan_train(comparing, copied)[0].state is State.ABSENT
    assert run_train(comparing, copied).units_computed == 1
    table = pl.DataFrame(pl.from_arrow(copied.store.read_table("classifiers/svm/model_comparison.parquet")))
    assert table.group_by("model", "tuned").len().sort("model", "tuned")["len"].to_list() == [2] * 6
    assert set(table["num_folds"]) == {2}  # two training patients
    test = labelled_cells(copied).of("test")
    assert set(table.filter(pl.col("split") == "test")["num_cells"]) == {test.height}
    after = read_record(copied.store, "classifiers/svm")
    assert after is not None
    assert after.identity == before.identity
    assert (run_train(comparing, copied).units_reused, run_train(CONFIG, copied).units_reused) == (1, 1)
    assert copied.store.exists("classifiers/svm/model_comparison.parquet")


def test_undefined_scores_follow_the_paper_where_asked(copied: Cohort, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"train": TrainConfig(name="paper", undefined="paper")})
    assert run_train(config, copied).units_computed == 1
    keys = ["split", "cluster"]
    paper, strict = metrics_of(copied, "paper"), metrics_of(copied)
    both = paper.join(strict, on=keys, nulls_equal=True, suffix="_null")
    assert both.height == paper.height
    labelled = both.filter(pl.col("num_cells") > 0)
    for name in ("f1", "recall", "precision"):
        assert (
            labelled.filter(pl.col(f"{name}_null").is_not_null())
            .select((pl.col(name) == pl.col(f"{name}_null")).all())
            .item()
        )
        assert labelled[name].null_count() == 0
    without_ctc = labelled.filter((pl.col("num_ctc") == 0) & pl.col("cluster").is_not_null())
    assert without_ctc.height > 0
    assert without_ctc["recall_null"].null_count() == without_ctc.height
    assert set(without_ctc["recall"]) == {0.0}
    assert set(without_ctc.filter(pl.col("f1_null").is_null())["f1"]) <= {1.0}


def test_cell_or_patient_in_two_roles_is_a_leak() -> None:
    rows = {"cell_id": ["a", "b"], "patient": ["p", "p"], "physical_id": ["a", "b"], "role": ["train", "test"]}
    with pytest.raises(RoleLeakError, match="patient p has the roles test and train"):
        check_no_leak(pl.DataFrame(rows))
    with pytest.raises(RoleLeakError, match="cell a has the roles"):
        check_no_leak(pl.DataFrame({**rows, "patient": ["p", "q"], "cell_id": ["a", "a"]}))
    check_no_leak(pl.DataFrame({**rows, "patient": ["p", "q"], "physical_id": ["a", "a"]}))


def test_baseline_on_pixels_scores_the_same_cells(copied: Cohort) -> None:
    result = run_baseline(CONFIG, copied)
    assert (result.units_computed, run_baseline(CONFIG, copied).units_reused) == (1, 1)
    pixels, encoder = metrics_of(copied, "raw_pixels"), metrics_of(copied)
    assert pixels.select("split", "cluster", "num_cells", "num_ctc").equals(
        encoder.select("split", "cluster", "num_cells", "num_ctc")
    )
    assert np.isfinite(pixels.filter(pl.col("cluster").is_null())["f1"].to_numpy()).all()


@pytest.mark.ray
def test_training_in_ray_equals_one_process(copied: Cohort, ray_cluster: None) -> None:
    before = metrics_of(copied)
    copied.store.delete("classifiers/svm/_record.json")
    assert run_train(CONFIG, copied).units_computed == 1
    assert metrics_of(copied).equals(before)
    record = read_record(copied.store, "classifiers/svm")
    assert record is not None
    assert record.workers[0]["node"] != "local"


@pytest.mark.ray
def test_error_of_a_worker_comes_out_as_it_was_raised(copied: Cohort, tmp_path: Path, ray_cluster: None) -> None:
    for path in copied.store.list_files("labels"):
        copied.store.delete(path)
    file = tmp_path / "one.csv"
    cells = copied.read_columns("cells/007", ["cell_id"])["cell_id"].to_pylist()[:9]
    pl.DataFrame({"cell_id": cells, "label": ["ctc"] * 9}).write_csv(file)
    import_labels(copied, file, reader="anna")
    with pytest.raises(LabelError, match="9 CTCs and 0 others") as caught:
        run_train(CONFIG.model_copy(update={"train": TrainConfig(name="other")}), copied)
    assert type(caught.value) is LabelError
    assert "\n" not in str(caught.value)
