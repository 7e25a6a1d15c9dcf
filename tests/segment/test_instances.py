"""Normalisation, padding and the choice of candidates against slow, obvious references."""

from __future__ import annotations

import numpy as np
import pytest
from csbdeep.utils import normalize
from hypothesis import given, settings
from hypothesis import strategies as st

from ctc_ray.errors import ConfigError, SchemaError
from ctc_ray.segment import StarDist
from ctc_ray.segment.instances import (
    Candidates,
    candidates_at,
    instances_from_candidates,
    normalize_percentile,
    pad_to_multiple,
)
from ctc_ray.segment.model import resolve_precision


def select(
    prob: np.ndarray, dist: np.ndarray, *, shape: tuple[int, int], prob_thresh: float, max_candidates: int = 200_000
) -> Candidates:
    """Candidates of whole maps on a grid of two pixels."""
    above = np.argwhere(prob > prob_thresh)
    at = tuple(above.T)
    return candidates_at(
        above, prob[at], dist[at], map_shape=prob.shape, shape=shape, grid=(2, 2), max_candidates=max_candidates
    )


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_normalisation_equals_csbdeep(dtype: str) -> None:
    image = (np.random.default_rng(0).gamma(2.0, 20.0, (61, 83)) % 250).astype(dtype)
    np.testing.assert_allclose(normalize_percentile(image), normalize(image, 1, 99.8), rtol=0, atol=1e-6)


def test_normalisation_of_a_constant_image_is_zero() -> None:
    assert not normalize_percentile(np.full((20, 30), 65535, np.uint16)).any()


@given(st.integers(17, 70), st.integers(17, 70))
@settings(max_examples=25, deadline=None)
def test_padding_adds_reflected_pixels_at_the_end_only(height: int, width: int) -> None:
    image = np.random.default_rng(0).random((height, width, 1), dtype=np.float32)
    padded = pad_to_multiple(image, (16, 16))
    assert padded.shape[0] % 16 == padded.shape[1] % 16 == 0
    assert padded.shape[0] - height < 16
    np.testing.assert_array_equal(padded[:height, :width], image)
    if padded.shape[0] > height:
        np.testing.assert_array_equal(padded[height, :width], image[height - 2])


def loop_over_candidates(prob: np.ndarray, shape: tuple[int, int], grid: int, cut: float) -> list[tuple[int, int]]:
    return [
        (row * grid, column * grid)
        for row in range(2, prob.shape[0] - 2)
        for column in range(2, prob.shape[1] - 2)
        if prob[row, column] > cut and row * grid < shape[0] and column * grid < shape[1]
    ]


def test_candidates_equal_a_loop_over_positions() -> None:
    rng = np.random.default_rng(1)
    prob, dist = rng.random((16, 24), dtype=np.float32), rng.normal(2, 3, (16, 24, 8)).astype(np.float32)
    found = select(prob, dist, shape=(27, 43), prob_thresh=0.6)
    assert [tuple(point) for point in found.points] == loop_over_candidates(prob, (27, 43), 2, 0.6)
    at = tuple((found.points // 2).T)
    np.testing.assert_array_equal(found.prob, prob[at])
    np.testing.assert_array_equal(found.dist, np.maximum(dist[at], np.float32(1e-3)))
    assert found.num_dropped == 0


def test_candidates_over_the_cap_keep_the_most_probable() -> None:
    rng = np.random.default_rng(2)
    prob = rng.random((40, 40), dtype=np.float32)
    dist = np.ones((40, 40, 8), np.float32)
    everything = select(prob, dist, shape=(80, 80), prob_thresh=0.1)
    capped = select(prob, dist, shape=(80, 80), prob_thresh=0.1, max_candidates=50)
    assert len(capped.prob) == 50
    assert capped.num_dropped == len(everything.prob) - 50
    assert capped.prob.min() >= np.sort(everything.prob)[-50]
    assert (np.lexsort((capped.points[:, 1], capped.points[:, 0])) == np.arange(50)).all()


def test_instances_of_two_overlapping_discs_keep_the_more_probable() -> None:
    candidates = Candidates(
        prob=np.array([0.6, 0.9, 0.8], np.float32),
        dist=np.full((3, 32), 6.0, np.float32),
        points=np.array([[20, 20], [21, 21], [20, 50]]),
        shape=(40, 70),
    )
    found = instances_from_candidates(candidates, nms_thresh=0.3)
    assert found.points.tolist() == [[21, 21], [20, 50]]
    assert found.labels[21, 21] == 1
    assert found.labels[20, 50] == 2
    assert set(np.unique(found.labels)) == {0, 1, 2}
    assert found.polygons.shape == (2, 2, 32)
    assert np.bincount(found.labels.ravel())[1] == pytest.approx(np.pi * 36, rel=0.15)


def test_instances_without_candidates_are_none() -> None:
    nothing = Candidates(np.zeros(0, np.float32), np.zeros((0, 32), np.float32), np.zeros((0, 2), np.int64), (30, 40))
    found = instances_from_candidates(nothing, nms_thresh=0.3)
    assert len(found) == 0
    assert found.labels.shape == (30, 40)
    assert not found.labels.any()
    assert found.polygons.shape == (0, 2, 32)


def test_model_finds_each_bright_spot_once(bright_spot_weights: object) -> None:
    image = np.zeros((70, 90), np.uint8)
    image[10, 12] = image[40, 50] = image[60, 80] = 200
    found = StarDist.load(bright_spot_weights, precision="fp32").predict(image)  # type: ignore[arg-type]
    assert sorted(map(tuple, (found.points // 2 * 2).tolist())) == [(10, 12), (40, 50), (60, 80)]


@pytest.mark.parametrize("shape", [(8,), (3, 40, 40), (40, 40, 2), (0, 40)])
def test_model_refuses_an_image_of_another_shape(bright_spot_weights: object, shape: tuple[int, ...]) -> None:
    with pytest.raises(SchemaError, match="shape"):
        StarDist.load(bright_spot_weights).predict(np.zeros(shape, np.uint8))  # type: ignore[arg-type]


def test_model_refuses_complex_pixels(bright_spot_weights: object) -> None:
    with pytest.raises(SchemaError, match="dtype"):
        StarDist.load(bright_spot_weights).predict(np.zeros((40, 40), complex))  # type: ignore[arg-type]


def test_precision_unknown_is_refused() -> None:
    assert resolve_precision("auto") in ("fp32", "bf16")
    with pytest.raises(ConfigError, match="fp16"):
        resolve_precision("fp16")
