"""Shared fixtures: pinned threads and plots without a screen, the shared data, one Ray cluster a session."""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from ctc_ray.cluster import connect
from ctc_ray.config import RayConfig

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the shared data sets (real nuclei, real cells, the parity fixture, a processed release)."""
    path = Path(os.environ.get("CTC_RAY_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        reason = f"the shared data are not at {path}; set CTC_RAY_SHARED_DATA to their folder"
        if os.environ.get("CTC_RAY_REQUIRE_SHARED_DATA"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray cluster with four logical CPUs."""
    with connect(config=RayConfig(num_cpus=4, object_store_mb=200)):
        yield


@pytest.fixture(scope="session")
def mixture() -> ModuleType:
    """The module `tests/mixture_cohort.py`, which writes cohorts from a seeded mixture."""
    name = "mixture_cohort"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / f"{name}.py")
        if spec is None or spec.loader is None:
            raise ImportError(name)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]
