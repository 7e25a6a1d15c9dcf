"""The simulate stage: from a release and from a cohort, resumed, stale, refused."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctc_ray.cohort import Cohort
from ctc_ray.config import RunConfig, load_config
from ctc_ray.errors import ConfigError, LabelError, MissingInputError, SchemaError, StaleOutputError
from ctc_ray.hil.cohort_pools import read_inputs, read_problem
from ctc_ray.hil.dropping import hopeless_arms
from ctc_ray.hil.loop import Trial, run_trial
from ctc_ray.hil.parts import Parts
from ctc_ray.hil.pools import Problem
from ctc_ray.hil.settings import LoopSettings
from ctc_ray.hil.stage import loop_settings, plan_simulate, plan_trials, run_simulate, seeds_of
from ctc_ray.progress import Progress
from ctc_ray.records import Record, State, publish, read_record
from ctc_ray.schema import DUPLICATES_SCHEMA, LABELS_SCHEMA, RESULTS_SCHEMA, latent_schema
from ctc_ray.storage import Store

_SMALL = (
    *("hil.initial=30", "hil.per_loop=20", "hil.loops=2", "hil.mc_splits=5", "hil.seeds=2"),
    "hil.strategies=[random, cluster-f1, margin]",
)
_ROLES = {"001": "train", "7": "train", "Müller 3": "test", "9": "validation"}


def _config(*overrides: str) -> RunConfig:
    return load_config(None, [*_SMALL, *overrides])


def _write_cohort(folder: Path, problem: Problem) -> Cohort:
    """A cohort with labels and a finished map; each patient has one physical cell that was found twice."""
    cohort = Cohort.open(str(folder), create=True)
    cohort.add_patients({p: p for p in _ROLES})
    cohort.write_patients(cohort.patients().with_columns(pl.col("patient").replace_strict(_ROLES).alias("role")))
    publish(cohort.store, cohort.latent("dino", "map"), {}, Record("map", "map", "map-1", {}, {}))
    half = len(problem.train) // 2
    rows = {"001": range(half), "7": range(half, len(problem.train)), "Müller 3": range(80), "9": range(80, 120)}
    for patient, role in _ROLES.items():
        cells = problem.train if role == "train" else problem.test
        index = list(rows[patient])
        index.append(index[0])  # the second detection of the first cell
        ids = [f"{patient}-{i:04d}" for i in range(len(index))]
        _write_patient(cohort, patient, ids, cells.features[index], cells.clusters[index])
        _write_labels(cohort, patient, ids, cells.labels[index])
    return cohort


def _write_patient(cohort: Cohort, patient: str, ids: list[str], features: np.ndarray, clusters: np.ndarray) -> None:
    cells = pa.table({"cell_id": ids, "prob": pa.array(np.linspace(0.9, 0.5, len(ids)), pa.float32())})
    publish(cohort.store, cohort.cells(patient), {"part-000.parquet": cells}, Record("segment", patient, "c", {}, {}))
    physical = [*ids[:-1], ids[0]]
    duplicates = pa.Table.from_pydict({"cell_id": ids, "physical_id": physical}, schema=DUPLICATES_SCHEMA)
    cohort.store.write_table(cohort.duplicates_path(patient), duplicates)
    placed = {
        "cell_id": ids,
        "patient": [patient] * len(ids),
        "pca": features.astype(np.float32).tolist(),
        "umap_x": features[:, 0].astype(np.float32),
        "umap_y": features[:, 1].astype(np.float32),
        "cluster": clusters.astype(np.int16),
    }
    table = pa.Table.from_pydict(placed, schema=latent_schema(features.shape[1]))
    folder = cohort.latent_cells("dino", "map", patient)
    publish(cohort.store, folder, {"part-000.parquet": table}, Record("map", patient, f"placed-{patient}", {}, {}))


def _write_labels(cohort: Cohort, patient: str, ids: list[str], labels: np.ndarray) -> None:
    start = datetime(2025, 1, 1, tzinfo=UTC)
    rows = []
    for number, (name, label) in enumerate(zip(ids, labels, strict=True)):
        values = dict.fromkeys(LABELS_SCHEMA.names)
        text = "ctc" if label else ("artefact" if number % 3 else "non_ctc")
        values |= {"event_id": f"e-{name}", "cell_id": name, "patient": patient, "label": text, "reader": "r"}
        rows.append(values | {"source": "test", "at": start + timedelta(seconds=number)})
    unsure = rows[5] | {"label": "unsure"}
    rows[5] = unsure
    cohort.store.write_table(f"labels/{patient}.parquet", pa.Table.from_pylist(rows, schema=LABELS_SCHEMA))


def test_read_problem_takes_pools_by_role_without_unsure_cells_and_one_detection_a_physical_cell(
    tmp_path: Path, problem: Problem
) -> None:
    cohort = _write_cohort(tmp_path / "cohort", problem)
    hil = _config().hil
    found = read_problem(cohort, hil, read_inputs(cohort, hil))
    assert (len(found.train), len(found.test)) == (240 - 2, 80 - 1)  # an unsure cell a patient
    assert found.validation is not None
    assert len(found.validation) == 39
    assert "001-0120" not in found.train.cell_ids  # the less certain of two detections
    row = int(np.flatnonzero(found.train.cell_ids == "7-0010")[0])
    np.testing.assert_allclose(found.train.features[row], problem.train.features[130], rtol=1e-6)
    assert found.train.labels[row] == problem.train.labels[130]
    assert found.train.clusters[row] == problem.train.clusters[130]


def test_read_inputs_changes_with_labels_and_roles(tmp_path: Path, problem: Problem) -> None:
    cohort = _write_cohort(tmp_path / "cohort", problem)
    hil = _config().hil
    before = read_inputs(cohort, hil).inputs
    table = cohort.store.read_table("labels/7.parquet").slice(0, 60)
    cohort.store.write_table("labels/7.parquet", table)
    assert read_inputs(cohort, hil).inputs["labels"] != before["labels"]
    assert read_inputs(cohort, hil).inputs["map"] == before["map"]


def test_read_inputs_without_map_or_labels_names_the_command(tmp_path: Path, problem: Problem) -> None:
    cohort = _write_cohort(tmp_path / "cohort", problem)
    with pytest.raises(MissingInputError, match="ctc-ray map"):
        read_inputs(cohort, _config("hil.map=other").hil)
    cohort.store.delete("labels/Müller 3.parquet")
    with pytest.raises(LabelError, match=r"role test \(patients: Müller 3\)"):
        read_inputs(cohort, _config().hil)


def _relabel(cohort: Cohort, patient: str, label: str, rows: slice = slice(None)) -> None:
    path = f"labels/{patient}.parquet"
    events = cohort.store.read_table(path).to_pylist()
    for event in events[rows]:
        event["label"] = label
    cohort.store.write_table(path, pa.Table.from_pylist(events, schema=LABELS_SCHEMA))


def _problem_of(cohort: Cohort) -> Problem:
    hil = _config().hil
    return read_problem(cohort, hil, read_inputs(cohort, hil))


def test_read_problem_one_class_in_a_role_is_refused_by_name(tmp_path: Path, problem: Problem) -> None:
    cohort = _write_cohort(tmp_path / "cohort", problem)
    _relabel(cohort, "Müller 3", "artefact")
    with pytest.raises(LabelError, match="role test: all 80 labels are non-CTCs"):
        _problem_of(cohort)
    for patient in ("001", "7"):
        _relabel(cohort, patient, "ctc")
    with pytest.raises(LabelError, match="role train: all 240 labels are CTCs"):
        _problem_of(cohort)


def test_read_problem_validation_of_one_class_is_left_out(tmp_path: Path, problem: Problem) -> None:
    cohort = _write_cohort(tmp_path / "cohort", problem)
    _relabel(cohort, "9", "non_ctc")
    assert _problem_of(cohort).validation is None


def test_read_problem_feature_that_is_no_number_names_role_and_row(tmp_path: Path, problem: Problem) -> None:
    cohort = _write_cohort(tmp_path / "cohort", problem)
    features = problem.train.features[:40].copy()
    features[3, 2] = np.nan
    _write_patient(cohort, "7", [f"7-{i:04d}" for i in range(40)], features, problem.train.clusters[:40])
    events = cohort.store.read_table("labels/7.parquet").slice(0, 40)
    cohort.store.write_table("labels/7.parquet", events)
    with pytest.raises(SchemaError, match="role train: features of 1 of 157 cells are not finite"):
        _problem_of(cohort)


def test_read_problem_labels_without_a_place_on_the_map_are_refused(tmp_path: Path, problem: Problem) -> None:
    cohort = _write_cohort(tmp_path / "cohort", problem)
    few = [f"7-{i:04d}" for i in range(50)]
    placed = cohort.latent_cells("dino", "map", "7")
    table = cohort.read_columns(placed, ["cell_id"])
    assert table.num_rows > len(few)
    whole = cohort.store.read_table(f"{placed}/part-000.parquet")
    publish(cohort.store, placed, {"part-000.parquet": whole.slice(0, 50)}, Record("map", "7", "fewer", {}, {}))
    with pytest.raises(LabelError, match=r"patient 7: \d+ labelled cells, the first 7-0050, are not on the latent map"):
        _problem_of(cohort)
    cohort.store.delete_folder(placed)
    with pytest.raises(MissingInputError, match="patient 7 has labels but no place on the latent map"):
        _problem_of(cohort)


def test_read_inputs_label_of_an_unknown_kind_is_refused(tmp_path: Path, problem: Problem) -> None:
    cohort = _write_cohort(tmp_path / "cohort", problem)
    _relabel(cohort, "7", "tumour", slice(3, 4))
    with pytest.raises(LabelError, match="unknown label 'tumour'"):
        _problem_of(cohort)


@pytest.mark.parametrize("scenario", ["limited-global", "limited-local", "rare-positive"])
def test_cohort_cluster_of_test_cells_alone_is_scored_and_never_a_main_cluster(
    tmp_path: Path, problem: Problem, scenario: str
) -> None:
    apart = dataclasses.replace(problem.test, clusters=np.where(np.arange(120) % 4 == 0, 9, problem.test.clusters))
    cohort = _write_cohort(tmp_path / "cohort", dataclasses.replace(problem, test=apart))
    found = _problem_of(cohort)
    hil = _config(f"hil.scenarios=[{scenario}]", "hil.strategies=[cluster-f1]", "hil.budget_s=30").hil
    trials = plan_trials(hil, found)
    assert 9 not in {trial.main_cluster for trial in trials}
    rows = run_trial(found, trials[0], loop_settings(hil))
    assert len([row for row in rows if row["cluster"] == 9 and row["split"] == "test"]) == hil.loops + 1
    assert 9 not in {row["searched_cluster"] for row in rows}


def test_plan_trials_main_cluster_without_a_training_cell_lists_those_that_have_some(problem: Problem) -> None:
    hil = _config("hil.scenarios=[limited-local]", "hil.main_clusters=[9]").hil
    with pytest.raises(ConfigError, match="main cluster 9 has no labelled training cell: choose among 0, 1, 2, 3"):
        plan_trials(hil, problem)


def test_plan_simulate_fresh_cohort_is_absent(tmp_path: Path, problem: Problem) -> None:
    cohort = _write_cohort(tmp_path / "cohort", problem)
    rows = plan_simulate(_config(), cohort)
    assert [row.state for row in rows] == [State.ABSENT]


def test_plan_trials_limited_local_has_every_main_cluster_but_the_background(make: Callable[..., Problem]) -> None:
    config = _config("hil.scenarios=[limited-global, limited-local]", "hil.strategies=[random, cluster-f1]").hil
    trials = plan_trials(config, make(background=20))
    assert len(trials) == len(set(trials)) == 2 * 2 + 4 * 2 * 2
    assert {t.main_cluster for t in trials if t.scenario == "limited-local"} == {0, 1, 2, 3}
    assert {t.main_cluster for t in trials if t.scenario == "limited-global"} == {None}


def test_plan_trials_rare_positive_searches_the_given_clusters_and_else_the_weakest(problem: Problem) -> None:
    config = _config("hil.scenarios=[rare-positive]", "hil.strategies=[random]", "hil.seeds=1")
    assert [t.main_cluster for t in plan_trials(config.hil, problem)] == [None]
    given = _config(
        "hil.scenarios=[rare-positive]", "hil.strategies=[random]", "hil.main_clusters=[1, 3]", "hil.seeds=1"
    )
    assert [t.main_cluster for t in plan_trials(given.hil, problem)] == [1, 3]
    unknown = _config("hil.scenarios=[rare-positive]", "hil.main_clusters=[9]")
    with pytest.raises(ConfigError, match="main cluster 9"):
        plan_trials(unknown.hil, problem)


def test_plan_trials_has_every_arm_for_every_share_of_wrong_answers(problem: Problem) -> None:
    trials = plan_trials(_config("hil.flip_rates=[0, 0.1, 0.1]").hil, problem)
    assert [(t.strategy, t.flip_rate, t.seed) for t in trials] == [
        (strategy, rate, seed)
        for strategy in ("random", "cluster-f1", "margin")
        for rate in (0.0, 0.1)
        for seed in (0, 1)
    ]
    alone = {t.flip_rate for t in plan_trials(_config("hil.flip_rate=0.1").hil, problem)}
    assert alone == {None}  # results of one share have no column for it
    with pytest.raises(ConfigError, match="flip_rates"):
        _config("hil.flip_rates=[0, 1.5]")


def test_seeds_of_paper_or_a_number() -> None:
    assert seeds_of(load_config(None, []).hil) == (164, 29, 7, 190, 71)
    assert seeds_of(load_config(None, ["hil.seeds='3'"]).hil) == (0, 1, 2)
    assert load_config(None, ["hil.seeds='3'"]).hil.identity() == load_config(None, ["hil.seeds=3"]).hil.identity()
    for wrong in ("papper", "0"):
        with pytest.raises(ConfigError, match="seeds"):
            load_config(None, [f"hil.seeds={wrong}"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("hil.scenarios=[limited-globl]", "no scenario 'limited-globl'"),
        ("hil.strategies=[margins]", "no strategy 'margins'"),
    ],
)
def test_plan_simulate_unknown_name_lists_the_known(
    tmp_path: Path, problem: Problem, override: str, message: str
) -> None:
    cohort = _write_cohort(tmp_path / "cohort", problem)
    with pytest.raises(ConfigError, match=message):
        plan_simulate(_config(override), cohort)


def test_run_simulate_without_source_or_out_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--out"):
        run_simulate(_config(), None, release=str(tmp_path))
    with pytest.raises(ConfigError, match="cohort"):
        run_simulate(_config(), None)
    with pytest.raises(ConfigError, match="root"):
        run_simulate(_config(), None, release=str(tmp_path), out="/")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_run_simulate_cohort_writes_the_rows_of_the_plain_loop_and_then_reuses_them(
    tmp_path: Path, problem: Problem
) -> None:
    cohort = _write_cohort(tmp_path / "cohort", problem)
    config = _config()
    result = run_simulate(config, cohort, progress=Progress(quiet=True))
    assert (result.units_computed, result.units_reused) == (6, 0)
    table = pq.read_table(tmp_path / "cohort" / "simulations" / "paper" / "results.parquet")
    assert table.schema.equals(RESULTS_SCHEMA)
    found = read_problem(cohort, config.hil, read_inputs(cohort, config.hil))
    rows = [r for t in plan_trials(config.hil, found) for r in run_trial(found, t, loop_settings(config.hil))]
    assert table.to_pylist() == [{name: row[name] for name in RESULTS_SCHEMA.names} for row in rows]
    effort = pq.read_table(tmp_path / "cohort" / "simulations" / "paper" / "effort.parquet").to_pylist()
    totals = [row for row in rows if row["cluster"] is None and row["split"] == "test"]
    assert [(row["num_viewed"], row["num_train"]) for row in effort] == [
        (row["num_viewed"], row["num_train"]) for row in totals
    ]
    assert effort[2]["num_viewed"] == 2 * config.hil.per_loop
    assert effort[2]["minutes"] == effort[2]["num_viewed"] * config.hil.seconds_per_cell / 60
    record = read_record(cohort.store, "simulations/paper")
    assert record is not None
    assert sum(w["units"] for w in record.workers) == 6
    assert cohort.store.list_folders("simulations/paper") == []
    again = run_simulate(config, cohort)
    assert (again.units_computed, again.units_reused) == (0, 6)
    with pytest.raises(StaleOutputError, match="--force"):
        run_simulate(_config("hil.loops=1"), cohort)
    forced = run_simulate(_config("hil.loops=1"), cohort, force=True)
    assert forced.units_computed == 6


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_run_simulate_over_wrong_answers_writes_a_column_and_the_rows_of_each_share(
    tmp_path: Path, problem: Problem
) -> None:
    cohort = _write_cohort(tmp_path / "cohort", problem)
    config = _config("hil.flip_rates=[0, 0.25]", "hil.strategies=[random]")
    result = run_simulate(config, cohort)
    assert result.counts["trials"] == 4
    table = pl.from_arrow(cohort.store.read_table("simulations/paper/results.parquet"))
    assert isinstance(table, pl.DataFrame)
    assert table.columns == [*RESULTS_SCHEMA.names, "flip_rate"]
    found = read_problem(cohort, config.hil, read_inputs(cohort, config.hil))
    for rate in (0.0, 0.25):
        settings = dataclasses.replace(loop_settings(config.hil), flip_rate=rate)
        trials = [Trial("limited-global", "random", None, run, run - 1) for run in (1, 2)]
        rows = [row for trial in trials for row in run_trial(found, trial, settings)]
        own = table.filter(pl.col("flip_rate") == rate).drop("flip_rate")
        assert own.to_dicts() == [{name: row[name] for name in RESULTS_SCHEMA.names} for row in rows]
    clean, flipped = table.partition_by("flip_rate")
    assert not clean["f1"].equals(flipped["f1"])
    effort = pl.from_arrow(cohort.store.read_table("simulations/paper/effort.parquet"))
    assert isinstance(effort, pl.DataFrame)
    assert effort["flip_rate"].to_list() == [0.0] * 6 + [0.25] * 6


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_run_simulate_drop_after_gives_hopeless_arms_no_more_seeds(
    tmp_path: Path, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ctc_ray.hil.dropping.SIGNIFICANCE", 1.1)  # every arm but the best is behind
    cohort = _write_cohort(tmp_path / "cohort", problem)
    config = _config("hil.strategies=[random, margin, entropy]", "hil.seeds=3", "hil.drop_after=2")
    result = run_simulate(config, cohort)
    table = pl.DataFrame(pl.from_arrow(cohort.store.read_table("simulations/paper/results.parquet")))
    hopeless = {arm[1] for arm in hopeless_arms(table.filter(pl.col("run") <= 2))}
    assert hopeless
    assert "random" not in hopeless
    runs = dict(table.group_by("strategy").agg(pl.col("run").n_unique()).iter_rows())
    assert runs == {name: 2 if name in hopeless else 3 for name in ("random", "margin", "entropy")}
    assert result.units_computed == result.counts["trials"] == sum(runs.values())
    record = read_record(cohort.store, "simulations/paper")
    assert record is not None
    assert sum(worker["units"] for worker in record.workers) == sum(runs.values())


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_run_simulate_interrupted_sweep_runs_only_what_is_missing(tmp_path: Path, problem: Problem) -> None:
    from ctc_ray.hil.sweep import run_sweep

    cohort = _write_cohort(tmp_path / "cohort", problem)
    config = _config()
    whole = Cohort.open(str(tmp_path / "cohort"))
    inputs = read_inputs(cohort, config.hil)
    found = read_problem(cohort, config.hil, inputs)
    parts = Parts(cohort.store, "simulations/paper", loop_settings(config.hil), inputs.inputs)
    run_sweep(found, plan_trials(config.hil, found)[:2], parts, max_concurrent=1, progress=Progress(quiet=True))
    assert "2 finished trials" in plan_simulate(config, whole)[0].why
    result = run_simulate(config, whole)
    assert (result.units_computed, result.units_reused) == (4, 2)
    resumed = cohort.store.read_table("simulations/paper/results.parquet")
    cohort.store.delete_folder("simulations/paper")
    run_simulate(config, whole)
    assert resumed.equals(cohort.store.read_table("simulations/paper/results.parquet"))


def test_run_simulate_too_few_labels_is_refused_before_the_sweep(tmp_path: Path, problem: Problem) -> None:
    cohort = _write_cohort(tmp_path / "cohort", problem)
    with pytest.raises(ConfigError, match=r"role train has 238 labelled cells"):
        run_simulate(_config("hil.initial=500"), cohort)
    assert not cohort.store.exists("simulations/paper/results.parquet")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_run_sweep_trial_that_refuses_its_input_raises_its_own_message(tmp_path: Path, problem: Problem) -> None:
    from ctc_ray.hil.sweep import run_sweep

    parts = Parts(Store(tmp_path), "sweep", LoopSettings(initial=500), {})
    trial = Trial("limited-global", "random", None, 1, 0)
    with pytest.raises(ConfigError, match="500 initial labels"):
        run_sweep(problem, [trial], parts, max_concurrent=1, progress=Progress(quiet=True))
    assert parts.finished() == set()


_DRIVER = """
import sys
from ctc_ray.cluster import connect
from ctc_ray.config import RayConfig, load_config
from ctc_ray.hil.stage import run_simulate
with connect(config=RayConfig(num_cpus=4, object_store_mb=100)):
    run_simulate(load_config(None, sys.argv[3:]), None, release=sys.argv[1], out=sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_run_simulate_killed_release_sweep_goes_on_and_equals_an_uninterrupted_one(
    tmp_path: Path, shared_data: Path
) -> None:
    release = str(shared_data / "hil_release")
    overrides = ["hil.strategies=[random,cluster-f1]", "hil.mc_splits=20", "hil.max_concurrent=1"]
    command = [sys.executable, "-c", _DRIVER, release, str(tmp_path / "killed"), *overrides]
    driver = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    parts = tmp_path / "killed" / "_parts"
    deadline = time.monotonic() + 240
    while not (parts.is_dir() and len(list(parts.glob("[!.]*.parquet"))) >= 2):
        assert time.monotonic() < deadline
        assert driver.poll() is None
        time.sleep(0.05)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    config = load_config(None, overrides)
    result = run_simulate(config, None, release=release, out=str(tmp_path / "killed"))
    assert result.units_reused >= 2
    assert result.units_computed + result.units_reused == 10
    run_simulate(config, None, release=release, out=str(tmp_path / "whole"))
    killed, whole = (pq.read_table(tmp_path / name / "results.parquet") for name in ("killed", "whole"))
    assert killed.equals(whole)
    checks = json.loads((tmp_path / "whole" / "release_checks.json").read_text())
    assert checks["adjusted_rand"] > 0.95
    assert checks["num_clusters_found"] == checks["num_clusters_stored"] == 6


def test_loop_settings_carries_every_number_of_the_config() -> None:
    changed = (
        "hil.flip_rate=0.1",
        "hil.mode=faithful",
        "hil.held_back=0.3",
        "hil.seconds_per_cell=2",
        "hil.budget_s=60",
    )
    settings = loop_settings(_config(*changed).hil)
    assert dataclasses.asdict(settings) == {
        **{"mode": "faithful", "initial": 30, "per_loop": 20},
        **{"loops": 2, "mc_splits": 5, "flip_rate": 0.1},
        **{"held_back": 0.3, "seconds_per_cell": 2.0, "budget_s": 60.0},
        **{"faults": ()},
    }
    assert loop_settings(_config("hil.faults=[rounding]").hil).faults == ("rounding",)
