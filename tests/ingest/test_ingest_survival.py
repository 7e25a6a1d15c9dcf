"""Ingest that loses its driver, an actor or a machine equals one that lost nothing; both pools work at the same time."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
import ray

from ctc_ray.cohort import Cohort
from ctc_ray.config import PhantomConfig, RunConfig, load_config
from ctc_ray.ingest.stage import run_ingest
from ctc_ray.ingest.statistics import busy_of
from ctc_ray.phantom import write_phantom
from ctc_ray.progress import Progress
from ctc_ray.records import Record, read_record

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]
NUM_FIELDS = 12
"""Of the phantom patient: three batches of the embedding actor."""
QUIET = Progress(quiet=True)
EMBED = ["embed.encoder=default", "embed.precision=fp32"]


def record_of(cohort: Cohort, folder: str) -> Record:
    record = read_record(cohort.store, folder)
    assert record is not None
    return record


def assert_equal_tables(found: Cohort, wanted: Cohort, patient: str) -> None:
    """Same cells to the byte, none lost and none twice; vectors of the same cells in the same order, alike within 1e-5."""
    assert record_of(found, f"cells/{patient}").files == record_of(wanted, f"cells/{patient}").files
    for name in record_of(wanted, f"cells/{patient}").files:
        path = f"cells/{patient}/{name}"
        assert found.store.read_bytes(path) == wanted.store.read_bytes(path)
    tables: list[pa.Table] = [
        cohort.read_columns(f"embeddings/default/{patient}", ["cell_id", "embedding"]) for cohort in (found, wanted)
    ]
    cell_ids = [table["cell_id"].to_pylist() for table in tables]
    assert cell_ids[0] == cell_ids[1]
    assert len(set(cell_ids[0])) == len(cell_ids[0]) > 0
    a, b = (np.stack(table["embedding"].to_numpy()) for table in tables)
    assert np.allclose(a, b, atol=1e-5)


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One patient of twelve whole fields, which the shipped network takes about a second each for."""
    folder = tmp_path_factory.mktemp("phantom") / "cartridges"
    write_phantom(PhantomConfig(patients=1, fields=NUM_FIELDS, seed=5), str(folder), progress=QUIET)
    return str(folder)


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_config(None, EMBED)


@contextlib.contextmanager
def actors_first() -> Iterator[None]:
    """All actors are there before the first field, so that how long each takes to start decides nothing."""
    context = ray.data.DataContext.get_current()
    before, context.wait_for_min_actors_s = context.wait_for_min_actors_s, 400
    try:
        yield
    finally:
        context.wait_for_min_actors_s = before


