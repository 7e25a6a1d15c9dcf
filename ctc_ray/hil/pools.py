"""What a simulation works on: a labelled training set to draw from, a test set to score on, and their clusters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ctc_ray.errors import LabelError, SchemaError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Labels = npt.NDArray[np.int8]

BACKGROUND = -1
"""Cluster of the cells that HDBSCAN leaves without one."""


@dataclass(frozen=True, eq=False)
class CellSet:
    """Cells with features, labels and clusters.

    Attributes:
        name: what messages call the set.
        cell_ids: (N,) text, unique.
        features: (N, D) float64, finite; PCA scores of the embeddings.
        labels: (N,) int8, 1 CTC, 0 not.
        clusters: (N,) int64, -1 background.
    """

    name: str
    cell_ids: npt.NDArray[np.str_]
    features: Floats
    labels: Labels
    clusters: Ints

    def __post_init__(self) -> None:
        """Check the arrays against each other.

        Raises:
            SchemaError: lengths or dimensions disagree, a feature is not finite, or an id occurs twice.
            LabelError: a label is neither 0 nor 1.
        """
        num = len(self.cell_ids)
        if self.features.ndim != 2 or not len(self.features) == len(self.labels) == len(self.clusters) == num:
            raise SchemaError(
                f"{self.name}: {num} cell ids, features {self.features.shape}, {len(self.labels)} labels and {len(self.clusters)} "
                "clusters do not describe the same cells: make the files again from one table"
            )
        bad = np.flatnonzero(~np.isfinite(self.features).all(axis=1))
        if len(bad):
            raise SchemaError(
                f"{self.name}: features of {len(bad)} of {num} cells are not finite, the first in row {bad[0]}: "
                "leave these cells out, or embed them again"
            )
        odd = np.setdiff1d(self.labels, (0, 1))
        if len(odd):
            raise LabelError(f"{self.name}: label {odd[0]} is neither 0 (no CTC) nor 1 (CTC): map the labels first")
        if len(np.unique(self.cell_ids)) != num:
            raise SchemaError(f"{self.name}: a cell id occurs twice; every cell may be drawn only once")

    def __len__(self) -> int:
        return len(self.cell_ids)


def cell_set(name: str, cell_ids: Any, features: Any, labels: Any, clusters: Any) -> CellSet:
    """Make a `CellSet` of anything array-like; raises as that does."""
    given = np.asarray(labels)
    odd = given[~np.isin(given, (0, 1))]
    if len(odd):  # before they become int8, where 256 is 0 and 0.7 too
        raise LabelError(f"{name}: label {odd[0]} is neither 0 (no CTC) nor 1 (CTC): map the labels first")
    return CellSet(
        name,
        np.asarray(cell_ids, dtype=np.str_),
        np.ascontiguousarray(features, dtype=np.float64),
        given.astype(np.int8),
        np.asarray(clusters, dtype=np.int64),
    )


@dataclass(frozen=True, eq=False)
class Problem:
    """Everything that a trial needs, as plain arrays: it travels to workers through Ray's object store without a copy.

    Attributes:
        train: cells that can be drawn; `clusters` keeps the background.
        train_clusters_filled: (N,) int64, the same with background cells moved to a cluster near by.
        test: cells that every loop is scored on; never drawn.
        validation: cells that may score the clusters for a strategy; None: Monte-Carlo splits of the labelled cells do.
    """

    train: CellSet
    train_clusters_filled: Ints
    test: CellSet
    validation: CellSet | None = None

    def __post_init__(self) -> None:
        """Check the sets against each other.

        Raises:
            SchemaError: a set is empty, the widths differ, or a cell is in two sets.
            LabelError: the training or the test set has one class only.
        """
        sets = [self.train, self.test, *([self.validation] if self.validation is not None else [])]
        for cells in sets:
            if len(cells) == 0:
                raise SchemaError(f"{cells.name}: no cells, so nothing can be simulated")
            if cells.features.shape[1] != self.train.features.shape[1]:
                raise SchemaError(
                    f"{cells.name} has {cells.features.shape[1]} features a cell and {self.train.name} "
                    f"{self.train.features.shape[1]}: use one PCA for both"
                )
        for cells in (self.train, self.test):
            if len(np.unique(cells.labels)) < 2:
                kind = "CTCs" if cells.labels[0] else "non-CTCs"
                raise LabelError(f"{cells.name}: all {len(cells)} labels are {kind}; a classifier needs both classes")
        ids = np.concatenate([cells.cell_ids for cells in sets])
        if len(np.unique(ids)) != len(ids):
            raise SchemaError(
                f"a cell is in two of {', '.join(cells.name for cells in sets)}: the sets must be disjoint"
            )
        if len(self.train_clusters_filled) != len(self.train):
            raise SchemaError(f"{len(self.train_clusters_filled)} filled clusters for {len(self.train)} training cells")

    def test_cluster_ids(self) -> list[int]:
        """Clusters of the test set, ascending, background (-1) first."""
        return [int(c) for c in np.unique(self.test.clusters)]
