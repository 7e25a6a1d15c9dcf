"""Which library fits UMAP, and what is said where cuML is asked for and is not there.

cuML itself runs on GPUs alone, so a stand-in takes its place: these tests show what is asked of it, not what it answers.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from umap.umap_ import find_ab_params

from ctc_ray.errors import ResourceError
from ctc_ray.latent.backend import Backend, resolve_backend
from ctc_ray.latent.reduce import UmapPlane

ASKED: list[dict[str, Any]] = []


class StandInUmap:
    """Takes what cuML's UMAP takes, and lays the first two scores out as places."""

    def __init__(self, **settings: Any) -> None:
        ASKED.append(settings)

    def fit_transform(self, scores_MP: np.ndarray) -> np.ndarray:
        return scores_MP[:, :2].astype(np.float64)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    def have(*, cuml: bool, gpu: bool) -> None:
        monkeypatch.setattr("ctc_ray.latent.backend.cuml_is_installed", lambda: cuml)
        monkeypatch.setattr("ctc_ray.latent.backend.gpu_is_there", lambda: gpu)

    return have


@pytest.mark.parametrize(
    ("wished", "cuml", "gpu", "used"),
    [
        ("cpu", True, True, "cpu"),
        ("auto", True, True, "cuml"),
        ("auto", True, False, "cpu"),
        ("auto", False, True, "cpu"),
        ("cuml", True, True, "cuml"),
    ],
)
def test_auto_takes_cuml_where_it_and_a_gpu_are_there(
    machine: Any, wished: Backend, cuml: bool, gpu: bool, used: str
) -> None:
    machine(cuml=cuml, gpu=gpu)
    assert resolve_backend(wished) == used


def test_cuml_that_is_not_there_is_refused_with_the_remedy(machine: Any) -> None:
    machine(cuml=False, gpu=True)
    with pytest.raises(ResourceError, match=r"not installed.*rapids"):
        resolve_backend("cuml")
    machine(cuml=True, gpu=False)
    with pytest.raises(ResourceError, match="sees none"):
        resolve_backend("cuml")


def test_plane_by_cuml_takes_its_settings_and_places_cells_as_any_other(
    machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(cuml=True, gpu=True)
    stand_in = ModuleType("cuml.manifold")
    stand_in.UMAP = StandInUmap  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuml", ModuleType("cuml"))
    monkeypatch.setitem(sys.modules, "cuml.manifold", stand_in)
    scores = np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)
    plane = UmapPlane.fit(scores, num_neighbors=40, min_dist=0.8, seed=7, placing_epochs=30, backend="auto")
    a, b = find_ab_params(1.0, 0.8)
    wished = {"n_components": 2, "n_neighbors": 20, "a": float(a), "b": float(b), "random_state": 7}
    assert ASKED[-1] == {**wished, "output_type": "numpy"}
    assert (plane.backend, plane.placing_epochs, plane.a, plane.b) == ("cuml", 30, float(a), float(b))
    np.testing.assert_array_equal(plane.points, scores[:, :2])
    assert plane.points.dtype == np.float32
    assert np.isfinite(plane.place(scores[:5] + np.float32(0.1))).all()
