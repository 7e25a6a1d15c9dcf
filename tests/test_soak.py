"""The soak: what it kills and when, what it finds, and a short one that has to end without a difference."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from ctc_ray.cohort import Cohort
from ctc_ray.records import read_record

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # the benchmarks are scripts beside the package
killed_runs, soak = (importlib.import_module(f"benchmarks.{name}") for name in ("killed_runs", "soak"))
Kill, Run, Job = killed_runs.Kill, killed_runs.Run, killed_runs.Job


@pytest.fixture
def finished(tmp_path: Path, mixture: ModuleType) -> tuple[Any, Path, Path]:
    """A job, a finished cohort and a copy of it."""
    mixture.build_cohort(tmp_path / "a", roles={"P1": "train", "P2": "train"}, num_cells=20)
    shutil.copytree(tmp_path / "a" / "cohort", tmp_path / "b")
    return Job("embed", tmp_path, (), ("embeddings/dino",)), tmp_path / "b", tmp_path / "a" / "cohort"


def _shard(cohort: Path) -> tuple[Cohort, str, list[str], np.ndarray]:
    opened = Cohort.open(str(cohort))
    path = opened.shards("embeddings/dino/P1")[0]
    table = opened.store.read_table(path)
    vectors = table["embedding"].combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1).copy()
    return opened, path, table["cell_id"].to_pylist(), vectors


def test_equal_cohorts_have_no_difference(finished: Any) -> None:
    assert soak.compare(*finished) == []


def test_vectors_that_moved_are_found_beyond_the_tolerance(finished: Any, mixture: ModuleType) -> None:
    cohort, path, ids, vectors = _shard(finished[1])
    for moved, message in ((5e-6, []), (1e-3, ["vectors differ by 0.001"]), (np.nan, ["vectors differ by nan"])):
        vectors[3, 2] += moved
        _rewrite(cohort, path, ids, vectors)
        found = soak.compare(*finished)
        assert [problem.split(": ")[-1] for problem in found] == message


def test_cells_in_another_order_or_twice_are_found(finished: Any) -> None:
    cohort, path, ids, vectors = _shard(finished[1])
    _rewrite(cohort, path, [ids[1], ids[0], *ids[2:]], vectors)
    assert any("in another order" in problem for problem in soak.compare(*finished))
    _rewrite(cohort, path, [ids[1], *ids[1:]], vectors)
    assert "1 cells are there twice" in soak.compare(*finished)


def test_record_that_lost_units_and_parts_that_are_left_are_found(finished: Any) -> None:
    cohort = Cohort.open(str(finished[1]))
    record = read_record(cohort.store, "embeddings/dino/P1")
    assert record is not None
    cohort.store.write_json("embeddings/dino/P1/_record.json", {**record.__dict__, "units_reused": 3})
    cohort.store.write_bytes("embeddings/dino/P2/_parts/x/part-000.parquet", b"PAR1")
    found = soak.compare(*finished)
    assert [problem.split(": ")[-1] for problem in found] == ["0 units computed and 3 reused of 0", "parts are left"]
    cohort.store.delete("embeddings/dino/P1/_record.json")
    assert any("no record" in problem for problem in soak.compare(*finished))


def test_kills_of_a_run_are_in_order_end_with_the_driver_and_take_one_node() -> None:
    rng = np.random.default_rng(5)
    plans = [soak.plan_kills(rng, ("actor", "node", "driver"), 3, done) for done in (0.0, 0.4) * 200]
    assert {len(plan) for plan in plans} == {1, 2, 3}
    for plan in plans:
        kinds = [kind for kind, _ in plan]
        assert "driver" not in kinds[:-1]
        assert kinds.count("node") <= 1
        later = [share for _, share in plan if share >= 0]
        assert later == sorted(later)
        assert all(share < 1 for share in later)
    early = [plan[0][1] < 0 for plan in plans[::2]]
    assert 0.05 < np.mean(early) < 0.3
    assert all(share >= 0.4 for plan in plans[1::2] for _, share in plan)


def test_seconds_lost_are_those_beyond_the_work_done_and_all_of_them_are_counted() -> None:
    node, driver, actor = Kill("node", 3, 0.2), Kill("driver", 5, 0.5), Kill("actor", 1, 0.9)
    runs = [Run(30.0, None, 0.5, [node, driver]), Run(12.0, 1, 0.1, []), Run(20.0, 0, 0.4, [actor])]
    soak.settle(runs, uninterrupted_s=40.0)
    assert (node.seconds_lost, driver.seconds_lost, actor.seconds_lost) == (5.0, 5.0 + 8.0, 4.0)
    assert sum(kill.seconds_lost for kill in (node, driver, actor)) == sum(run.seconds for run in runs) - 40.0
    assert (node.outcome, driver.outcome, actor.outcome) == ("resumed", "resumed", "survived")
    rows = soak.table([vars(kill) for kill in (node, driver, actor)])
    assert [(row["kind"], row["kills"], row["survived"], row["resumed"]) for row in rows] == [
        ("actor", 1, 1, 0),
        ("node", 1, 0, 1),
        ("driver", 1, 0, 1),
    ]


def test_only_processes_with_the_mark_are_killed() -> None:
    environment = {**os.environ, killed_runs.MARK: "this-run"}
    command = [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(600)"]
    marked = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    other = subprocess.Popen(command, env={**environment, killed_runs.MARK: "another"}, stdout=subprocess.PIPE)
    try:
        for process in (marked, other):
            assert process.stdout is not None
            process.stdout.readline()
        found = killed_runs.victims("driver", "this-run", np.random.default_rng(0))
        assert [process.pid for process in found] == [marked.pid]
        assert killed_runs.victims("actor", "this-run", np.random.default_rng(0)) == []
        killed_runs.destroy(found)
        assert marked.wait(timeout=60) == -9
        assert other.poll() is None
    finally:
        for process in (marked, other):
            process.kill()
            process.communicate()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_short_soak_of_embedding_ends_without_a_difference(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.soak", "--kills", "2", "--kills-a-run", "1", "--seed", "0"]
    size = ["--patients", "2", "--cells", "80", "--kinds", "actor", "driver", "--timeout-s", "400"]
    out = tmp_path / "soak.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *size, "--out", str(out), "--log", str(tmp_path / "log.txt")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "log.txt").read_text()[-4000:]
    result = json.loads(out.read_text())["embed"]
    assert result["problems"] == []
    assert len(result["kills"]) == 2
    assert {kill["outcome"] for kill in result["kills"]} <= {"survived", "resumed"}


def _rewrite(cohort: Cohort, path: str, ids: list[str], vectors: np.ndarray) -> None:
    """Replace a shard without touching its record."""
    import pyarrow as pa

    table = cohort.store.read_table(path)
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    columns = [pa.array(ids), table["patient"], embedding.cast(table.schema.field("embedding").type)]
    cohort.store.write_table(path, pa.table(columns, schema=table.schema))
