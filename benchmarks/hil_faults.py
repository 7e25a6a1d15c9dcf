"""What does each fault of the reference do to the curves? Corrected mode, faithful mode, and corrected mode with single faults left in.

    python -m benchmarks.hil_faults [--release DIR] [--work FOLDER] [--workers N]

Data: the release folder with the paper's five seeds and with seeds 0 to 24; two phantom cohorts (seeds 1 and 2, twelve starts each) whose
first five test patients serve as validation patients, so that `monte-carlo` has something to change. Arms `random` and `cluster-f1`.
limited-global everywhere; on the release also with 12 loops (seeds 0 to 9), when clusters run short, and limited-local (every cluster in
turn, averaged over clusters); rare-positive everywhere.

Every variant is compared with corrected mode, seed by seed: area under the curve of test F1 over labels (mean height), F1 at the end in
total, in the weakest cluster of that run, and in one fixed cluster (of those with at least 20 test CTCs the one that a classifier of
all labels finds hardest; the main cluster in limited-local); in rare-positive also what F1 gains in the region searched first, and how many
labels were found at how many looks; and what `cluster-f1` has over `random` in each (`gain`). Intervals are 95 % bootstrap intervals over
seeds on the same cells: they cover the starts, not other data. The number behind an interval counts the runs that differ at all. Runs that
stop where the reference would are counted and left out with their pairs. Writes `benchmarks/results/hil_faults.json`. Runs without Ray.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from threadpoolctl import threadpool_limits

from benchmarks.hil_study_problems import phantom_problem, release_problem
from benchmarks.phantom_difficulty import TEST
from benchmarks.segment_accuracy import hardware
from ctc_ray.config import FaultName
from ctc_ray.errors import ConfigError
from ctc_ray.hil.comparison import areas, compare, final_scores, worst_clusters
from ctc_ray.hil.loop import Trial, run_trial
from ctc_ray.hil.pools import BACKGROUND, CellSet, Problem
from ctc_ray.hil.release import fill_background
from ctc_ray.hil.scores import score_clusters
from ctc_ray.hil.settings import FAULTS, PAPER_SEEDS, LoopSettings
from ctc_ray.hil.svm import Classifier
from ctc_ray.records import library_versions
from ctc_ray.schema import TRIAL_SCHEMA

RESULTS = Path(__file__).parent / "results" / "hil_faults.json"
ARMS = ("random", "cluster-f1")
OF_SEARCH: tuple[FaultName, ...] = ("test-target", "fixed-target", "first-predictions")
OF_DRAWS: tuple[FaultName, ...] = tuple(name for name in FAULTS if name not in OF_SEARCH)
COHORTS = (1, 2)
STARTS = 12
RELEASE_SEEDS = 25
LONG_SEEDS = 10
PATIENTS = 10
LEAST_CTCS = 20
SAME = 1e-9
LONG = "limited-global, 12 loops"
SCENARIOS = {
    "release, paper's seeds": ("limited-global", "limited-local", "rare-positive"),
    "release": ("limited-global", "limited-local", "rare-positive"),
    "release, ten seeds": (LONG,),
    "phantom": ("limited-global", "rare-positive"),
}
RUN = ["scenario", "strategy", "main_cluster", "run", "seed"]


def variants_of(scenario: str, data: str) -> dict[str, LoopSettings]:
    """Corrected mode, single faults left in, and all of them."""
    corrected = LoopSettings()
    single: dict[str, LoopSettings]
    if scenario == "limited-local":  # its draws have no fault but the generator's, which faithful mode shows
        return {"corrected": corrected, "faithful": LoopSettings(mode="faithful")}
    if scenario == LONG:
        long = dataclasses.replace(corrected, loops=12)
        single = {name: dataclasses.replace(long, faults=(name,)) for name in OF_DRAWS[:2]}
        return {"corrected": long, **single, "faithful": dataclasses.replace(long, mode="faithful")}
    if scenario == "limited-global":
        single = {name: dataclasses.replace(corrected, faults=(name,)) for name in OF_DRAWS}
        return {"corrected": corrected, **single, "faithful": LoopSettings(mode="faithful")}
    faults: tuple[FaultName, ...] = (*OF_SEARCH, "monte-carlo") if data == "phantom" else OF_SEARCH
    single = {name: dataclasses.replace(corrected, faults=(name,)) for name in faults}
    return {"corrected": corrected, **single, "all three": dataclasses.replace(corrected, faults=OF_SEARCH)}


@dataclass(frozen=True)
class Task:
    """One arm of one variant with one seed."""

    data: str
    number: int
    scenario: str
    variant: str
    trial: Trial


def seeds_of(data: str) -> list[tuple[int, int]]:
    """Number of the problem, and seed, of every run."""
    if data == "phantom":
        return [(number, 1_000 * number + start) for number in COHORTS for start in range(STARTS)]
    if data == "release, paper's seeds":
        return [(0, seed) for seed in PAPER_SEEDS]
    return [(0, seed) for seed in range(RELEASE_SEEDS if data == "release" else LONG_SEEDS)]


def tasks_of(options: argparse.Namespace) -> Iterator[Task]:
    """All runs, problem by problem."""
    for data, possible in SCENARIOS.items():
        scenarios = [scenario for scenario in possible if scenario.split(",")[0] in options.scenarios]
        for run, (number, seed) in enumerate(seeds_of(data), 1):
            clusters = np.unique(problem_of(data, number, options).train.clusters)
            for scenario in scenarios:
                mains = [int(c) for c in clusters if c != BACKGROUND] if scenario == "limited-local" else [None]
                for variant in variants_of(scenario, data):
                    for main, arm in ((main, arm) for main in mains for arm in ARMS):
                        yield Task(data, number, scenario, variant, Trial(scenario.split(",")[0], arm, main, run, seed))


def problem_of(data: str, number: int, options: argparse.Namespace) -> Problem:
    """The release, or a phantom cohort with validation patients; kept, since tasks come problem by problem."""
    return _problem(number if data == "phantom" else None, options.work, options.release)


@functools.lru_cache(maxsize=3)
def _problem(number: int | None, work: Path, release: Path) -> Problem:
    if number is None:
        return release_problem(release)
    problem = phantom_problem(number, work)
    patients = np.concatenate([_patients(total) for total in TEST])
    validation = _part(problem.test, patients < PATIENTS // 2, "validation")
    # The cohort files do that on the map; here there are no coordinates, so the nearest cell of the training set is that by features.
    train = problem.train
    filled = fill_background(train.features, train.clusters, validation.features, validation.clusters)
    validation = dataclasses.replace(validation, clusters=filled)
    return dataclasses.replace(
        problem, test=_part(problem.test, patients >= PATIENTS // 2, "test"), validation=validation
    )


def _patients(total: int) -> np.ndarray:
    return np.repeat(np.arange(PATIENTS), [total // PATIENTS + (n < total % PATIENTS) for n in range(PATIENTS)])


def _part(cells: CellSet, inside: np.ndarray, name: str) -> CellSet:
    ids, features = cells.cell_ids[inside], cells.features[inside]
    return CellSet(name, ids, features, cells.labels[inside], cells.clusters[inside])


@functools.cache
def hardest_cluster(data: str, number: int, work: Path, release: Path) -> int:
    """The cluster with the lowest test F1 of a classifier that has all labels."""
    problem = _problem(number if data == "phantom" else None, work, release)
    predictions = Classifier.fit(problem.train.features, problem.train.labels).predict(problem.test.features)
    scores = score_clusters(problem.test.labels, predictions, problem.test.clusters, "null")
    ctcs = {c: int(problem.test.labels[problem.test.clusters == c].sum()) for c in scores}
    defined = {c: s.f1 for c, s in scores.items() if s.f1 is not None and c != BACKGROUND and ctcs[c] >= LEAST_CTCS}
    return min(defined, key=lambda c: defined[c])


def run(task: Task, options: argparse.Namespace) -> list[dict[str, Any]] | str:
    """Test rows of one run, or why it stopped."""
    settings = variants_of(task.scenario, task.data)[task.variant]
    try:
        with threadpool_limits(1):
            rows = run_trial(problem_of(task.data, task.number, options), task.trial, settings)
    except ConfigError as error:
        return str(error)
    return [row for row in rows if row["split"] == "test"]


Results = dict[tuple[str, str], dict[str, list[dict[str, Any]]]]
"""(data, scenario) -> variant -> rows."""


def run_all(options: argparse.Namespace) -> tuple[Results, list[dict[str, Any]]]:
    """Rows of all runs, and the runs that stopped."""
    tasks = list(tasks_of(options))
    found: Results = {}
    stopped = []
    started = time.monotonic()
    with ProcessPoolExecutor(options.workers) as pool:
        outcomes = pool.map(run, tasks, [options] * len(tasks), chunksize=8)
        for done, (task, rows) in enumerate(zip(tasks, outcomes, strict=True), 1):
            if isinstance(rows, str):
                stopped.append(dataclasses.asdict(task) | {"why": rows})
            else:
                found.setdefault((task.data, task.scenario), {}).setdefault(task.variant, []).extend(rows)
            if done % 100 == 0:
                print(f"  {done} of {len(tasks)} runs in {time.monotonic() - started:.0f} s", flush=True)
    return found, stopped


def frame_of(rows: list[dict[str, Any]]) -> pl.DataFrame:
    """Rows of trials as a frame."""
    frame = pl.from_arrow(pa.Table.from_pylist(rows, schema=TRIAL_SCHEMA))
    if not isinstance(frame, pl.DataFrame):
        raise TypeError("a table gives a frame")
    return frame


def fixed_cluster(results: pl.DataFrame, data: str, options: argparse.Namespace) -> pl.DataFrame:
    """F1 of one cluster after the last loop, as `value`: the main cluster of limited-local, else the hardest."""
    numbers = {seed: number for number, seed in seeds_of(data)}
    hardest = [hardest_cluster(data, number, options.work, options.release) for number in numbers.values()]
    of_run = pl.DataFrame({"seed": list(numbers), "hardest": hardest}, schema_overrides={"hardest": pl.Int16})
    last = results.filter(pl.col("loop") == pl.col("loop").max().over(RUN)).join(of_run, on="seed", how="inner")
    wanted = pl.coalesce("main_cluster", "hardest")
    return last.filter(pl.col("cluster") == wanted).select(*RUN, pl.col("f1").alias("value"))


def first_region_gain(results: pl.DataFrame) -> pl.DataFrame:
    """Test F1 after the last loop less that before the first, in the region that the targeted arm searches first, as `value`."""
    searched = results.filter((pl.col("loop") == 1) & pl.col("searched_cluster").is_not_null())
    of_run = searched.select("seed", pl.col("searched_cluster").alias("cluster")).unique()
    inside = results.join(of_run, on=["seed", "cluster"], how="semi").sort("loop")
    gain = (pl.col("f1").last() - pl.col("f1").first()).alias("value")
    return inside.group_by(RUN, maintain_order=True).agg(gain)


def finds(results: pl.DataFrame, column: str) -> pl.DataFrame:
    """Growth of a count over a run, as `value`."""
    total = results.filter(pl.col("cluster").is_null())
    growth = (pl.col(column).max() - pl.col(column).min()).cast(pl.Float64).alias("value")
    return total.group_by(RUN, maintain_order=True).agg(growth)


def figures_of(
    scenario: str, data: str, options: argparse.Namespace
) -> dict[str, Callable[[pl.DataFrame], pl.DataFrame]]:
    """What is compared: a `value` a run."""
    figures: dict[str, Callable[[pl.DataFrame], pl.DataFrame]] = {
        "area": areas,
        "end_f1": final_scores,
        "worst_cluster_f1": worst_clusters,
        "fixed_cluster_f1": lambda results: fixed_cluster(results, data, options),
    }
    if scenario == "rare-positive":
        figures["first_region_gain"] = first_region_gain
        figures["labels_found"] = lambda results: finds(results, "num_train")
        figures["cells_viewed"] = lambda results: finds(results, "num_viewed")
    return figures


def judge(
    data: str, scenario: str, rows: dict[str, list[dict[str, Any]]], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row a variant, figure and arm (or `gain`: cluster-f1 less random): mean, and difference to corrected mode."""
    frames = {variant: frame_of(found) for variant, found in rows.items()}
    judged = []
    for name, make in figures_of(scenario, data, options).items():
        values = pl.concat([_by_variant(make(frame), variant) for variant, frame in frames.items()])
        every = pl.concat([values, _gain(values)])
        baseline = every.filter(pl.col("strategy") == "corrected").select(
            "scenario", "seed", pl.col("value").alias("base")
        )
        against = {(row["scenario"], row["strategy"]): row for row in compare(every, "corrected").to_dicts()}
        for (arm, variant), group in every.drop_nulls("value").group_by("scenario", "strategy", maintain_order=True):
            row = {"data": data, "scenario": scenario, "figure": name, "arm": arm, "variant": variant}
            row |= {
                "runs": group.height,
                "mean": group["value"].mean(),
                "interval": interval(group["value"].to_numpy()),
            }
            pairs = group.join(baseline, on=["scenario", "seed"], how="inner").drop_nulls("base")
            row["num_changed"] = int(((pairs["value"] - pairs["base"]).abs() > SAME).sum())
            found = against.get((arm, variant))
            wanted = ("num_pairs", "mean_difference", "low", "high", "p_value", "p_holm")
            judged.append(row | ({key: found[key] for key in wanted} if found else {}))
    return judged


