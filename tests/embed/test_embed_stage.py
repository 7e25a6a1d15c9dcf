"""The embed stage: complete per patient, extended by new ones, stale where cells changed. What it survives: `test_embed_survival.py`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from cells_cohort import add_patient, small_cohort

from ctc_ray.cohort import Cohort
from ctc_ray.config import load_config
from ctc_ray.embed.stage import plan_embed, run_embed
from ctc_ray.errors import MissingInputError, StaleOutputError
from ctc_ray.progress import Progress
from ctc_ray.records import StageResult, State

ROLES = {"007": "train", "12": "test", "Müller 3": "train"}
OVERRIDES = ["embed.encoder=default", "embed.unit_cells=4", "embed.num_actors=2"]


def _run(cohort: Cohort, *overrides: str, force: bool = False, patients: list[str] | None = None) -> StageResult:
    config = load_config(None, [*OVERRIDES, *overrides])
    return run_embed(config, cohort, patients=patients, force=force, progress=Progress(quiet=True))


def _vectors(cohort: Cohort, patient: str) -> pl.DataFrame:
    frame = pl.from_arrow(cohort.read_columns(f"embeddings/default/{patient}", ["cell_id", "embedding"]))
    assert isinstance(frame, pl.DataFrame)
    return frame.sort("cell_id")


def test_run_without_cells_or_encoder_names_the_command(tmp_path: Path) -> None:
    cohort = small_cohort(tmp_path / "c", ROLES, cells=3)
    with pytest.raises(MissingInputError, match="ctc-ray pretrain"):
        _run(cohort, "embed.encoder=dino")
    cohort.store.delete("cells/12/_record.json")
    with pytest.raises(MissingInputError, match="ctc-ray segment"):
        _run(cohort)


@pytest.mark.ray
@pytest.mark.slow
def test_embedding_is_complete_per_patient_and_extends(ray_cluster: None, tmp_path: Path) -> None:
    cohort = small_cohort(tmp_path / "c", ROLES, cells=10, shards=2)
    result = _run(cohort)
    assert (result.units_computed, result.units_reused) == (12, 0)
    assert result.counts == {"patients": 3, "cells": 30, "width": 128}
    record = cohort.require("embeddings/default/007", "embed")
    assert list(record.files) == ["part-000.parquet", "part-001.parquet"]
    assert sum(row["units"] for row in record.workers) == 4
    assert not cohort.store.exists("embeddings/default/007/_parts")
    cells = cohort.read_columns("cells/007", ["cell_id"])["cell_id"].to_pylist()
    assert _vectors(cohort, "007")["cell_id"].to_list() == sorted(cells)
    again = _run(cohort)
    assert (again.units_computed, again.units_reused, again.counts) == (0, 12, result.counts)

    # New patients: only they are computed.
    cohort.write_patients(
        pl.concat([cohort.patients(), pl.DataFrame({"patient": ["new"], "role": ["final"], "cartridge": ["new"]})])
    )
    add_patient(cohort, "new", np.random.default_rng(0).integers(0, 255, (5, 3, 48, 48)).astype(np.uint8))
    extended = _run(cohort)
    assert (extended.units_computed, extended.units_reused) == (2, 12)

    # Other cells of a patient make its vectors stale, and only its own.
    add_patient(cohort, "12", np.random.default_rng(1).integers(0, 255, (5, 3, 48, 48)).astype(np.uint8), digest="b")
    states = {row.unit: row.state for row in plan_embed(load_config(None, OVERRIDES), cohort)}
    assert {unit for unit, state in states.items() if state is State.STALE} == {"12"}
    with pytest.raises(StaleOutputError, match="--force"):
        _run(cohort)
    forced = _run(cohort, force=True)
    assert (forced.units_computed, forced.units_reused) == (2, 10)
    assert _vectors(cohort, "12").height == 5
    assert list(cohort.require("embeddings/default/12", "embed").files) == ["part-000.parquet"]

    # Precision is fixed by the first run.
    assert cohort.store.read_json("embeddings/default/precision.json")["precision"] in ("fp32", "bf16")
