"""Import of a processed release: what it reads, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from ctc_ray.errors import LabelError, MissingInputError, SchemaError
from ctc_ray.hil.release import fill_background, read_release
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


def test_fill_background_moves_only_background_cells() -> None:
    known = np.array([[0.0, 0.0], [5.0, 5.0], [9.0, 9.0]])
    clusters = np.array([-1, 3, -1, 1])
    filled = fill_background(known, np.array([1, 2, -1]), np.array([[1.0, 0], [0, 0], [8, 8], [9, 9]]), clusters)
    assert filled.tolist() == [1, 3, 2, 1]
    assert fill_background(known, np.full(3, -1), known, np.array([-1, 0, 1])).tolist() == [-1, 0, 1]
