"""Whatever is lost on the way, no row is lost and none comes twice, and what was done is not done again."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from cells_cohort import small_cohort
from killed_run import run_and_kill

from ctc_ray.cohort import Cohort
from ctc_ray.config import load_config
from ctc_ray.embed import Embedder
from ctc_ray.embed.stage import plan_embed, run_embed
from ctc_ray.errors import SchemaError
from ctc_ray.progress import Progress
from ctc_ray.records import Record, State, read_failures
from ctc_ray.schema import unpack_pixels
from ctc_ray.storage import StorageError

ROOT = Path(__file__).parents[2]
ROLES = {"007": "train", "12": "test"}
OVERRIDES = ["embed.encoder=default", "embed.precision=fp32", "embed.num_actors=2"]

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


def run(cohort: Cohort, *overrides: str) -> tuple[int, int]:
    result = run_embed(load_config(None, [*OVERRIDES, *overrides]), cohort, progress=Progress(quiet=True))
    return result.units_computed, result.units_reused


def half_done(cohort: Cohort) -> Callable[[], bool]:
    folder = cohort.store.local_path("embeddings")
    return lambda: any(folder.glob("default/*/_parts/*/part-*.parquet"))


def assert_complete(cohort: Cohort, *, resumed: bool) -> None:
    """Ids are those of the cells in their order, vectors those of the plain loop, and nothing is left over."""
    embed = Embedder.load(precision="fp32")
    records: list[Record] = []
    ids: list[str] = []
    for patient in ROLES:
        records.append(cohort.require(f"embeddings/default/{patient}", "embed"))
        assert not cohort.store.exists(f"embeddings/default/{patient}/_parts")
        cells, embeddings = (cohort.shards(folder) for folder in (f"cells/{patient}", f"embeddings/default/{patient}"))
        assert [path.rsplit("/", 1)[-1] for path in cells] == [path.rsplit("/", 1)[-1] for path in embeddings]
        for shard, vectors in zip(cells, embeddings, strict=True):
            given, found = cohort.store.read_table(shard), cohort.store.read_table(vectors)
            assert found["cell_id"].to_pylist() == given["cell_id"].to_pylist()
            ids += found["cell_id"].to_pylist()
            expected = embed(unpack_pixels(given["pixels"], given.schema.field("pixels")))
            assert np.allclose(
                np.stack(found["embedding"].to_numpy()), expected, rtol=0, atol=1e-5 * abs(expected).max()
            )
    assert len(set(ids)) == len(ids) == sum(record.counts["cells"] for record in records)
    assert sum(record.units_computed for record in records) > 0
    assert (sum(record.units_reused for record in records) > 0) == resumed


@contextlib.contextmanager
def done_to_actors(act: Callable[[psutil.Process], object], when: Callable[[], bool]) -> Iterator[list[int]]:
    """While the block runs, do something to every embedding actor at the first sign of half-done work; yields their ids."""
    done: list[int] = []
    stop = threading.Event()

    def actors() -> list[psutil.Process]:
        found = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it ended while we looked
                if "EmbedUnits" in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def watch() -> None:
        while not stop.wait(0.01):
            if when() and (found := actors()):
                for process in found:
                    with contextlib.suppress(psutil.Error):  # it ended at this very moment
                        act(process)
                        done.append(process.pid)
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield done
    finally:
        stop.set()
        thread.join()


def test_killed_actors_are_replaced_and_lose_nothing(ray_cluster: None, tmp_path: Path) -> None:
    cohort = small_cohort(tmp_path / "c", ROLES, cells=200)
    with done_to_actors(psutil.Process.kill, half_done(cohort)) as killed:
        assert run(cohort, "embed.unit_cells=4") == (100, 0)
    assert killed
    assert_complete(cohort, resumed=False)
    workers = [row["pid"] for p in ROLES for row in cohort.require(f"embeddings/default/{p}", "embed").workers]
    assert set(workers) - set(killed)


def test_killed_driver_is_run_again_and_does_what_is_missing(ray_cluster: None, tmp_path: Path) -> None:
    cohort = small_cohort(tmp_path / "c", ROLES, cells=200)
    overrides = ["embed.unit_cells=4"]
    assert run_and_kill("embed", tmp_path / "c", [*OVERRIDES, *overrides], half_done(cohort))
    computed, reused = run(cohort, *overrides, "embed.num_actors=1")
    assert reused > 0
    assert computed + reused == 100
    assert_complete(cohort, resumed=True)


def test_shard_that_cannot_be_read_is_mended_and_the_rest_is_reused(ray_cluster: None, tmp_path: Path) -> None:
    cohort = small_cohort(tmp_path / "c", ROLES, cells=40, shards=2)
    file = tmp_path / "c" / "cells" / "12" / "part-001.parquet"
    whole = file.read_bytes()
    damaged = bytearray(whole)
    damaged[200:900] = bytes(700)  # pages are damaged, the footer is not
    file.write_bytes(bytes(damaged))
    overrides = ["embed.unit_cells=10"]
    with pytest.raises(SchemaError, match=r"2 of 8 units could not be embedded.*part-001\.parquet"):
        run(cohort, *overrides)
    states = {row.unit: row.state for row in plan_embed(load_config(None, [*OVERRIDES, *overrides]), cohort)}
    assert states == {"007": State.COMPLETE, "12": State.ABSENT}
    assert read_failures(cohort.store, "embed")["unit"].to_list() == ["12", "12"]
    file.write_bytes(whole)
    assert run(cohort, *overrides) == (2, 6)
    assert read_failures(cohort.store, "embed").is_empty()
    assert_complete(cohort, resumed=True)


def test_full_disk_ends_the_run_with_one_message_and_the_next_goes_on(ray_cluster: None, tmp_path: Path) -> None:
    cohort = small_cohort(tmp_path / "c", ROLES, cells=1200)
    overrides = ["embed.unit_cells=240"]  # parts of more than 100 kB

    def fill(actor: psutil.Process) -> None:
        actor.rlimit(psutil.RLIMIT_FSIZE, (90_000, resource.RLIM_INFINITY))  # larger files find no room

    with done_to_actors(fill, half_done(cohort)) as full, pytest.raises(StorageError, match="free space"):
        run(cohort, *overrides)
    assert full
    parts = list((tmp_path / "c" / "embeddings").glob("default/*/_parts/*/*"))
    assert parts
    assert all(part.name.startswith("part-") for part in parts)  # no half-written file is left
    computed, reused = run(cohort, *overrides)
    assert (computed + reused, reused) == (10, len(parts))
    assert_complete(cohort, resumed=True)


def test_lost_machine_is_done_without(tmp_path: Path) -> None:
    """Three machines of one processor each; one is lost, and nothing takes its place."""
    cohort = small_cohort(tmp_path / "c", ROLES, cells=300)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "RAY_health_check_initial_delay_ms": "0",
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_failure_threshold": "25",  # seconds: a busy machine is not a lost one
    }
    script = Path(__file__).with_name("embed_on_machines.py")
    overrides = [*OVERRIDES, "embed.unit_cells=4", "embed.num_actors=3"]
    command = [sys.executable, str(script), str(tmp_path / "c"), *overrides]
    subprocess.run(command, env=environment, check=True, timeout=800)
    assert_complete(cohort, resumed=False)
    nodes = {row["node"] for p in ROLES for row in cohort.require(f"embeddings/default/{p}", "embed").workers}
    assert len(nodes) >= 2