@pytest.fixture(scope="module")
def whole(phantom: str, config: RunConfig, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    """The phantom patient, ingested without a loss."""
    cohort = Cohort.open(str(tmp_path_factory.mktemp("whole")), create=True)
    with actors_first():
        run_ingest(config, cohort, cartridges=phantom, progress=QUIET)
    return cohort


def test_both_pools_are_busy_at_the_same_time(whole: Cohort) -> None:
    rows = whole.store.read_table("statistics/ingest/P01.parquet").to_pylist()
    assert [row["field"] for row in rows] == list(range(1, NUM_FIELDS + 1))
    busy = busy_of(rows)
    assert busy.both > 0
    assert busy.both <= min(busy.network, busy.embedding)
    assert {row["network_pid"] for row in rows}.isdisjoint({row["embed_pid"] for row in rows})


def actors_of(step: str) -> list[psutil.Process]:
    """Processes of the cluster that this process started which hold an actor of a step of the plan."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it ended while we looked
            if f"MapWorker(MapBatches({step}))" in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_actors_killed_in_the_middle_lose_nothing(
    phantom: str, config: RunConfig, whole: Cohort, tmp_path: Path
) -> None:
    cohort = Cohort.open(str(tmp_path / "killed"), create=True)
    killed: dict[str, int] = {}
    stop = threading.Event()

    def kill_when_half_done() -> None:
        while not stop.wait(0.02):
            if any((tmp_path / "killed").glob("cells/*/_parts/*/field-*.parquet")):
                for step in ("CandidateFinder", "FieldEmbedder"):
                    for process in actors_of(step):
                        with contextlib.suppress(psutil.Error):  # it ended at this very moment
                            process.kill()
                            killed[step] = process.pid
                return

    thread = threading.Thread(target=kill_when_half_done, daemon=True)
    thread.start()
    try:
        with actors_first():
            result = run_ingest(config, cohort, cartridges=phantom, progress=QUIET)
    finally:
        stop.set()
        thread.join()
    assert set(killed) == {"CandidateFinder", "FieldEmbedder"}
    assert (result.units_computed, result.set_aside) == (NUM_FIELDS, 0)
    assert_equal_tables(cohort, whole, "P01")
    rows = cohort.store.read_table("statistics/ingest/P01.parquet").to_pylist()
    assert {row["network_pid"] for row in rows} - {killed["CandidateFinder"]}  # another took over
    assert {row["embed_pid"] for row in rows} - {killed["FieldEmbedder"]}


RUN = """
import sys
import ray
from ctc_ray.cluster import connect
from ctc_ray.cohort import Cohort
from ctc_ray.config import RayConfig, load_config
from ctc_ray.ingest.stage import run_ingest
from ctc_ray.progress import Progress

folder, cartridges, *overrides = sys.argv[1:]
with connect(config=RayConfig(num_cpus=4, object_store_mb=200)):
    ray.data.DataContext.get_current().wait_for_min_actors_s = 400
    run_ingest(load_config(None, overrides), Cohort.open(folder, create=True), cartridges=cartridges, progress=Progress())
"""


def test_driver_killed_in_the_middle_and_run_again_equals_an_uninterrupted_run(
    phantom: str, config: RunConfig, whole: Cohort, tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    command = [sys.executable, "-c", RUN, str(folder), phantom, *EMBED]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_until(lambda: any(folder.glob("cells/P01/_parts/*/field-*.parquet")), process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
    cohort = Cohort.open(str(folder), create=True)
    assert read_record(cohort.store, "cells/P01") is None
    result = run_ingest(config, cohort, cartridges=phantom, progress=QUIET)
    assert result.units_computed > 0
    assert result.units_reused > 0
    for output in ("cells/P01", "embeddings/default/P01"):
        record = record_of(cohort, output)
        assert record.units_computed > 0
        assert record.units_reused > 0
        assert record.units_computed + record.units_reused == NUM_FIELDS
    assert_equal_tables(cohort, whole, "P01")


def wait_until(done: Callable[[], bool], process: subprocess.Popen[bytes], *, timeout_s: float = 500.0) -> None:
    """Wait for a sign of half-done work."""
    deadline = time.monotonic() + timeout_s
    while not done():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "the run finished no field"
        time.sleep(0.02)


@pytest.mark.timeout(1500)
def test_three_machines_share_the_work_and_the_loss_of_one_loses_no_cell(
    write_cartridge: Callable[..., Path], bright_spot_weights: Path, tmp_path: Path
) -> None:
    num_fields = 24
    write_cartridge("A", frames=range(1, num_fields + 1), grid=(4, 6))
    script = Path(__file__).with_name("ingest_on_machines.py")
    arguments = [str(tmp_path), str(tmp_path / "cartridges"), f"segment.weights={bright_spot_weights}", *EMBED]
    with (tmp_path / "log").open("wb") as log:
        code = subprocess.run(
            [sys.executable, str(script), *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=log,
            timeout=1400,
        ).returncode
    assert code == 0, (tmp_path / "log").read_text()[-4000:]
    kept, lost = (Cohort.open(str(tmp_path / name)) for name in ("kept", "lost"))
    workers = [row for folder in ("cells/A", "embeddings/default/A") for row in record_of(kept, folder).workers]
    assert len({row["node"] for row in workers}) >= 2
    assert sum(row["units"] for row in workers) == 2 * num_fields
    assert_equal_tables(lost, kept, "A")
    rows = lost.store.read_table("statistics/ingest/A.parquet")
    assert rows["field"].to_pylist() == list(range(1, num_fields + 1))
