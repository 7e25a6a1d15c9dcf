"""Import of the paper's processed release: four CSV files without an extension, seven arrays."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from scipy.spatial import cKDTree

from ctc_ray.errors import LabelError, MissingInputError, SchemaError
from ctc_ray.hil.pools import BACKGROUND, Ints, Problem, cell_set
from ctc_ray.storage import Store

UNKNOWN_LABEL = 10
"""Label of a cell that no expert has looked at."""
_PARTS = ("labeled_train", "labeled_test", "unlabeled_train")
_JOINT = "labeled_test_and_unlabeled_train"
TABLES = tuple(f"df_{name}" for name in (*_PARTS, _JOINT))
ARRAYS = (
    *(f"{name}_pca_features.npy" for name in _PARTS),
    *(f"{name}_umap_features.npy" for name in (*_PARTS, _JOINT)),
)


@dataclass(frozen=True, eq=False)
class Release:
    """A processed release as it lies on disk, checked.

    Attributes:
        tables: name (`labeled_train`, `labeled_test`, `unlabeled_train`, `labeled_test_and_unlabeled_train`) -> frame.
        pca: name -> (N, D) PCA scores.
        umap: name -> (N, 2) UMAP coordinates.
    """

    tables: dict[str, pl.DataFrame]
    pca: dict[str, npt.NDArray[Any]]
    umap: dict[str, npt.NDArray[Any]]

    def train_clusters(self) -> Ints:
        """Cluster of each labelled training cell: that of its nearest neighbour on the UMAP among test and unlabelled cells.

        Source: reference implementation, `data_processor`.
        """
        return nearest_clusters(
            self.umap[_JOINT], self.tables[_JOINT]["cluster"].to_numpy(), self.umap["labeled_train"]
        )

    def problem(self) -> Problem:
        """Arrays that a simulation works on; cell ids are the row numbers of the release's tables."""
        clusters = self.train_clusters()
        sets = []
        for name, prefix, of_set in (
            ("labeled_train", "train", clusters),
            ("labeled_test", "test", self.tables["labeled_test"]["cluster"].to_numpy()),
        ):
            labels = self.tables[name]["label"].to_numpy()
            ids = [f"{prefix}-{row:06d}" for row in range(len(labels))]
            sets.append(cell_set(f"df_{name}", ids, self.pca[name], labels, of_set))
        joint_umap, joint = self.umap[_JOINT], self.tables[_JOINT]["cluster"].to_numpy()
        filled = fill_background(joint_umap, joint, self.umap["labeled_train"], clusters)
        return Problem(sets[0], filled, sets[1])


def nearest_clusters(known_umap: npt.NDArray[Any], known_clusters: npt.NDArray[Any], umap: npt.NDArray[Any]) -> Ints:
    """Cluster of the nearest known point, for each point (N, 2)."""
    _, nearest = cKDTree(known_umap.astype(np.float64)).query(umap.astype(np.float64))
    found: Ints = known_clusters[nearest].astype(np.int64)
    return found


def fill_background(
    known_umap: npt.NDArray[Any], known_clusters: npt.NDArray[Any], umap: npt.NDArray[Any], clusters: Ints
) -> Ints:
    """Move background cells to the cluster of the nearest known cell that has one.

    Args:
        known_umap: (M, 2) coordinates of the clustered cells.
        known_clusters: (M,) their clusters, -1 background; where all are, nothing is moved.
        umap: (N, 2) coordinates of the cells to look at.
        clusters: (N,) their clusters.

    Source: reference implementation, `sim_hil_1_logic`.
    """
    inside, moved = known_clusters != BACKGROUND, clusters == BACKGROUND
    if not inside.any() or not moved.any():
        return clusters
    filled = clusters.copy()
    filled[moved] = nearest_clusters(known_umap[inside], known_clusters[inside], umap[moved])
    return filled


def read_release(store: Store) -> Release:
    """Read and check a release folder.

    Raises:
        MissingInputError: a file is missing; the message lists all that are.
        SchemaError: lengths, columns, values or the joint arrays are not as the layout demands.
        LabelError: a label is not 0 or 1 (labelled) or not 10 (unlabelled).
    """
    missing = [name for name in (*TABLES, *ARRAYS) if not store.exists(name)]
    if missing:
        raise MissingInputError(
            f"{store.describe()} is no processed release: {', '.join(missing)} missing. It needs the CSV files (no extension) "
            f"{', '.join(TABLES)} and the arrays {', '.join(ARRAYS)}"
        )
    tables = {name.removeprefix("df_"): _read_csv(store, name) for name in TABLES}
    pca = {name: _read_array(store, f"{name}_pca_features.npy") for name in _PARTS}
    umap = {name: _read_array(store, f"{name}_umap_features.npy") for name in (*_PARTS, _JOINT)}
    release = Release(tables, pca, umap)
    _check_lengths(release, store)
    _check_labels(release, store)
    _check_joint(release, store)
    _check_duplicates(release, store)
    return release


