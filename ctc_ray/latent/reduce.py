"""PCA and UMAP of embeddings: fitted once, kept as plain arrays, applied to any cell. Runs without Ray."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from ctc_ray.errors import SchemaError
from ctc_ray.latent.backend import Backend, fit_by_cuml, resolve_backend
from ctc_ray.latent.neighbors import nearest
from ctc_ray.latent.placement import NUM_EPOCHS, neighbour_weights, settle

Float32 = npt.NDArray[np.float32]
_SHARE_OF_FIT = 10
"""UMAP's neighbourhood is at most a tenth of the fitted cells; the paper's 200 of 2,638 is below that."""
_MIN_NEIGHBORS = 2
_PLACING_CHUNK = 4096


@dataclass(frozen=True)
class PrincipalComponents:
    """A fitted PCA without whitening or scaling.

    Attributes:
        mean: (D,) float32.
        components: (P, D) float32, orthonormal rows, most variance first.
        explained: (P,) float32, share of the variance that each component holds.
    """

    mean: Float32
    components: Float32
    explained: Float32

    @classmethod
    def fit(cls, vectors_ND: npt.NDArray[np.floating], dim: int) -> PrincipalComponents:
        """Fit to vectors (N, D), N >= 2; P is `dim`, or min(N - 1, D) where that is smaller.

        Raises:
            SchemaError: fewer than two vectors, or values that are not finite.

        Source: reference, PCA 32 on the labelled training cells. Departure: exact, with the signs that scikit-learn fixes.
        """
        from sklearn.decomposition import PCA

        vectors = _checked(vectors_ND)
        if len(vectors) < 2:
            raise SchemaError(f"PCA needs at least two cells, there are {len(vectors)}")
        fitted = PCA(n_components=min(dim, len(vectors) - 1, vectors.shape[1]), svd_solver="full").fit(vectors)
        return cls(
            fitted.mean_.astype(np.float32),
            fitted.components_.astype(np.float32),
            np.nan_to_num(fitted.explained_variance_ratio_).astype(np.float32),
        )

    def transform(self, vectors_ND: npt.NDArray[np.floating]) -> Float32:
        """Scores (N, P) float32 of vectors (N, D).

        Raises:
            SchemaError: another width than the fit's, or values that are not finite.
        """
        vectors = _checked(vectors_ND)
        if vectors.shape[1] != len(self.mean):
            raise SchemaError(f"embeddings are {vectors.shape[1]} wide, the PCA was fitted on {len(self.mean)}")
        scores = (vectors - self.mean.astype(np.float64)) @ self.components.T.astype(np.float64)
        return scores.astype(np.float32)


def _checked(vectors_ND: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    vectors = np.asarray(vectors_ND, np.float64)
    if vectors.ndim != 2:
        raise SchemaError(f"embeddings have shape {vectors.shape}, expected (cells, width)")
    broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(broken):
        raise SchemaError(
            f"{len(broken)} embeddings hold values that are not finite, the first in row {broken[0]}: embed again"
        )
    return vectors


@dataclass(frozen=True)
class UmapPlane:
    """A fitted UMAP as arrays: what is needed to place further cells.

    Attributes:
        scores: (M, P) float32, PCA scores of the fitted cells.
        points: (M, 2) float32, their places.
        a: first parameter of the low-dimensional kernel 1 / (1 + a d^2b).
        b: second parameter.
        num_neighbors: neighbours used, after `neighbors_for`.
        placing_epochs: steps by which a new cell finds its place.
        backend: what fitted it, `cpu` or `cuml`.
    """

    scores: Float32
    points: Float32
    a: float
    b: float
    num_neighbors: int
    placing_epochs: int = NUM_EPOCHS
    backend: str = "cpu"

    @classmethod
    def fit(
        cls,
        scores_MP: Float32,
        *,
        num_neighbors: int,
        min_dist: float,
        seed: int,
        placing_epochs: int = NUM_EPOCHS,
        backend: Backend = "cpu",
    ) -> UmapPlane:
        """Fit to PCA scores (M, P), M >= 3.

        Args:
            scores_MP: rows in a fixed order (sort by cell_id).
            num_neighbors: as wished; `neighbors_for` bounds it.
            min_dist: as UMAP's.
            seed: makes UMAP single-threaded.
            placing_epochs: steps by which a new cell finds its place.
            backend: `cpu` umap-learn, `cuml` cuML, `auto` cuML where it and a GPU are there.

        Raises:
            SchemaError: fewer than three cells.
            ResourceError: `cuml` is asked for and is not there.

        Source: reference, 2-d, n_neighbors 200, min_dist 0.8, learning rate 1, Euclidean, seed 42. Departures: neighbours
        are exact at any size, and a neighbour graph of several components starts from PCA, since UMAP's own start for that
        case differs from run to run.
        """
        if len(scores_MP) < 3:
            raise SchemaError(f"UMAP needs at least three cells, there are {len(scores_MP)}: label more training cells")
        neighbors = neighbors_for(len(scores_MP), num_neighbors)
        scores = np.ascontiguousarray(scores_MP, np.float32)
        used = resolve_backend(backend)
        fitted = fit_by_cuml if used == "cuml" else _fit_by_umap_learn
        points, a, b = fitted(scores, neighbors, min_dist, seed)
        return cls(scores, points, a, b, neighbors, placing_epochs, used)

    def place(self, scores_NP: Float32, *, seed: int = 42) -> Float32:
        """Places (N, 2) of PCA scores (N, P).

        A cell's place depends on its own scores alone, never on what is placed with it. See `ctc_ray.latent.placement`.
        """
        places = np.empty((len(scores_NP), 2), np.float32)
        for start in range(0, len(scores_NP), _PLACING_CHUNK):
            block = scores_NP[start : start + _PLACING_CHUNK]
            indices, distances = nearest(block, self.scores, self.num_neighbors)
            weights = neighbour_weights(distances)
            places[start : start + len(block)] = settle(
                indices, weights, self.points, self.a, self.b, seed=seed, num_epochs=self.placing_epochs
            )
        return places


def _fit_by_umap_learn(scores_MP: Float32, neighbors: int, min_dist: float, seed: int) -> tuple[Float32, float, float]:
    """Places (M, 2) and the two kernel parameters."""
    indices, distances = nearest(scores_MP, scores_MP, neighbors)
    _own_first(indices, distances)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # UMAP remarks on the seed, on the missing search index and on small sets
        from umap import UMAP

        model = UMAP(
            n_components=2,
            n_neighbors=neighbors,
            min_dist=min_dist,
            metric="euclidean",
            init=_start(indices),
            random_state=seed,
            n_jobs=1,
            precomputed_knn=(indices, distances),
        ).fit(scores_MP)
    return np.ascontiguousarray(model.embedding_, np.float32), float(model._a), float(model._b)


def neighbors_for(num_cells: int, wished: int) -> int:
    """Neighbours that a UMAP of `num_cells` uses: at most a tenth of them, and never all (at least 15 where there are)."""
    return max(_MIN_NEIGHBORS, min(wished, max(15, num_cells // _SHARE_OF_FIT), num_cells - 1))


def _own_first(indices: npt.NDArray[np.int32], distances: Float32) -> None:
    """Put each cell first in its own list, as UMAP expects, also where another cell has the same scores."""
    own = np.arange(len(indices), dtype=np.int32)
    for row in np.flatnonzero(indices[:, 0] != own):
        place = np.flatnonzero(indices[row] == own[row])
        last = int(place[0]) if len(place) else indices.shape[1] - 1
        indices[row, 1 : last + 1] = indices[row, :last].copy()
        distances[row, 1 : last + 1] = distances[row, :last].copy()
        indices[row, 0], distances[row, 0] = own[row], 0.0


def _start(indices: npt.NDArray[np.int32]) -> str:
    """`spectral` for a connected neighbour graph, else `pca`."""
    num, k = indices.shape
    rows = np.repeat(np.arange(num), k)
    graph = csr_matrix((np.ones(num * k, np.int8), (rows, indices.ravel())), shape=(num, num))
    components, _ = connected_components(graph, directed=False)
    return "spectral" if components == 1 and num > 15 else "pca"
