"""The pretrain stage: Ray Train over a cohort, resumable, true to the roles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from cells_cohort import add_patient, cells_table, small_cohort
from small_runs import SMALL

from ctc_ray.cohort import Cohort
from ctc_ray.config import RunConfig, load_config
from ctc_ray.errors import (
    ConfigError,
    MissingInputError,
    ResourceError,
    RoleLeakError,
    SchemaError,
    StaleOutputError,
    WeightsError,
)
from ctc_ray.pretrain.stage import import_encoder, placement, plan_pretrain, run_pretrain
from ctc_ray.progress import Progress
from ctc_ray.records import Record, State, identity_of, publish

ROLES = {"007": "pretrain", "12": "pretrain", "Müller 3": "train"}


def _config(*overrides: str) -> RunConfig:
    return load_config(None, [*SMALL, "pretrain.steps=6", "pretrain.num_workers=1", *overrides])


def _run(config: RunConfig, cohort: Cohort, *, force: bool = False) -> tuple[int, int]:
    result = run_pretrain(config, cohort, force=force, progress=Progress(quiet=True))
    return result.units_computed, result.units_reused


def test_plan_without_roles_says_so(tmp_path: Path) -> None:
    cohort = small_cohort(tmp_path / "c", {"007": "train"}, cells=4)
    (row,) = plan_pretrain(_config(), cohort)
    assert row.state is State.ABSENT
    assert "no patient has the role pretrain" in row.why


def test_run_without_roles_raises_and_names_the_command(tmp_path: Path) -> None:
    cohort = small_cohort(tmp_path / "c", {"007": "train"}, cells=4)
    with pytest.raises(MissingInputError, match="ctc-ray split"):
        _run(_config(), cohort)


def test_run_over_unsegmented_patient_raises(tmp_path: Path) -> None:
    cohort = small_cohort(tmp_path / "c", ROLES, cells=4)
    cohort.store.delete("cells/12/_record.json")
    assert "12" in plan_pretrain(_config(), cohort)[0].why
    with pytest.raises(MissingInputError, match="ctc-ray segment"):
        _run(_config(), cohort)


def test_import_writes_encoder_once_and_refuses_another_of_the_name(tmp_path: Path) -> None:
    import torch

    from ctc_ray.pretrain.encoder import build_backbone

    cohort = Cohort.open(str(tmp_path / "c"), create=True)
    for seed, name in ((0, "a.pt"), (1, "b.pt")):
        torch.manual_seed(seed)
        state = build_backbone(_config().pretrain.architecture).state_dict()
        torch.save({f"backbone.{key}": value for key, value in state.items()}, tmp_path / name)
    config = _config()
    assert import_encoder(config, cohort, tmp_path / "a.pt", "imported").units_computed == 1
    assert import_encoder(config, cohort, tmp_path / "a.pt", "imported").units_reused == 1
    record = cohort.require("encoders/imported", "import-encoder")
    assert record.stage == "import-encoder"
    with pytest.raises(StaleOutputError, match="--force"):
        import_encoder(config, cohort, tmp_path / "b.pt", "imported")
    assert import_encoder(config, cohort, tmp_path / "b.pt", "imported", force=True).units_computed == 1


def test_auto_holds_the_crops_where_a_workers_share_fits() -> None:
    def placed(num_crops: int, dtype: type, *overrides: str) -> str:
        return placement(_config(*overrides).pretrain, num_crops, 3, np.dtype(dtype))

    assert placed(1_000_000, np.uint8) == "resident"  # 6.9 GB
    assert placed(1_200_000, np.uint8) == "streaming"
    assert placed(1_200_000, np.uint8, "pretrain.num_workers=2") == "resident"
    assert placed(400_000, np.uint16) == "streaming"  # held in 32 bits: 11 GB
    assert placed(400_000, np.uint16, "pretrain.resident_gb=12") == "resident"
    assert placed(10**9, np.uint8, "pretrain.data=resident") == "resident"


@pytest.mark.ray
@pytest.mark.slow
def test_two_workers_publish_an_encoder_and_a_second_run_reuses_it(ray_cluster: None, tmp_path: Path) -> None:
    cohort = small_cohort(tmp_path / "c", ROLES, shards=2)
    config = _config("pretrain.num_workers=2")
    assert _run(config, cohort) == (6, 0)
    record = cohort.require("encoders/dino", "pretrain")
    assert set(record.files) == {"encoder.safetensors", "encoder.json", "metrics.parquet"}
    assert set(record.inputs) == {"cells/007", "cells/12"}
    assert not cohort.store.exists("encoders/dino/_train")
    rule = cohort.store.read_json("encoders/dino/encoder.json")["intensity"]
    assert all(0 < low < high <= 1 for low, high in zip(rule["low"], rule["high"], strict=True))
    metrics = pl.from_arrow(cohort.store.read_table("encoders/dino/metrics.parquet"))
    assert isinstance(metrics, pl.DataFrame)
    assert metrics["step"].to_list() == [1, 2, 3, 4, 5, 6]
    assert metrics["workers"].to_list() == [2] * 6
    assert record.counts["collapsed_steps"] == metrics.filter(pl.col("collapse") != "").height
    (events,) = cohort.store.list_files("encoders/dino/tensorboard")
    assert events.endswith("tfevents.0000000006")
    assert _run(config, cohort) == (0, 6)
    assert plan_pretrain(config, cohort)[0].state is State.COMPLETE

    # A patient that joins later does not make the encoder stale; other cells of its own patients do.
    cohort.write_patients(
        pl.concat([cohort.patients(), pl.DataFrame({"patient": ["new"], "role": ["pretrain"], "cartridge": ["new"]})])
    )
    add_patient(cohort, "new", np.zeros((4, 3, 48, 48), np.uint8))
    assert plan_pretrain(config, cohort)[0].state is State.COMPLETE
    crops = np.random.default_rng(0).integers(0, 255, (24, 3, 48, 48)).astype(np.uint8)
    add_patient(cohort, "12", crops, digest="b")
    assert plan_pretrain(config, cohort)[0].state is State.STALE
    with pytest.raises(StaleOutputError, match="--force"):
        _run(config, cohort)
    cohort.write_patients(cohort.patients().with_columns(pl.lit("test").alias("role")))
    cohort.write_patients(
        cohort.patients().with_columns(
            pl.when(pl.col("patient") == "new").then(pl.lit("pretrain")).otherwise("role").alias("role")
        )
    )
    with pytest.raises(RoleLeakError, match="007"):
        _run(config, cohort)


@pytest.mark.ray
@pytest.mark.slow
def test_streaming_data_trains_to_the_last_step(ray_cluster: None, tmp_path: Path) -> None:
    cohort = small_cohort(tmp_path / "c", ROLES)
    assert _run(_config("pretrain.data=streaming", "pretrain.num_workers=2"), cohort) == (6, 0)


@pytest.mark.ray
def test_bad_input_raises_before_training(ray_cluster: None, tmp_path: Path) -> None:
    cohort = small_cohort(tmp_path / "few", ROLES, cells=1)
    with pytest.raises(SchemaError, match="fewer than one batch"):
        _run(_config(), cohort)
    with pytest.raises(ConfigError, match="gives 3 workers fewer than 2 crops"):
        _run(_config("pretrain.num_workers=3"), cohort)
    with pytest.raises(ConfigError, match=r"pretrain\.min_workers 2 is more"):
        _run(_config("pretrain.min_workers=2", "pretrain.batch_size=2"), cohort)
    with pytest.raises(ResourceError, match=r"0 GPUs.*pretrain\.use_gpu=false"):
        _run(_config("pretrain.use_gpu=true", "pretrain.batch_size=2"), cohort)
    blank = small_cohort(tmp_path / "blank", ROLES, cells=4)
    for patient in ("007", "12"):
        add_patient(blank, patient, np.full((8, 3, 48, 48), 9, np.uint8))
    with pytest.raises(SchemaError, match="one single value"):
        _run(_config(), blank)
    wide = small_cohort(tmp_path / "wide", ROLES, cells=4)
    for patient in ("007", "12"):
        add_patient(wide, patient, np.full((8, 3, 48, 48), 60_000, np.uint16))
    with pytest.raises(SchemaError, match=r"pretrain\.full_scale"):
        _run(_config(), wide)
    # Counts are whole numbers, so that no pixel is NaN; a table of other numbers, which ours never are, is refused.
    for patient in ("007", "12"):
        _add_float_crops(wide, patient, np.full((8, 3, 48, 48), np.nan, np.float32))
    with pytest.raises(SchemaError, match="float32, expected uint8 or uint16"):
        _run(_config(), wide)


def _add_float_crops(cohort: Cohort, patient: str, crops: np.ndarray) -> None:
    field = pa.field("pixels", pa.binary(crops[0].nbytes), metadata={"shape": "[3, 48, 48]", "dtype": "float32"})
    pixels = pa.FixedSizeBinaryArray.from_buffers(field.type, len(crops), [None, pa.py_buffer(crops)])
    table = cells_table(patient, np.zeros(crops.shape, np.uint8))
    table = table.set_column(table.column_names.index("pixels"), field, pixels)
    record = Record("segment", patient, identity_of("segment", {"digest": "float"}, {}), {}, {})
    publish(cohort.store, cohort.cells(patient), {"part-000.parquet": table}, record)


@pytest.mark.ray
def test_shipped_encoder_is_not_continued_on_cells_of_four_channels(ray_cluster: None, tmp_path: Path) -> None:
    cohort = small_cohort(tmp_path / "c", ROLES, cells=4)
    crops = np.random.default_rng(0).integers(0, 255, (8, 4, 48, 48)).astype(np.uint8)
    for patient in ("007", "12"):
        add_patient(cohort, patient, crops)
    config = load_config(None, ["pretrain.batch_size=4", "pretrain.num_workers=1", "pretrain.precision=fp32"])
    with pytest.raises(WeightsError, match=r"takes 3 channels.*have 4: set pretrain\.init=random"):
        _run(config, cohort)