def _read_csv(store: Store, name: str) -> pl.DataFrame:
    try:
        return pl.read_csv(io.BytesIO(store.read_bytes(name)), infer_schema_length=None)
    except (pl.exceptions.PolarsError, UnicodeDecodeError) as error:
        raise SchemaError(f"{store.describe(name)} is not a CSV table: {error}") from error


def _read_array(store: Store, name: str) -> npt.NDArray[Any]:
    try:
        array: npt.NDArray[Any] = np.load(io.BytesIO(store.read_bytes(name)), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise SchemaError(f"{store.describe(name)} is not a NumPy array without pickled objects: {error}") from error
    if array.ndim != 2 or array.dtype.kind != "f":
        raise SchemaError(
            f"{store.describe(name)}: {array.dtype} {array.shape}, expected a table of floats (cells, features)"
        )
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if len(bad):
        raise SchemaError(
            f"{store.describe(name)}: {len(bad)} rows are not finite, the first is {bad[0]}: embed these cells again"
        )
    return array


def _check_lengths(release: Release, store: Store) -> None:
    for name, table in release.tables.items():
        for kind, arrays in (("pca", release.pca), ("umap", release.umap)):
            if name in arrays and len(arrays[name]) != table.height:
                raise SchemaError(
                    f"{store.describe()}: df_{name} has {table.height} rows and {name}_{kind}_features.npy {len(arrays[name])}: "
                    "they must describe the same cells"
                )
    widths = {name: array.shape[1] for name, array in release.pca.items()}
    if len(set(widths.values())) > 1 or any(array.shape[1] != 2 for array in release.umap.values()):
        raise SchemaError(f"{store.describe()}: PCA widths {widths} differ, or a UMAP array is not two columns wide")


def _check_labels(release: Release, store: Store) -> None:
    needed = {
        "labeled_train": ["label"],
        "labeled_test": ["label", "cluster"],
        "unlabeled_train": ["label", "cluster"],
        _JOINT: ["cluster"],
    }
    for name, columns in needed.items():
        table = release.tables[name]
        for column in columns:
            where = f"{store.describe(f'df_{name}')}, column {column!r}"
            if column not in table.columns:
                raise SchemaError(f"{where}: missing; the table has {', '.join(table.columns)}")
            if not table[column].dtype.is_integer() or table[column].null_count():
                raise SchemaError(f"{where}: expected whole numbers without gaps, got {table[column].dtype}")
    for name in _PARTS:
        allowed = (UNKNOWN_LABEL,) if name.startswith("unlabeled") else (0, 1)
        odd = sorted(set(release.tables[name]["label"]) - set(allowed))
        if odd:
            raise LabelError(
                f"{store.describe(f'df_{name}')}: label {odd[0]} is none of {', '.join(map(str, allowed))}"
            )


def _check_joint(release: Release, store: Store) -> None:
    order = ("labeled_test", "unlabeled_train")
    clusters = np.concatenate([release.tables[name]["cluster"].to_numpy() for name in order])
    umap = np.concatenate([release.umap[name] for name in order])
    joint = release.tables[_JOINT]["cluster"].to_numpy()
    if len(clusters) != len(joint) or not np.array_equal(clusters, joint):
        raise SchemaError(
            f"{store.describe(f'df_{_JOINT}')}: its clusters are not those of test, then unlabelled cells"
        )
    if not np.array_equal(umap, release.umap[_JOINT]):
        raise SchemaError(
            f"{store.describe(f'{_JOINT}_umap_features.npy')}: not the UMAP of test, then unlabelled cells"
        )


def _check_duplicates(release: Release, store: Store) -> None:
    features = np.concatenate([release.pca[name] for name in _PARTS])
    part = np.repeat(np.arange(len(_PARTS)), [len(release.pca[name]) for name in _PARTS])
    _, which = np.unique(features, axis=0, return_inverse=True)
    which = which.reshape(-1)
    first = np.full(which.max() + 1, len(_PARTS))
    last = np.full(which.max() + 1, -1)
    np.minimum.at(first, which, part)
    np.maximum.at(last, which, part)
    shared = np.flatnonzero(first != last)
    if len(shared):
        row = int(np.flatnonzero(which == shared[0])[0])
        raise SchemaError(
            f"{store.describe()}: {len(shared)} cells have the same features in two splits (the first is row {row} of "
            f"{_PARTS[int(part[row])]}): one cell may be in one split only"
        )
