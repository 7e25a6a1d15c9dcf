"""Fixtures: a faked cohort in which every stage has left its output, and its report."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from ctc_ray.cohort import Cohort
from ctc_ray.config import RunConfig
from ctc_ray.detect.compare import run_compare
from ctc_ray.detect.stage import run_detect
from ctc_ray.hil.release_checks import ReleaseChecks
from ctc_ray.progress import Progress
from ctc_ray.records import FailureRow, Record, publish, write_failures
from ctc_ray.report.real_field import RealField
from ctc_ray.report.stage import run_report
from ctc_ray.schema import EFFORT_SCHEMA, RESULTS_SCHEMA
from ctc_ray.storage import Store

QUIET = Progress(quiet=True)
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_BROWSER_ARGUMENTS = ["--headless", "--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]


def _load(name: str) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "detect" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def faked() -> ModuleType:
    """The module that writes faked cohorts."""
    return _load("faked_cohort")


@dataclass(frozen=True)
class FakedRun:
    """A cohort and its patients."""

    cohort: Cohort
    patients: dict[str, Any]
    cellsearch: Path


def write_results(cohort: Cohort) -> None:
    """Simulation results of three strategies and three seeds that rise with the loops."""
    rng = np.random.default_rng(0)
    rows = []
    for number, strategy in enumerate(("random", "cluster-f1", "margin")):
        for run in range(3):
            for loop in range(5):
                for cluster in (None, -1, 0, 1, 2):
                    f1 = 0.75 + 0.03 * loop * (1 + 0.3 * number) - 0.1 * (cluster == 1) + rng.normal(0, 0.01)
                    undefined = cluster == 2 and loop == 0
                    values = None if undefined else float(min(f1, 1.0))
                    row = (
                        "limited-global",
                        strategy,
                        None,
                        run,
                        run,
                        loop,
                        "test",
                        cluster,
                        values,
                        values,
                        values,
                        100 * (loop + 1),
                    )
                    rows.append(dict(zip(RESULTS_SCHEMA.names, row, strict=True)))
    table = pa.Table.from_pylist(rows, schema=RESULTS_SCHEMA)
    record = Record("simulate", "paper", "sim-1", {}, {}, seconds=12.0, units_computed=9)
    publish(cohort.store, cohort.simulation("paper"), {"results.parquet": table}, record)


def faked_real_field() -> RealField:
    """Two discs on noise."""
    rows, cols = np.mgrid[:80, :120]
    labels = np.zeros((80, 120), np.int32)
    labels[(rows - 30) ** 2 + (cols - 30) ** 2 < 150] = 1
    labels[(rows - 50) ** 2 + (cols - 90) ** 2 < 200] = 2
    image = (labels > 0) * 900.0 + np.random.default_rng(0).normal(100, 20, labels.shape)
    return RealField(image.astype(np.float32), labels, 0.875, 3, 2, "a test image <of nuclei>")


@pytest.fixture(scope="session")
def finished(faked: ModuleType, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> FakedRun:
    """A cohort in which every stage has run, with one unit set aside, and its report."""
    root = tmp_path_factory.mktemp("finished")
    cohort, patients = faked.fake_cohort(root / "cohort", num_cells=150)
    faked.train_faked(cohort, patients)
    write_results(cohort)
    write_failures(
        cohort.store, "segment", "12", [FailureRow("12/<i>p7</i>.tif", "CartridgeError", "truncated & short")]
    )
    final = {name: patients[name] for name, role in faked.ROLES.items() if role == "final"}
    cellsearch = faked.write_cellsearch(root / "cellsearch", final)
    config = RunConfig()
    run_detect(config, cohort, progress=QUIET)
    run_compare(config, cohort, cellsearch=str(cellsearch), progress=QUIET)
    run_report(config, cohort, real_field=faked_real_field(), progress=QUIET)
    return FakedRun(cohort, patients, cellsearch)


def read_csv(cohort: Cohort, name: str) -> pl.DataFrame:
    """A frame that the report saved."""
    return pl.read_csv(cohort.store.read_bytes(f"{cohort.report('report')}/frames/{name}.csv"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium; skips where none is installed."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next((found for name in _BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser ({', '.join(_BROWSERS)}) is installed: apt-get install chromium")
    with api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=_BROWSER_ARGUMENTS)
        yield running
        running.close()


STRATEGIES = ("random", "cluster-f1", "margin", "entropy", "qbc", "k-center", "badge", "typiclust")


@dataclass(frozen=True)
class MadeUp:
    """A made-up simulation on disk."""

    place: Path
    results: pl.DataFrame
    effort: pl.DataFrame


def made_up_rows(
    strategies: Sequence[str], num_seeds: int, rate: float, scenario: str, main_cluster: int | None
) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """Rows of results and effort: later strategies are better, random is slow where the scenario is rare-positive."""
    results, effort = [], []
    for number, strategy in enumerate(strategies):
        for run in range(1, num_seeds + 1):
            rng = np.random.default_rng([number, run, round(1000 * rate)])
            for loop in range(4):
                key = (scenario, strategy, main_cluster, run, 100 + run, loop)
                labels = 100 * (loop + 1)
                slow = 3.0 if strategy == "random" and scenario == "rare-positive" else 1.0
                effort.append((*key, labels, round(100 * loop * slow), None, None, 5.0 * loop * slow))
                for cluster in (None, -1, 0, 1):
                    low = 0.3 * (cluster == 1)
                    noise = rng.normal(0, 0.01) if loop else 0.01 * np.sin(run)
                    f1 = 0.6 + 0.05 * loop + 0.004 * number * loop - low - rate * loop * 0.3 + noise
                    results.append((*key, "test", cluster, f1, f1, f1, labels))
    return results, effort


def write_made_up(
    place: Path,
    *,
    strategies: Sequence[str] = STRATEGIES,
    num_seeds: int = 20,
    rates: Sequence[float] | None = None,
    settings: Sequence[tuple[str, int | None]] = (("limited-global", None),),
) -> MadeUp:
    """Write a simulation as `ctc-ray simulate` leaves it; `rates` adds the column flip_rate."""
    frames = []
    for rate in rates or (0.0,):
        for scenario, main_cluster in settings:
            parts = made_up_rows(strategies, num_seeds, rate, scenario, main_cluster)
            empty = (RESULTS_SCHEMA.empty_table(), EFFORT_SCHEMA.empty_table())
            schemas = [pl.DataFrame(pl.from_arrow(table)).schema for table in empty]
            pair = [
                pl.DataFrame(rows, schema=schema, orient="row") for rows, schema in zip(parts, schemas, strict=True)
            ]
            frames.append(pair if rates is None else [frame.with_columns(flip_rate=pl.lit(rate)) for frame in pair])
    results, effort = (pl.concat(pair[part] for pair in frames) for part in (0, 1))
    record = Record(
        "simulate",
        "paper",
        "sim-1",
        {"mode": "corrected", "initial": 100, "per_loop": 100, "seeds": num_seeds},
        {},
        counts={"trials": 160, "rows": results.height, "train_cells": 2638, "test_cells": 2773},
        created_at="2026-01-02T03:04:05+00:00",
    )
    checks = ReleaseChecks(0.987, 6, 7, 0.926, 1, 0.286)
    files: dict[str, Any] = {
        "results.parquet": results.to_arrow(),
        "effort.parquet": effort.to_arrow(),
        "release_checks.json": json.dumps(asdict(checks)).encode(),
    }
    publish(Store(place.parent), place.name, files, record)
    return MadeUp(place, results, effort)


@pytest.fixture(scope="session")
def write_simulation() -> Callable[..., MadeUp]:
    """The function that writes made-up simulations."""
    return write_made_up


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> MadeUp:
    """A made-up simulation of eight strategies, twenty seeds and two scenarios."""
    place = tmp_path_factory.mktemp("simulated") / "run"
    return write_made_up(place, settings=(("limited-global", None), ("rare-positive", None)))
