"""The stock StarDist package on TensorFlow, in an interpreter of its own: every job of a session in one start each."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

STOCK_TIMEOUT_S = 540.0


@pytest.fixture(scope="session")
def stock_python() -> str:
    """Interpreter with stock StarDist: `CTC_RAY_STOCK_PYTHON`, or this one where TensorFlow is installed."""
    named = os.environ.get("CTC_RAY_STOCK_PYTHON")
    if named:
        return named
    if importlib.util.find_spec("tensorflow") is not None:
        return sys.executable
    reason = (
        "TensorFlow is not installed; run `make test-parity`, or set CTC_RAY_STOCK_PYTHON to an interpreter with it"
    )
    if os.environ.get("CTC_RAY_REQUIRE_STOCK"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def run_stock(stock_python: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Run `stock.py` on jobs; gives versions and the registry."""

    def run(
        *, build: Sequence[Mapping[str, Any]] = (), predict: Sequence[Mapping[str, Any]] = (), keras: int = 3
    ) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("stock_jobs")
        jobs = {"build": list(build), "predict": list(predict), "about": str(folder / "about.json")}
        (folder / "jobs.json").write_text(json.dumps(jobs))
        environment = os.environ | {
            "TF_USE_LEGACY_KERAS": "1" if keras == 2 else "0",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "CUDA_VISIBLE_DEVICES": "",
        }
        command = [stock_python, str(Path(__file__).with_name("stock.py")), str(folder / "jobs.json")]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=STOCK_TIMEOUT_S, check=False
        )
        if done.returncode != 0:
            pytest.fail(
                f"the stock package failed ({' '.join(command)}):\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
            )
        about: dict[str, Any] = json.loads((folder / "about.json").read_text())
        return about

    return run


@pytest.fixture(scope="session")
def draw_blobs() -> Callable[..., np.ndarray]:
    """Images (H, W) or (H, W, C) uint16 of bright discs on noise, each channel its own brightness."""

    def draw(shape: tuple[int, int], num_channels: int = 1, seed: int = 0) -> np.ndarray:
        rng = np.random.default_rng(seed)
        rows, columns = np.mgrid[: shape[0], : shape[1]]
        image = rng.poisson(20.0, (*shape, num_channels)).astype(np.float64)
        for _ in range(max(6, shape[0] * shape[1] // 700)):
            row, column = rng.uniform(0, shape[0]), rng.uniform(0, shape[1])
            disc = np.exp(-0.5 * ((rows - row) ** 2 + (columns - column) ** 2) / rng.uniform(2, 6) ** 2)
            image += disc[..., None] * rng.uniform(100, 900, num_channels)
        drawn = image.astype(np.uint16)
        return drawn[..., 0] if num_channels == 1 else drawn

    return draw
