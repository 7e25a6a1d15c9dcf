"""Import of a processed release: what it reads, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from ctc_ray.errors import ConfigError, LabelError, MissingInputError, SchemaError
from ctc_ray.hil.loop import Trial, run_trial
from ctc_ray.hil.release import fill_background, read_release
from ctc_ray.hil.settings import LoopSettings
from ctc_ray.storage import Store


def _write(folder: Path, seed: int = 0) -> Path:
    """A small release, well-formed."""
    rng = np.random.default_rng(seed)
    sizes = {"labeled_train": 30, "labeled_test": 20, "unlabeled_train": 25}
    umap = {name: rng.normal(0, 3, (num, 2)).astype(np.float32) for name, num in sizes.items()}
    clusters = {name: np.where(points[:, 0] > 0, 1, 0) for name, points in umap.items()}
    for name, num in sizes.items():
        labels = np.full(num, 10) if name.startswith("un") else np.arange(num) % 2
        frame = pl.DataFrame({"case": ["p0"] * num, "label": labels, "cluster": clusters[name]})
        (frame.drop("cluster") if name == "labeled_train" else frame).write_csv(folder / f"df_{name}")
        np.save(folder / f"{name}_pca_features.npy", rng.normal(0, 1, (num, 4)).astype(np.float32))
        np.save(folder / f"{name}_umap_features.npy", umap[name])
    joint = [pl.read_csv(folder / f"df_{name}") for name in ("labeled_test", "unlabeled_train")]
    pl.concat(joint).write_csv(folder / "df_labeled_test_and_unlabeled_train")
    points = np.concatenate([umap["labeled_test"], umap["unlabeled_train"]])
    np.save(folder / "labeled_test_and_unlabeled_train_umap_features.npy", points)
    return folder


def test_read_release_well_formed_gives_a_problem_with_clusters_of_the_nearest_points(tmp_path: Path) -> None:
    release = read_release(Store(_write(tmp_path)))
    problem = release.problem()
    assert (len(problem.train), len(problem.test)) == (30, 20)
    known = release.umap["labeled_test_and_unlabeled_train"]
    clusters = release.tables["labeled_test_and_unlabeled_train"]["cluster"].to_numpy()
    for row, point in enumerate(release.umap["labeled_train"]):
        assert problem.train.clusters[row] == clusters[np.argmin(((known - point) ** 2).sum(1))]


def test_read_release_missing_files_lists_them(tmp_path: Path) -> None:
    _write(tmp_path)
    (tmp_path / "df_labeled_test").unlink()
    (tmp_path / "labeled_train_umap_features.npy").unlink()
    with pytest.raises(MissingInputError, match=r"df_labeled_test, labeled_train_umap_features\.npy missing"):
        read_release(Store(tmp_path))


def test_read_release_unequal_lengths_names_the_pair(tmp_path: Path) -> None:
    path = _write(tmp_path) / "labeled_test_pca_features.npy"
    np.save(path, np.load(path)[:-1])
    with pytest.raises(SchemaError, match=r"df_labeled_test has 20 rows and labeled_test_pca_features\.npy 19"):
        read_release(Store(tmp_path))


def test_read_release_nan_feature_names_file_and_row(tmp_path: Path) -> None:
    path = _write(tmp_path) / "labeled_train_pca_features.npy"
    features = np.load(path)
    features[7, 2] = np.nan
    np.save(path, features)
    with pytest.raises(SchemaError, match=r"labeled_train_pca_features\.npy: 1 rows are not finite, the first is 7"):
        read_release(Store(tmp_path))


@pytest.mark.parametrize(("name", "label"), [("labeled_train", 2), ("labeled_test", 10), ("unlabeled_train", 1)])
def test_read_release_label_outside_its_kind_raises(tmp_path: Path, name: str, label: int) -> None:
    path = _write(tmp_path) / f"df_{name}"
    frame = pl.read_csv(path)
    frame.with_columns(
        pl.when(pl.int_range(pl.len()) == 4).then(label).otherwise(pl.col("label")).alias("label")
    ).write_csv(path)
    with pytest.raises(LabelError, match=f"df_{name}: label {label}"):
        read_release(Store(tmp_path))


def test_read_release_joint_table_in_another_order_raises(tmp_path: Path) -> None:
    path = _write(tmp_path) / "labeled_test_and_unlabeled_train_umap_features.npy"
    np.save(path, np.load(path)[::-1])
    with pytest.raises(SchemaError, match="not the UMAP of test, then unlabelled"):
        read_release(Store(tmp_path))


def test_read_release_cell_in_two_splits_raises(tmp_path: Path) -> None:
    _write(tmp_path)
    train, test = tmp_path / "labeled_train_pca_features.npy", tmp_path / "labeled_test_pca_features.npy"
    features = np.load(test)
    features[3] = np.load(train)[11]
    np.save(test, features)
    with pytest.raises(SchemaError, match=r"1 cells have the same features in two splits.*row 11 of labeled_train"):
        read_release(Store(tmp_path))


def test_read_release_table_without_clusters_names_the_column(tmp_path: Path) -> None:
    path = _write(tmp_path) / "df_labeled_test"
    pl.read_csv(path).drop("cluster").write_csv(path)
    with pytest.raises(SchemaError, match="column 'cluster': missing"):
        read_release(Store(tmp_path))


def test_read_release_one_class_of_labels_raises(tmp_path: Path) -> None:
    path = _write(tmp_path) / "df_labeled_train"
    pl.read_csv(path).with_columns(pl.lit(0).alias("label")).write_csv(path)
    with pytest.raises(LabelError, match="all 30 labels are non-CTCs"):
        read_release(Store(tmp_path)).problem()


@pytest.mark.parametrize("scenario", ["limited-global", "limited-local", "rare-positive"])
def test_release_cluster_of_test_cells_alone_is_scored_and_never_searched(tmp_path: Path, scenario: str) -> None:
    _write(tmp_path, 4)
    for name in ("labeled_test", "labeled_test_and_unlabeled_train"):
        path = tmp_path / f"df_{name}"
        alone = pl.when(pl.int_range(pl.len()) < 6).then(7).otherwise(pl.col("cluster"))
        pl.read_csv(path).with_columns(alone.alias("cluster")).write_csv(path)
    points = np.load(tmp_path / "labeled_test_and_unlabeled_train_umap_features.npy")
    points[:6] += 90.0  # far from every training cell
    np.save(tmp_path / "labeled_test_and_unlabeled_train_umap_features.npy", points)
    np.save(tmp_path / "labeled_test_umap_features.npy", points[:20])
    problem = read_release(Store(tmp_path)).problem()
    assert set(problem.train.clusters.tolist()) == {0, 1}
    settings = LoopSettings(initial=10, per_loop=5, loops=2, mc_splits=5, budget_s=9.0)
    main = 0 if scenario == "limited-local" else None
    for strategy in ("random", "cluster-f1", "cluster-herding"):
        rows = run_trial(problem, Trial(scenario, strategy, main, 1, 3), settings)
        alone_rows = [row for row in rows if row["cluster"] == 7]
        assert [(row["loop"], row["split"]) for row in alone_rows] == [(0, "test"), (1, "test"), (2, "test")]
        assert 7 not in {row["searched_cluster"] for row in rows}
    if scenario != "limited-global":
        with pytest.raises(ConfigError, match="7"):
            run_trial(problem, Trial(scenario, "cluster-f1", 7, 1, 3), settings)


def test_release_smaller_than_the_first_labels_and_a_loop_states_the_numbers(tmp_path: Path) -> None:
    problem = read_release(Store(_write(tmp_path))).problem()
    trial = Trial("limited-global", "random", None, 1, 3)
    with pytest.raises(ConfigError, match=r"30 labelled cells.*100 initial labels and 4 loops of 100 need 500"):
        run_trial(problem, trial, LoopSettings())
    rows = run_trial(problem, trial, LoopSettings(initial=12, per_loop=40, loops=1))
    assert {row["num_train"] for row in rows} == {12, 30}  # a last loop takes what is left


@pytest.mark.parametrize("name", ["labeled_test_pca", "unlabeled_train_pca", "labeled_train_umap"])
def test_read_release_value_that_is_not_finite_names_the_file(tmp_path: Path, name: str) -> None:
    path = _write(tmp_path) / f"{name}_features.npy"
    values = np.load(path)
    values[2, 0] = np.inf
    np.save(path, values)
    with pytest.raises(SchemaError, match=rf"{name}_features\.npy: 1 rows are not finite, the first is 2"):
        read_release(Store(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("labeled_train_umap_features.npy", "df_labeled_train has 30 rows and labeled_train_umap_features.npy 29"),
        ("df_unlabeled_train", "df_unlabeled_train has 24 rows and unlabeled_train_pca_features.npy 25"),
        ("df_labeled_test_and_unlabeled_train", "df_labeled_test_and_unlabeled_train"),
    ],
)
def test_read_release_one_row_less_in_a_file_is_refused(tmp_path: Path, name: str, message: str) -> None:
    path = _write(tmp_path) / name
    if name.endswith("npy"):
        np.save(path, np.load(path)[:-1])
    else:
        pl.read_csv(path)[:-1].write_csv(path)
    with pytest.raises(SchemaError, match=re.escape(message)):
        read_release(Store(tmp_path))


def test_release_one_class_of_test_labels_raises(tmp_path: Path) -> None:
    path = _write(tmp_path) / "df_labeled_test"
    pl.read_csv(path).with_columns(pl.lit(1).alias("label")).write_csv(path)
    with pytest.raises(LabelError, match="all 20 labels are CTCs"):
        read_release(Store(tmp_path)).problem()


def test_fill_background_moves_only_background_cells() -> None:
    known = np.array([[0.0, 0.0], [5.0, 5.0], [9.0, 9.0]])
    clusters = np.array([-1, 3, -1, 1])
    filled = fill_background(known, np.array([1, 2, -1]), np.array([[1.0, 0], [0, 0], [8, 8], [9, 9]]), clusters)
    assert filled.tolist() == [1, 3, 2, 1]
    assert fill_background(known, np.full(3, -1), known, np.array([-1, 0, 1])).tolist() == [-1, 0, 1]
