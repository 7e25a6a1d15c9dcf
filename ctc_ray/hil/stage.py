"""The simulate stage: a cohort or a processed release in, `results.parquet` out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING

import polars as pl
import pyarrow as pa

from ctc_ray.cluster import connect
from ctc_ray.cohort import Cohort
from ctc_ray.config import HilConfig, RunConfig
from ctc_ray.errors import ConfigError, SchemaError
from ctc_ray.hil.cohort_pools import read_inputs, read_problem
from ctc_ray.hil.dropping import hopeless_arms, is_hopeless
from ctc_ray.hil.loop import Trial, check_trials
from ctc_ray.hil.parts import FOLDER, Parts
from ctc_ray.hil.pools import BACKGROUND, Problem
from ctc_ray.hil.release import ARRAYS, TABLES, read_release
from ctc_ray.hil.scenarios import scenario_named
from ctc_ray.hil.settings import PAPER_SEEDS, LoopSettings
from ctc_ray.hil.strategies import strategy_named
from ctc_ray.progress import Progress
from ctc_ray.records import (
    PlanRow,
    Record,
    StageResult,
    State,
    digest_of,
    identity_of,
    publish,
    read_record,
    require_fresh,
    state_of,
)
from ctc_ray.schema import EFFORT_SCHEMA, FLIP_RATE, RESULTS_SCHEMA, TRIAL_SCHEMA
from ctc_ray.storage import Store

if TYPE_CHECKING:
    from ctc_ray.hil.sweep import SweepResult

STAGE = "simulate"
RESULTS = "results.parquet"
EFFORT = "effort.parquet"
"""Cells looked at and minutes, a row a run and loop (`EFFORT_SCHEMA`)."""
CHECKS = "release_checks.json"


@dataclass(frozen=True)
class _Source:
    """Where a simulation reads and writes; reading the arrays is put off until they are needed."""

    store: Store
    folder: str
    inputs: dict[str, str]
    read: Callable[[], Problem]
    release: Store | None = None


def run_simulate(
    config: RunConfig,
    cohort: Cohort | None,
    *,
    release: str | None = None,
    out: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> StageResult:
    """Sweep scenario x strategy x seed (x main cluster) with Ray Tune and write the tidy results.

    Args:
        config: `config.hil` is used.
        cohort: its labelled cells on its latent map; or None with `release` and `out`.
        release: folder (path or URI) of the processed release.
        out: folder (path or URI) for the results of a release.
        force: whether results of other settings or inputs are replaced.
        progress: where progress goes.

    Returns:
        Trials computed and reused, and the path of `results.parquet` (columns of `RESULTS_SCHEMA`). Beside the results of a
        release lies `release_checks.json`, the fields of `ReleaseChecks`.

    Raises:
        ConfigError: an unknown scenario or strategy, or numbers that do not fit the labelled cells.
        MissingInputError: the latent map or a file of the release is missing.
        LabelError: labels are missing, of one class, or of an unknown kind.
        StaleOutputError: results of other settings or inputs are there, and `force` is not set.
    """
    started = time.monotonic()
    settings = config.hil
    source = _source(settings, cohort, release, out)
    _check_names(settings)
    identity = identity_of(STAGE, settings.identity(), source.inputs)
    former = read_record(source.store, source.folder)
    if require_fresh(source.store, source.folder, identity, force=force) is State.COMPLETE and former and not force:
        num_trials = former.counts.get("trials", 0)
        return _result(source, former.counts, computed=0, reused=num_trials, seconds=time.monotonic() - started)
    record = _sweep_and_publish(config, source, identity, progress or Progress(quiet=True))
    return _result(
        source,
        record.counts,
        computed=record.units_computed,
        reused=record.units_reused,
        seconds=time.monotonic() - started,
    )


def _sweep_and_publish(config: RunConfig, source: _Source, identity: str, progress: Progress) -> Record:
    """Run what has no part yet, then gather all parts; the record is written last."""
    started = time.monotonic()
    settings = config.hil
    problem = source.read()
    trials = plan_trials(settings, problem)
    check_trials(problem, trials, loop_settings(settings))
    parts = Parts(source.store, source.folder, loop_settings(settings), source.inputs)
    with connect(config=config.ray):
        trials, done = _sweep(problem, trials, parts, settings, progress)
    table = _gather(parts, trials)
    record = Record(
        stage=STAGE,
        unit=settings.name,
        identity=identity,
        config=settings.identity(),
        inputs=source.inputs,
        counts={
            "trials": len(trials),
            "rows": table.num_rows,
            "train_cells": len(problem.train),
            "test_cells": len(problem.test),
        },
        seconds=time.monotonic() - started,
        units_computed=done.computed,
        units_reused=done.reused,
        workers=done.tally.rows(),
    )
    results = table.drop_columns([name for name in TRIAL_SCHEMA.names if name not in RESULTS_SCHEMA.names])
    files = {RESULTS: results, EFFORT: _effort(table, settings.seconds_per_cell)}
    finished = publish(source.store, source.folder, {**files, **_checks(source)}, record)
    source.store.delete_folder(f"{source.folder}/{FOLDER}")
    return finished


def _sweep(
    problem: Problem, trials: list[Trial], parts: Parts, settings: HilConfig, progress: Progress
) -> tuple[list[Trial], SweepResult]:
    """Run the trials, without further seeds of hopeless arms where that is asked for; which ones there are, and the counts."""
    from ctc_ray.hil.sweep import run_sweep  # Tune takes seconds to import

    after = settings.drop_after or len(trials)
    first = [trial for trial in trials if trial.run <= after]
    later = [trial for trial in trials if trial.run > after]
    done = run_sweep(problem, first, parts, max_concurrent=settings.max_concurrent, progress=progress)
    if not later:
        return first, done
    frame = pl.DataFrame(pl.from_arrow(_gather(parts, first)))
    dropped = hopeless_arms(frame)
    kept = [trial for trial in later if not is_hopeless(trial, dropped)]
    for scenario, strategy, *_ in sorted(dropped, key=str):
        progress.say(f"{scenario}, {strategy}: clearly behind after {after} seeds, dropped")
    more = run_sweep(problem, kept, parts, max_concurrent=settings.max_concurrent, progress=progress)
    for row in more.tally.rows():
        done.tally.add(row["node"], row["pid"], row["units"])
    return [*first, *kept], replace(done, computed=done.computed + more.computed, reused=done.reused + more.reused)


def plan_simulate(
    config: RunConfig, cohort: Cohort | None, *, release: str | None = None, out: str | None = None
) -> list[PlanRow]:
    """Say what `run_simulate` would do; raises as it does."""
    settings = config.hil
    source = _source(settings, cohort, release, out)
    _check_names(settings)
    state = state_of(source.store, source.folder, identity_of(STAGE, settings.identity(), source.inputs))
    num_parts = len(source.store.list_files(f"{source.folder}/{FOLDER}", ".parquet"))
    why = {
        State.COMPLETE: "results are there and fit settings and inputs",
        State.STALE: "results are there, made with other settings or inputs: --force replaces them",
        State.ABSENT: f"no results yet; {num_parts} finished trials of an interrupted run"
        if num_parts
        else "no results yet",
    }
    return [PlanRow(source.store.describe(source.folder), state, why[state])]


def loop_settings(config: HilConfig) -> LoopSettings:
    """Numbers of the experiment, for the kernel."""
    names = [field.name for field in fields(LoopSettings)]
    return LoopSettings(**{name: getattr(config, name) for name in names})


def seeds_of(config: HilConfig) -> tuple[int, ...]:
    """Seeds of the runs: the paper's five, or 0, 1, 2, ..."""
    return PAPER_SEEDS if config.seeds == "paper" else tuple(range(int(config.seeds)))


