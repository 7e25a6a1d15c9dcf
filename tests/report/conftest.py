"""Fixtures: a faked cohort in which every stage has left its output, and its report."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
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
from ctc_ray.progress import Progress
from ctc_ray.records import FailureRow, Record, publish, write_failures
from ctc_ray.report.real_field import RealField
from ctc_ray.report.stage import run_report
from ctc_ray.schema import RESULTS_SCHEMA

QUIET = Progress(quiet=True)


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
