"""The stage on Ray: complete per patient, resumable; real cells from import to index."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from ctc_ray.cli import main
from ctc_ray.cohort import Cohort
from ctc_ray.config import load_config
from ctc_ray.errors import StaleOutputError, TooManyFailuresError
from ctc_ray.imports.stage import plan_import_crops, run_import_crops
from ctc_ray.index.search import similar
from ctc_ray.labels.consensus import read_labels
from ctc_ray.progress import Progress
from ctc_ray.records import StageResult, State

OVERRIDES = ["import_crops.unit_cells=2", "import_crops.num_actors=2"]


def _run(cohort: Cohort, source: Path, *overrides: str, **options: bool) -> StageResult:
    config = load_config(None, [*OVERRIDES, *overrides])
    return run_import_crops(config, cohort, source=str(source), progress=Progress(quiet=True), **options)


def _command(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(list(words))
    return int(end.value.code or 0)


@pytest.mark.ray
@pytest.mark.slow
def test_import_is_complete_per_patient_and_retries_what_failed(ray_cluster: None, tmp_path: Path, table: Path) -> None:
    cohort = Cohort.open(str(tmp_path / "c"), create=True)
    lost = table.parent / "2_ck.png"
    lost.rename(table.parent / "away.png")
    with pytest.raises(TooManyFailuresError, match="1 of 6 rows"):
        _run(cohort, table)
    first = _run(cohort, table, "import_crops.max_failure_fraction=0.5")
    assert (first.units_computed, first.units_reused, first.set_aside) == (0, 4, 1)
    assert first.counts == {"patients": 2, "cells": 5, "failed": 1, "labels": 4, "unknown_labels": 0}
    record = cohort.require("cells/007", "import-crops")
    assert sum(row["units"] for row in record.workers) == record.units_computed == 2
    (table.parent / "away.png").rename(lost)
    retried = _run(cohort, table, retry_failed=True)
    assert (retried.units_computed, retried.set_aside, retried.counts["cells"]) == (2, 0, 6)
    assert cohort.require("cells/007", "import-crops").identity != record.identity
    rows = plan_import_crops(load_config(None, OVERRIDES), cohort, source=str(table))
    assert [row.state for row in rows] == [State.COMPLETE, State.COMPLETE]
    with pytest.raises(StaleOutputError, match="--force"):
        _run(cohort, table, "import_crops.resize=bilinear")
    assert _command("import-crops", str(tmp_path / "c"), str(table), "--dry-run") == 0
    assert _command("import-crops", str(tmp_path / "c"), str(tmp_path / "nothing.csv")) == 1
    assert _command("import-crops", str(tmp_path / "c"), str(table), "--set", "import_crops.resize=stretch") == 2


@pytest.mark.ray
@pytest.mark.slow
def test_killed_import_continues_and_equals_an_uninterrupted_one(ray_cluster: None, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    patients = np.array([f"P{index % 3}" for index in range(600)])
    source = tmp_path / "cells.npz"
    np.savez_compressed(source, pixels=rng.integers(0, 4096, (600, 3, 48, 48), dtype=np.uint16), patient=patients)
    parts = tmp_path / "killed" / "cells"
    words = ["import-crops", str(tmp_path / "killed"), str(source), *(w for text in OVERRIDES for w in ("--set", text))]
    process = subprocess.Popen([sys.executable, "-m", "ctc_ray.cli", *words], start_new_session=True)
    while process.poll() is None and not any(parts.glob("*/_parts/*/*.parquet")):
        time.sleep(0.02)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(3.0)  # its workers notice and end; they may still finish a write, as on a real cluster
    killed, whole = (Cohort.open(str(tmp_path / name), create=True) for name in ("killed", "whole"))
    result = _run(killed, source)
    assert result.units_reused > 0
    assert result.units_computed > 0
    _run(whole, source, "import_crops.unit_cells=70", "import_crops.num_actors=1")
    for patient in ("P0", "P1", "P2"):
        left, right = (
            pa.concat_tables([c.store.read_table(path) for path in c.shards(c.cells(patient))]).combine_chunks()
            for c in (killed, whole)
        )
        assert left.equals(right)
        assert left.num_rows == 200


@pytest.mark.ray
@pytest.mark.slow
def test_real_cells_go_from_import_to_index(ray_cluster: None, tmp_path: Path, shared_data: Path) -> None:
    with np.load(shared_data / "jurkat_ifc" / "cells.npz") as archive:
        pixels, phases = archive["X"][::3], archive["y"][::3]
    donors = np.array([f"dish {index % 5}" for index in range(len(pixels))])
    source, uri = tmp_path / "jurkat.npz", str(tmp_path / "c")
    np.savez_compressed(source, X=pixels, y=phases, donor=donors)
    mitosis = ("Prophase", "Metaphase", "Anaphase", "Telophase")
    label_map = ", ".join([*(f"{phase}: ctc" for phase in mitosis), "'*': non_ctc"])
    sets = {
        "import-crops": [
            *("pixels=X", "patient_column=donor", "label_column=y", "channel_order=[1,0,2]", "bits=12"),
            *("resize=pad-edge", f"label_map={{{label_map}}}"),
        ],
        "split": ["pretrain=0", "final=0", "validation=0", "train=3", "test=2"],
        "embed": ["encoder=default", "precision=fp32"],
        "map": ["encoder=default", "umap_neighbors=15", "hdbscan_min_cluster_size=20", "hdbscan_min_samples=10"],
        "train": ["encoder=default", "calibration_folds=3"],
        "index": ["encoder=default"],
    }
    for stage, settings in sets.items():
        section = stage.replace("-", "_")
        words = [word for text in settings for word in ("--set", f"{section}.{text}")]
        places = [uri, str(source)] if stage == "import-crops" else [uri]
        assert _command(stage, *places, *words) == 0, stage
    cohort = Cohort.open(uri)
    labels = read_labels(cohort)
    assert labels.height == len(pixels) == 864
    assert labels.filter(pl.col("label") == "ctc").height == np.isin(phases, mitosis).sum()
    stored = cohort.store.read_table("cells/dish 0/part-000.parquet", ["pixels"])["pixels"][0].as_py()
    crop = np.frombuffer(stored, np.uint16).reshape(3, 48, 48)
    assert np.array_equal(crop[:, 4:44, 4:44], np.moveaxis(pixels[0], -1, 0)[[1, 0, 2]])
    metrics = pl.DataFrame(pl.from_arrow(cohort.store.read_table("classifiers/svm/metrics.parquet")))
    total = metrics.filter(pl.col("split").eq("test") & pl.col("cluster").is_null()).row(0, named=True)
    everything_positive = 2 * total["num_ctc"] / (total["num_ctc"] + total["num_cells"])
    assert total["f1"] > everything_positive + 0.1
    chosen = labels.filter(pl.col("label") == "ctc")["cell_id"][0]
    found = similar(load_config(None, ["index.encoder=default"]), cohort, [chosen], k=5)
    assert found.height == 5
    assert chosen not in found["cell_id"].to_list()