def plan_trials(config: HilConfig, problem: Problem) -> list[Trial]:
    """All trials of a sweep, each share of wrong answers having all arms and seeds.

    `limited-local` has its arms for each main cluster; so has `rare-positive`, where main clusters are given.

    Raises:
        ConfigError: a scenario or strategy is unknown, or a main cluster has no training cell.
    """
    _check_names(config)
    clusters = sorted({int(c) for c in problem.train.clusters} - {BACKGROUND})
    unknown = sorted(set(config.main_clusters) - {*clusters, BACKGROUND})
    if unknown and {"limited-local", "rare-positive"} & set(config.scenarios):
        raise ConfigError(
            f"main cluster {unknown[0]} has no labelled training cell: choose among {', '.join(map(str, clusters))}"
        )
    mains = {
        "limited-local": config.main_clusters or tuple(clusters),
        "rare-positive": config.main_clusters or (None,),
    }
    arms = []
    for scenario in dict.fromkeys(config.scenarios):
        for main in mains.get(scenario, (None,)):
            arms += [(scenario, strategy, main) for strategy in dict.fromkeys(config.strategies)]
    return [
        Trial(*arm, run, seed, flips)
        for arm in arms
        for flips in dict.fromkeys(config.flip_rates) or (None,)
        for run, seed in enumerate(seeds_of(config), 1)
    ]


