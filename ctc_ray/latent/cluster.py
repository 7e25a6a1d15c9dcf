"""Clusters of the latent plane: HDBSCAN on some cells, the nearest of them for all others. Runs without Ray."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from ctc_ray.errors import SchemaError

BACKGROUND = -1
"""Cluster of the cells that HDBSCAN leaves as noise."""
_SHARE_OF_SET = 20
"""Both sizes of HDBSCAN are at most a twentieth of the clustered cells; the paper's 90 of 51,085 is below that."""
_MIN_SIZE = 5
_MIN_CELLS = 10


@dataclass(frozen=True)
class Clusters:
    """Clustered points, from which every other cell takes its cluster.

    Attributes:
        points: (M, 2) float32 places on the plane.
        labels: (M,) int16, -1 background; 0 is the largest cluster, then by falling size.
        min_cluster_size: used, after `size_for`.
        min_samples: used, after `size_for`.
    """

    points: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int16]
    min_cluster_size: int
    min_samples: int

    @property
    def num_clusters(self) -> int:
        """Clusters beside the background."""
        return int(self.labels.max(initial=BACKGROUND)) + 1

    @classmethod
    def fit(
        cls,
        points_M2: npt.NDArray[np.float32],
        *,
        min_cluster_size: int,
        min_samples: int,
        selection: str,
        epsilon: float,
    ) -> Clusters:
        """Cluster points (M, 2), M >= 10, given in a fixed order (sorted by cell_id).

        Raises:
            SchemaError: fewer than ten points.

        Source: reference, HDBSCAN 15 / 90 / leaf / 0.25 on [labelled test, unlabelled train]. Departures: both sizes shrink with
        small sets (`size_for`), and clusters are numbered by size.
        """
        if len(points_M2) < _MIN_CELLS:
            raise SchemaError(
                f"clustering needs at least {_MIN_CELLS} cells, there are {len(points_M2)}: embed more training or test patients"
            )
        from hdbscan import HDBSCAN

        cluster_size = size_for(len(points_M2), min_cluster_size)
        samples = size_for(len(points_M2), min_samples)
        raw = HDBSCAN(
            min_cluster_size=cluster_size,
            min_samples=samples,
            cluster_selection_method=selection,
            cluster_selection_epsilon=epsilon,
            core_dist_n_jobs=1,
        ).fit_predict(points_M2.astype(np.float64))
        return cls(np.ascontiguousarray(points_M2, np.float32), number_by_size(raw), cluster_size, samples)

    def assign(self, points_N2: npt.NDArray[np.floating]) -> npt.NDArray[np.int16]:
        """Cluster (N,) of the nearest clustered point of each point (N, 2); background (-1) is taken over too.

        Source: reference, 1-nearest neighbour on the UMAP plane.
        """
        if not len(points_N2):
            return np.empty(0, np.int16)
        _, near = cKDTree(self.points).query(np.asarray(points_N2, np.float64))
        labels: npt.NDArray[np.int16] = self.labels[near]
        return labels


def size_for(num_cells: int, wished: int) -> int:
    """Size parameter that HDBSCAN uses on `num_cells`: at most a twentieth of them, at least 5 (or what is wished, if less)."""
    return max(2, min(wished, max(_MIN_SIZE, num_cells // _SHARE_OF_SET)))


def number_by_size(labels: npt.NDArray[np.integer]) -> npt.NDArray[np.int16]:
    """Renumber clusters by falling size (equal: by first appearance); -1 stays."""
    names, first, sizes = np.unique(labels[labels >= 0], return_index=True, return_counts=True)
    order = np.lexsort((first, -sizes))
    numbers = np.full(int(labels.max(initial=-1)) + 1, BACKGROUND, np.int16)
    numbers[names[order]] = np.arange(len(names), dtype=np.int16)
    return np.where(labels >= 0, numbers[np.maximum(labels, 0)] if len(numbers) else BACKGROUND, BACKGROUND).astype(
        np.int16
    )
