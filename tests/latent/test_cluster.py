"""Clusters of the plane and the choice of the cells that a map is fitted on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctc_ray.config import MapConfig
from ctc_ray.errors import SchemaError
from ctc_ray.latent.cluster import BACKGROUND, Clusters, number_by_size, size_for
from ctc_ray.latent.fit import MIN_FIT_CELLS, choose_fit_sets


def islands() -> np.ndarray:
    rng = np.random.default_rng(0)
    parts = [rng.normal(centre, 0.3, (num, 2)) for centre, num in (((0, 0), 60), ((10, 0), 200), ((0, 10), 100))]
    return np.concatenate(parts).astype(np.float32)


def fit(points: np.ndarray) -> Clusters:
    return Clusters.fit(points, min_cluster_size=15, min_samples=90, selection="eom", epsilon=0.25)


def test_clusters_of_islands_are_found_and_numbered_by_size() -> None:
    clusters = fit(islands())
    assert clusters.num_clusters == 3
    assert (clusters.min_samples, clusters.min_cluster_size) == (18, 15)
    expected = np.repeat([2, 0, 1], [60, 200, 100])
    inside = clusters.labels != BACKGROUND
    assert inside.mean() > 0.8
    np.testing.assert_array_equal(clusters.labels[inside], expected[inside])


def test_assigned_cluster_is_that_of_the_nearest_clustered_point() -> None:
    clusters = fit(islands())
    queries = np.random.default_rng(1).uniform(-2, 12, (50, 2))
    full = ((queries[:, None] - clusters.points[None].astype(np.float64)) ** 2).sum(-1)
    np.testing.assert_array_equal(clusters.assign(queries), clusters.labels[full.argmin(axis=1)])
    assert clusters.assign(np.empty((0, 2))).shape == (0,)


def test_clusters_of_too_few_points_are_refused() -> None:
    with pytest.raises(SchemaError, match="at least 10 cells, there are 4"):
        fit(islands()[:4])


@pytest.mark.parametrize(("cells", "size"), [(51_085, 90), (1800, 90), (400, 20), (50, 5)])
def test_sizes_shrink_with_the_clustered_set(cells: int, size: int) -> None:
    assert size_for(cells, 90) == size


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-1, 4), max_size=30))
def test_numbering_by_size_keeps_the_partition(raw: list[int]) -> None:
    labels = np.array(raw, np.int64)
    numbered = number_by_size(labels)
    assert [(a == -1) for a in raw] == [(b == -1) for b in numbered]
    assert len(set(zip(raw, numbered.tolist(), strict=True))) == len(set(raw))
    sizes = [int((numbered == n).sum()) for n in range(int(numbered.max(initial=-1)) + 1)]
    assert sizes == sorted(sizes, reverse=True)
    assert all(sizes)


def test_fit_sets_are_those_of_the_paper() -> None:
    train, test = [f"t{i:03d}" for i in range(400)], [f"e{i}" for i in range(30)]
    labelled = frozenset(train[:150]) | frozenset(test[:20])
    sets = choose_fit_sets(train, test, labelled, MapConfig())
    assert set(sets.plane) == set(train[:150])
    assert set(sets.clusters) == set(train[150:]) | set(test[:20])
    assert sets.notes == ()
    without = choose_fit_sets(train, test, labelled, MapConfig(cluster_with="pool"))
    assert set(without.clusters) == set(train[150:])


def test_fit_sets_with_few_labels_take_all_training_cells_and_say_so() -> None:
    train = [f"t{i:03d}" for i in range(300)]
    sets = choose_fit_sets(train, [], frozenset(train[: MIN_FIT_CELLS - 1]), MapConfig())
    assert set(sets.plane) == set(train)
    assert "only 99 have a label" in sets.notes[0]


def test_fit_sets_above_the_limit_are_a_sample_that_row_order_does_not_change() -> None:
    train = [f"t{i:04d}" for i in range(1000)]
    labelled = frozenset(train[:500])
    config = MapConfig(max_fit_cells=120)
    sets = choose_fit_sets(train, [], labelled, config)
    assert (len(sets.plane), len(sets.clusters)) == (120, 120)
    assert sets == choose_fit_sets(train[::-1], [], labelled, config)
    assert sets.plane != choose_fit_sets(train, [], labelled, MapConfig(max_fit_cells=120, umap_seed=1)).plane