def _gain(values: pl.DataFrame) -> pl.DataFrame:
    """What `cluster-f1` gains over `random` with the same seed, as one more arm."""
    keys = ["strategy", "main_cluster", "run", "seed"]
    arms = values.pivot(on="scenario", index=keys, values="value").drop_nulls(ARMS)
    gain = (pl.col(ARMS[1]) - pl.col(ARMS[0])).alias("value")
    return arms.select(pl.lit("gain").alias("scenario"), *keys, gain)


def _by_variant(values: pl.DataFrame, variant: str) -> pl.DataFrame:
    """The arm in the place of the scenario, the variant in that of the strategy; one figure a seed, averaged over main clusters."""
    mean = values.group_by("strategy", "run", "seed", maintain_order=True).agg(pl.col("value").mean())
    none = pl.lit(None, pl.Int16()).alias("main_cluster")
    return mean.select(
        pl.col("strategy").alias("scenario"), pl.lit(variant).alias("strategy"), none, "run", "seed", "value"
    ).sort("scenario", "seed")


def interval(values: np.ndarray) -> list[float]:
    """95 % percentile bootstrap interval of a mean."""
    rng = np.random.default_rng(len(values))
    means = values[rng.integers(len(values), size=(10_000, len(values)))].mean(axis=1)
    return [float(q) for q in np.quantile(means, [0.025, 0.975])]


