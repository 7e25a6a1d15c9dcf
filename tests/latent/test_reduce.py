"""PCA, UMAP and the placement of new cells."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctc_ray.errors import SchemaError
from ctc_ray.latent.neighbors import nearest
from ctc_ray.latent.placement import neighbour_weights, settle
from ctc_ray.latent.reduce import PrincipalComponents, UmapPlane, neighbors_for


def blobs(num: int, width: int = 8, seed: int = 0, spread: float = 1.0) -> np.ndarray:
    """Overlapping blobs, so that the neighbour graph is connected."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(1).normal(0, 1.5, (4, width))
    return (centres[rng.integers(0, 4, num)] + rng.normal(0, spread, (num, width))).astype(np.float32)


@pytest.fixture(scope="module")
def plane() -> UmapPlane:
    return UmapPlane.fit(blobs(300), num_neighbors=30, min_dist=0.8, seed=42)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), n=st.integers(1, 20), m=st.integers(2, 30), k=st.integers(1, 5))
def test_nearest_agrees_with_sorting_all_distances(seed: int, n: int, m: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    queries, points = rng.normal(size=(n, 3)).astype(np.float32), rng.normal(size=(m, 3)).astype(np.float32)
    k = min(k, m)
    indices, distances = nearest(queries, points, k)
    full = np.sqrt(((queries[:, None].astype(np.float64) - points[None]) ** 2).sum(-1))
    np.testing.assert_array_equal(indices, np.argsort(full, axis=1, kind="stable")[:, :k])
    np.testing.assert_allclose(distances, np.sort(full, axis=1)[:, :k], atol=1e-6)


def test_pca_agrees_with_an_eigendecomposition_of_the_covariance() -> None:
    vectors = blobs(200)
    pca = PrincipalComponents.fit(vectors, 3)
    centred = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    values, axes = np.linalg.eigh(centred.T @ centred)
    expected = centred @ axes[:, ::-1][:, :3]
    np.testing.assert_allclose(np.abs(pca.transform(vectors)), np.abs(expected), atol=1e-4)
    np.testing.assert_allclose(pca.explained, values[::-1][:3] / values.sum(), atol=1e-5)


def test_pca_of_few_cells_keeps_fewer_components_and_one_cell_is_refused() -> None:
    assert PrincipalComponents.fit(blobs(5), 32).components.shape == (4, 8)
    assert PrincipalComponents.fit(blobs(50), 32).components.shape == (8, 8)
    with pytest.raises(SchemaError, match="at least two cells"):
        PrincipalComponents.fit(blobs(1), 32)


def test_pca_of_broken_or_foreign_vectors_is_refused() -> None:
    pca = PrincipalComponents.fit(blobs(50), 3)
    with pytest.raises(SchemaError, match="embeddings are 5 wide, the PCA was fitted on 8"):
        pca.transform(blobs(4, width=5))
    broken = blobs(4)
    broken[2, 1] = np.nan
    with pytest.raises(SchemaError, match="not finite, the first in row 2"):
        pca.transform(broken)


@pytest.mark.parametrize(("cells", "neighbours"), [(2638, 200), (1000, 100), (100, 15), (10, 9), (3, 2)])
def test_neighbours_shrink_with_the_fitted_set(cells: int, neighbours: int) -> None:
    assert neighbors_for(cells, 200) == neighbours


def test_neighbour_weights_sum_to_log2_of_the_neighbours() -> None:
    _, distances = nearest(blobs(20, seed=3), blobs(300), 30)
    weights = neighbour_weights(distances)
    np.testing.assert_allclose(weights[:, 1:].sum(axis=1), np.log2(30), atol=1e-3)
    assert (np.diff(weights, axis=1) <= 0).all()
    assert weights.max() <= 1


def test_settled_cell_on_a_fitted_cell_stays_near_it() -> None:
    fitted = np.array([[0, 0], [10, 0], [0, 10], [10, 10]], np.float32)
    indices = np.array([[2, 0, 3, 1]], np.int32)
    weights = neighbour_weights(np.array([[0.0, 5.0, 5.0, 7.0]], np.float32))
    place = settle(indices, weights, fitted, a=1.0, b=1.0)
    assert place.shape == (1, 2)
    assert np.linalg.norm(place[0] - fitted[2]) < 5
    assert settle(np.empty((0, 4), np.int32), np.empty((0, 4), np.float32), fitted, 1.0, 1.0).shape == (0, 2)


def test_place_depends_on_the_cell_alone(plane: UmapPlane) -> None:
    cells = blobs(60, seed=9)
    together = plane.place(cells)
    order = np.random.default_rng(0).permutation(60)
    alone = np.concatenate([plane.place(cells[i : i + 1]) for i in range(0, 60, 12)])
    np.testing.assert_allclose(plane.place(cells[order]), together[order], atol=1e-3)
    np.testing.assert_allclose(alone, together[::12], atol=1e-3)
    assert np.isfinite(together).all()


def test_place_of_near_copies_is_near_the_fitted_cells(plane: UmapPlane) -> None:
    places = plane.place(plane.scores + np.float32(1e-4))
    distance = np.linalg.norm(places - plane.points, axis=1)
    extent = np.linalg.norm(np.ptp(plane.points, axis=0))
    assert np.median(distance) < 0.1 * extent  # repulsion moves a cell of the same scores a little


def test_plane_is_the_same_for_the_same_seed_and_another_for_another(plane: UmapPlane) -> None:
    again = UmapPlane.fit(blobs(300), num_neighbors=30, min_dist=0.8, seed=42)
    other = UmapPlane.fit(blobs(300), num_neighbors=30, min_dist=0.8, seed=1)
    np.testing.assert_array_equal(again.points, plane.points)
    assert np.abs(other.points - plane.points).max() > 0.1


def test_plane_of_two_cells_is_refused_and_separate_groups_are_fitted() -> None:
    with pytest.raises(SchemaError, match="at least three"):
        UmapPlane.fit(blobs(2), num_neighbors=30, min_dist=0.8, seed=42)
    apart = np.concatenate([blobs(40), blobs(40, seed=1) + 500, np.repeat(blobs(1), 20, axis=0)])
    points = UmapPlane.fit(apart, num_neighbors=10, min_dist=0.8, seed=42).points
    assert np.isfinite(points).all()


@pytest.mark.slow
def test_plane_and_placement_agree_with_umap_learn() -> None:
    """Against umap-learn with its own neighbours and transform, as far as its own noise goes.

    Its gradient descent magnifies rounding errors, so places are compared by how well they keep neighbours, and placements
    by how far umap-learn's own move when the cells move by 1e-5.
    """
    from sklearn.manifold import trustworthiness
    from umap import UMAP

    fit_on, new = blobs(600, spread=1.3), blobs(200, seed=5, spread=1.3)
    stock: Any = UMAP(n_neighbors=60, min_dist=0.8, random_state=42, n_jobs=1).fit(fit_on)
    ours = UmapPlane.fit(fit_on, num_neighbors=60, min_dist=0.8, seed=42)
    kept, kept_by_stock = (
        trustworthiness(fit_on, places, n_neighbors=30) for places in (ours.points, stock.embedding_)
    )
    assert kept > kept_by_stock - 0.02
    theirs, shifted = stock.transform(new), stock.transform(new + np.float32(1e-5))
    noise = np.linalg.norm(theirs - shifted, axis=1)
    placed = UmapPlane(fit_on, stock.embedding_, stock._a, stock._b, 60).place(new)
    difference = np.linalg.norm(placed - theirs, axis=1)
    extent = np.linalg.norm(np.ptp(stock.embedding_, axis=0))
    assert np.median(difference) < max(2 * np.median(noise), 0.03 * extent)
    assert np.percentile(difference, 90) < max(2 * np.percentile(noise, 90), 0.1 * extent)
