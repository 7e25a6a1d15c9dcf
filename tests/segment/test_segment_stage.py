"""The stage through Ray: complete, resumed, set aside, stale, extended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from ctc_ray.cohort import Cohort
from ctc_ray.config import RunConfig, load_config
from ctc_ray.errors import CartridgeError, ConfigError, StaleOutputError, TooManyFailuresError
from ctc_ray.progress import Progress
from ctc_ray.records import State, read_failures, read_record
from ctc_ray.schema import cells_schema, unpack_pixels
from ctc_ray.segment.stage import plan_segment, run_segment

pytestmark = pytest.mark.ray
QUIET = Progress(quiet=True)
WriteCartridge = Callable[..., Path]


@pytest.fixture
def config(bright_spot_weights: Path) -> RunConfig:
    return load_config(None, [f"segment.weights={bright_spot_weights}", "segment.max_failure_fraction=0.5"])


@pytest.fixture
def cohort(tmp_path: Path) -> Cohort:
    return Cohort.open(str(tmp_path / "cohort"), create=True)


@pytest.fixture
def cartridges(tmp_path: Path) -> str:
    return str(tmp_path / "cartridges")


def cells(cohort: Cohort, patient: str) -> pl.DataFrame:
    tables = [cohort.store.read_table(path) for path in cohort.shards(cohort.cells(patient))]
    return pl.concat([pl.DataFrame(pl.from_arrow(table)) for table in tables]).sort("cell_id")


@pytest.mark.usefixtures("ray_cluster")
def test_segment_of_several_patients_writes_cells_duplicates_and_records(
    config: RunConfig, cohort: Cohort, cartridges: str, write_cartridge: WriteCartridge
) -> None:
    patients = ["007", "12", "Müller 3"]
    for patient in patients:
        write_cartridge(patient)
    result = run_segment(config, cohort, cartridges=cartridges, progress=QUIET)
    assert (result.units_computed, result.units_reused, result.set_aside) == (6, 0, 0)
    assert cohort.patient_ids() == patients
    assert cohort.patients()["role"].null_count() == 3
    for patient in patients:
        record = read_record(cohort.store, cohort.cells(patient))
        assert record is not None
        assert record.units_computed == 2
        assert sum(worker["units"] for worker in record.workers) == 2
        (path,) = cohort.shards(cohort.cells(patient))
        table = cohort.store.read_table(path)
        assert table.schema.equals(cells_schema("uint8"), check_metadata=True)
        assert set(table["patient"].to_pylist()) == {patient}
        assert set(table["field"].to_pylist()) == {1, 2}
        crops = unpack_pixels(table["pixels"], table.schema.field("pixels"))
        assert crops.shape[1:] == (3, 48, 48)
        physical = cohort.physical_ids(patient)
        assert set(physical["cell_id"]) == set(table["cell_id"].to_pylist())
        assert set(physical["physical_id"]) <= set(physical["cell_id"])
        assert not cohort.store.exists(f"{cohort.cells(patient)}/_parts")
    assert cohort.store.read_json("cohort.json")["precision"]["segment"] in ("fp32", "bf16")


@pytest.mark.usefixtures("ray_cluster")
def test_segment_again_computes_nothing_and_new_patients_alone_are_computed(
    config: RunConfig, cohort: Cohort, cartridges: str, write_cartridge: WriteCartridge
) -> None:
    write_cartridge("A")
    run_segment(config, cohort, cartridges=cartridges, progress=QUIET)
    before = read_record(cohort.store, "cells/A")
    again = run_segment(config, cohort, cartridges=cartridges, progress=QUIET)
    assert (again.units_computed, again.units_reused) == (0, 2)
    write_cartridge("B")
    extended = run_segment(config, cohort, cartridges=cartridges, progress=QUIET)
    assert (extended.units_computed, extended.units_reused) == (2, 2)
    assert read_record(cohort.store, "cells/A") == before
    assert [row.state for row in plan_segment(config, cohort, cartridges=cartridges)] == [State.COMPLETE] * 2


@pytest.mark.usefixtures("ray_cluster")
def test_segment_with_finished_parts_reuses_them_and_gives_the_same_cells(
    config: RunConfig, cohort: Cohort, cartridges: str, write_cartridge: WriteCartridge, tmp_path: Path
) -> None:
    write_cartridge("A", frames=(1, 2, 3, 4), grid=(2, 2))
    run_segment(config, cohort, cartridges=cartridges, progress=QUIET)
    whole = cells(cohort, "A")
    # What a run killed after two fields leaves: their parts, and no record.
    record = read_record(cohort.store, "cells/A")
    assert record is not None
    interrupted = Cohort.open(str(tmp_path / "interrupted"), create=True)
    (path,) = cohort.shards("cells/A")
    table = cohort.store.read_table(path)
    for number in (2, 3):
        part = table.filter(np.asarray(table["field"]) == number)
        interrupted.store.write_table(f"cells/A/_parts/{record.identity[:12]}/field-{number:05d}.parquet", part)
    (row,) = plan_segment(config, interrupted, cartridges=cartridges)
    assert "2 fields to segment, 2 finished" in row.why
    result = run_segment(config, interrupted, cartridges=cartridges, progress=QUIET)
    assert (result.units_computed, result.units_reused) == (2, 2)
    assert cells(interrupted, "A").equals(whole)


@pytest.mark.usefixtures("ray_cluster")
def test_bad_fields_are_set_aside_and_tried_again_when_mended(
    config: RunConfig, cohort: Cohort, cartridges: str, write_cartridge: WriteCartridge, tmp_path: Path
) -> None:
    folder = write_cartridge("A", frames=(1, 2, 3), grid=(1, 3))
    good = (folder / "Ap002.tif").read_bytes()
    (folder / "Ap002.tif").write_bytes(good[:3000])
    (tmp_path / "cartridges" / "empty").mkdir()
    result = run_segment(config, cohort, cartridges=cartridges, progress=QUIET)
    assert (result.units_computed, result.set_aside) == (2, 2)
    failures = read_failures(cohort.store, "segment", "A")
    assert failures["source"].to_list() == ["A/processed/Ap002.tif"]
    assert failures["kind"].to_list() == ["CartridgeError"]
    assert "no images" in read_failures(cohort.store, "segment", "empty")["message"][0]
    assert set(cells(cohort, "A")["field"]) == {1, 3}
    kept = cells(cohort, "A")

    (folder / "Ap002.tif").write_bytes(good)
    with pytest.raises(StaleOutputError, match="--retry-failed"):
        run_segment(config, cohort, cartridges=cartridges, progress=QUIET)
    retried = run_segment(config, cohort, cartridges=cartridges, retry_failed=True, progress=QUIET)
    assert (retried.units_computed, retried.units_reused) == (1, 2)
    assert read_failures(cohort.store, "segment", "A").is_empty()
    after = cells(cohort, "A")
    assert set(after["field"]) == {1, 2, 3}
    assert after.filter(pl.col("field") != 2).equals(kept)
    assert set(cohort.physical_ids("A")["cell_id"]) == set(after["cell_id"])


@pytest.mark.usefixtures("ray_cluster")
def test_too_many_bad_fields_fail_the_stage_after_the_rest_is_saved(
    config: RunConfig, cohort: Cohort, cartridges: str, write_cartridge: WriteCartridge
) -> None:
    folder = write_cartridge("A", frames=(1, 2, 3), grid=(1, 3))
    for frame in (2, 3):
        (folder / f"Ap{frame:03d}.tif").write_bytes(b"")
    for _ in range(2):  # a second run says the same and computes nothing
        with pytest.raises(TooManyFailuresError, match="2 of 3 fields"):
            run_segment(config, cohort, cartridges=cartridges, progress=QUIET)
        assert set(cells(cohort, "A")["field"]) == {1}


@pytest.mark.usefixtures("ray_cluster")
def test_stale_cells_are_refused_and_replaced_by_force(
    config: RunConfig, cohort: Cohort, cartridges: str, write_cartridge: WriteCartridge
) -> None:
    write_cartridge("A")
    run_segment(config, cohort, cartridges=cartridges, progress=QUIET)
    old = cells(cohort, "A")
    other = config.model_copy(update={"segment": config.segment.model_copy(update={"prob_threshold": 0.9})})
    with pytest.raises(StaleOutputError, match="--force"):
        run_segment(other, cohort, cartridges=cartridges, progress=QUIET)
    assert cells(cohort, "A").equals(old)
    result = run_segment(other, cohort, cartridges=cartridges, force=True, progress=QUIET)
    assert result.units_computed == 2
    new = cells(cohort, "A")
    assert new["prob"].min() > 0.9
    assert not set(new["cell_id"]) & set(old["cell_id"])


@pytest.mark.usefixtures("ray_cluster")
def test_ordinary_images_are_segmented_with_a_channel_map(
    config: RunConfig, cohort: Cohort, cartridges: str, tmp_path: Path
) -> None:
    import tifffile

    image = np.random.default_rng(0).poisson(5, (90, 130)).astype(np.uint8)
    image[40:50, 60:70] = 200
    (tmp_path / "cartridges" / "nuclei").mkdir(parents=True)
    tifffile.imwrite(tmp_path / "cartridges" / "nuclei" / "img2d.tif", image)
    mapped = config.segment.model_copy(update={"channel_map": {"DAPI": 0, "CK": 0, "CD45": None}})
    result = run_segment(
        config.model_copy(update={"segment": mapped}),
        cohort,
        cartridges=cartridges,
        patients=["nuclei"],
        progress=QUIET,
    )
    assert result.counts["cells"] >= 1
    found = cells(cohort, "nuclei")
    assert found["cd45_max"].max() == 0
    assert found["global_row"].equals(found["row"])


def test_unknown_patient_or_empty_folders_are_refused(
    config: RunConfig, cohort: Cohort, cartridges: str, write_cartridge: WriteCartridge, tmp_path: Path
) -> None:
    write_cartridge("A")
    with pytest.raises(ConfigError, match="'B'"):
        plan_segment(config, cohort, cartridges=cartridges, patients=["B"])
    (tmp_path / "other" / "B").mkdir(parents=True)
    with pytest.raises(CartridgeError, match="no images"):
        plan_segment(config, cohort, cartridges=str(tmp_path / "other"))


RUN = """
import sys
from ctc_ray.cohort import Cohort
from ctc_ray.config import load_config
from ctc_ray.progress import Progress
from ctc_ray.segment.stage import run_segment
config = load_config(None, [f"segment.weights={sys.argv[3]}"])
print(run_segment(config, Cohort.open(sys.argv[1], create=True), cartridges=sys.argv[2], progress=Progress(quiet=True)))
"""


@pytest.mark.slow
def test_segment_killed_in_the_middle_and_run_again_equals_an_uninterrupted_run(
    cartridges: str, write_cartridge: WriteCartridge, bright_spot_weights: Path, tmp_path: Path
) -> None:
    write_cartridge("A", frames=range(1, 17), grid=(4, 4))

    def start(name: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", RUN, str(tmp_path / name), cartridges, str(bright_spot_weights)]
        return subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"RAY_AUTH_MODE": "disabled"})

    assert start("whole").wait(timeout=600) == 0
    parts = tmp_path / "killed" / "cells" / "A" / "_parts"
    process = start("killed")
    deadline = time.monotonic() + 400
    while len(list(parts.rglob("field-*.parquet"))) < 3:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "the run finished no field"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    assert start("killed").wait(timeout=600) == 0
    whole, killed = (Cohort.open(str(tmp_path / name)) for name in ("whole", "killed"))
    record = read_record(killed.store, "cells/A")
    assert record is not None
    assert record.units_reused > 0
    assert record.units_computed > 0
    assert record.units_reused + record.units_computed == 16
    assert cells(killed, "A").equals(cells(whole, "A"))
    assert killed.physical_ids("A").sort("cell_id").equals(whole.physical_ids("A").sort("cell_id"))