def show(judged: list[dict[str, Any]], stopped: list[dict[str, Any]]) -> None:
    """A table a data set, scenario and figure."""
    for data, scenario, figure in dict.fromkeys((r["data"], r["scenario"], r["figure"]) for r in judged):
        rows = {
            (r["arm"], r["variant"]): r
            for r in judged
            if (r["data"], r["scenario"], r["figure"]) == (data, scenario, figure)
        }
        print(f"\n{data}, {scenario}: {figure}")
        print(f"{'':19}" + "".join(f"{arm:>38}" for arm in (*ARMS, "gain")) + "   stopped")
        for variant in dict.fromkeys(variant for _, variant in rows):
            lost = [s for s in stopped if (s["data"], s["scenario"], s["variant"]) == (data, scenario, variant)]
            texts = [_cell(rows.get((arm, variant))) for arm in (*ARMS, "gain")]
            print(f"{variant:19}" + "".join(f"{text:>38}" for text in texts) + f"{len(lost):>10}")


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    digits = 1 if row["figure"] in ("labels_found", "cells_viewed") else 4
    if row.get("mean_difference") is None:
        return f"{row['mean']:.{digits}f} [{row['interval'][0]:.{digits}f} {row['interval'][1]:.{digits}f}]"
    if not row["num_changed"]:
        return f"{row['mean']:.{digits}f} in no run"
    text = f"{row['mean']:.{digits}f} {row['mean_difference']:+.{digits}f}"
    if row["low"] is None:
        return text
    return f"{text} [{row['low']:+.{digits}f} {row['high']:+.{digits}f}] {row['num_changed']:2d}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release", type=Path, default=Path("../shared/data/hil_release"))
    parser.add_argument("--work", type=Path, default=Path("hil_study"), help="keeps embeddings and maps of the cohorts")
    parser.add_argument("--workers", type=int, default=2)
    every = ["limited-global", "limited-local", "rare-positive"]
    parser.add_argument("--scenarios", nargs="+", choices=every, default=every)
    options = parser.parse_args()
    started = time.monotonic()
    rows, stopped = run_all(options)
    judged = [row for (data, scenario), found in rows.items() for row in judge(data, scenario, found, options)]
    show(judged, stopped)
    found = {"figures": judged, "stopped": stopped, "seconds": time.monotonic() - started}
    found |= {"hardware": hardware(), "versions": library_versions()}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
