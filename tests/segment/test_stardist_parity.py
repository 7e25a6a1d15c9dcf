"""The torch network against what the stock package gave on the same weights and image."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ctc_ray.segment import StarDist


@pytest.fixture(params=["keras2", "keras3"])
def keras_folder(request: pytest.FixtureRequest, shared_data: Path, tmp_path: Path) -> Path:
    fixture = shared_data / "keras_parity_fixture"
    shutil.copy(fixture / "config.json", tmp_path / "config.json")
    shutil.copy(fixture / f"weights_{request.param}_layout.h5", tmp_path / "weights_best.h5")
    with np.load(fixture / "expected.npz") as expected:
        cuts = {"prob": float(expected["prob_thresh"]), "nms": float(expected["nms_thresh"])}
    (tmp_path / "thresholds.json").write_text(json.dumps(cuts))
    return tmp_path


@pytest.fixture
def expected(shared_data: Path) -> dict[str, np.ndarray]:
    with np.load(shared_data / "keras_parity_fixture" / "expected.npz") as arrays:
        return dict(arrays)


def test_maps_fp32_equal_stock_maps(keras_folder: Path, expected: dict[str, np.ndarray]) -> None:
    prob, dist = StarDist.load(keras_folder, precision="fp32").maps(expected["image"])
    assert prob.shape == expected["prob"].shape
    assert dist.shape == expected["dist"].shape
    np.testing.assert_allclose(prob, expected["prob"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(dist, expected["dist"], rtol=0, atol=1e-5)


def test_predict_fp32_gives_the_stock_label_image(keras_folder: Path, expected: dict[str, np.ndarray]) -> None:
    found = StarDist.load(keras_folder, precision="fp32").predict(expected["image"])
    assert found.labels.dtype == np.int32
    np.testing.assert_array_equal(found.labels, expected["labels_sparse"])
    np.testing.assert_array_equal(found.points, expected["points"])
    np.testing.assert_allclose(found.prob, expected["scores"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.polygons, expected["coord"], rtol=0, atol=1e-4)


def test_maps_bf16_stay_near_stock_maps(keras_folder: Path, expected: dict[str, np.ndarray]) -> None:
    prob, dist = StarDist.load(keras_folder, precision="bf16").maps(expected["image"])
    assert 0 < np.abs(prob - expected["prob"]).max() < 5e-3
    assert np.abs(dist - expected["dist"]).max() < 0.1


def test_prediction_imports_no_tensorflow_even_where_it_is_installed(tmp_path: Path) -> None:
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('tensorflow was imported')")
    (tmp_path / "keras.py").write_text("raise SystemExit('keras was imported')")
    program = (
        "import numpy; from ctc_ray.segment import StarDist; import ctc_ray.segment.published; "
        "StarDist.load().predict(numpy.random.default_rng(0).integers(0, 255, (64, 64)))"
    )
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