def _check_names(config: HilConfig) -> None:
    for scenario in config.scenarios:
        scenario_named(scenario)
    for strategy in config.strategies:
        strategy_named(strategy)


def _source(config: HilConfig, cohort: Cohort | None, release: str | None, out: str | None) -> _Source:
    if release is not None:
        if out is None:
            raise ConfigError("a simulation on a release needs a folder for its results: give --out OUT")
        store, folder = _parent_and_name(out)
        found = Store(release)
        inputs = {name: digest_of(found.read_bytes(name)) for name in (*TABLES, *ARRAYS) if found.exists(name)}
        return _Source(store, folder, inputs, lambda: read_release(found).problem(), found)
    if cohort is None:
        raise ConfigError("give a cohort, or a release with --release DIR --out OUT")
    labelled = read_inputs(cohort, config)
    return _Source(
        cohort.store, cohort.simulation(config.name), labelled.inputs, lambda: read_problem(cohort, config, labelled)
    )


def _parent_and_name(out: str) -> tuple[Store, str]:
    parent, _, name = out.rstrip("/").rpartition("/")
    if not name or name in (".", "..") or parent.endswith(":/"):
        raise ConfigError(f"--out {out!r} must name a folder for the results, not a root")
    return Store(parent or ("/" if out.startswith("/") else ".")), name


def _checks(source: _Source) -> dict[str, bytes]:
    """Figures about the release itself, for a file beside its results."""
    if source.release is None:
        return {}
    from ctc_ray.hil.release_checks import check_release

    return {CHECKS: json.dumps(asdict(check_release(read_release(source.release))), indent=1).encode() + b"\n"}


def _gather(parts: Parts, trials: list[Trial]) -> pa.Table:
    """All rows; with a column `flip_rate` where the trials differ in it."""
    tables = [parts.store.read_table(parts.path(trial)).cast(TRIAL_SCHEMA) for trial in trials]
    rates = [trial.flip_rate for trial in trials]
    if len(set(rates)) > 1:
        columns = [pa.array([rate] * part.num_rows, FLIP_RATE.type) for part, rate in zip(tables, rates, strict=True)]
        tables = [part.append_column(FLIP_RATE, column) for part, column in zip(tables, columns, strict=True)]
    table = pa.concat_tables(tables)
    if table.num_rows == 0:
        raise SchemaError("the simulations gave no rows")
    return table


def _effort(table: pa.Table, seconds_per_cell: float) -> pa.Table:
    """One row a run and loop: how many cells the labeller had looked at, and how long that takes."""
    rows = pl.DataFrame(pl.from_arrow(table)).filter(pl.col("cluster").is_null() & (pl.col("split") == "test"))
    minutes = (pl.col("num_viewed") * seconds_per_cell / 60.0).alias("minutes")
    schema = EFFORT_SCHEMA.append(FLIP_RATE) if FLIP_RATE.name in table.schema.names else EFFORT_SCHEMA
    return rows.with_columns(minutes).select(schema.names).to_arrow().cast(schema)


def _result(source: _Source, counts: dict[str, int], *, computed: int, reused: int, seconds: float) -> StageResult:
    path = source.store.describe(f"{source.folder}/{RESULTS}")
    return StageResult(STAGE, computed, reused, counts=counts, paths=(path,), seconds=seconds)
