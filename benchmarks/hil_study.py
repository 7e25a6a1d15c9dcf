"""Which strategy spends the expert's labels best? All strategies on phantom cohorts, real Jurkat cells and the release folder.

    python -m benchmarks.hil_study choose  [--work FOLDER] [--jurkat FILE]
    python -m benchmarks.hil_study confirm [--work FOLDER] [--release DIR]
    python -m benchmarks.hil_study show [--figure FILE]

`choose` runs every strategy on 25 phantom cohorts (seeds 1 to 25, one start each) and on five halvings of the real Jurkat cells
(dividing cells positive, each half drawn from, two to three starts each), and recommends one by a rule: of the strategies that are
significantly worse (95 % interval below zero) than neither `random` nor `cluster-f1` on neither set, the one with the highest mean
gain over `random`, averaged over both sets. `confirm` runs once on 25 further phantom cohorts (seeds from 1000) and on the release (25
starts), judges the recommendation that `choose` wrote down, and changes nothing. `show` prints the tables of `docs/hil_study.md`
and draws its figure.

Scenario limited-global as in the paper: 100 labels, then 100 a loop, four loops. The figure is the area under the curve of test F1 over
labels (mean height). Differences are paired by cohort and start. Clean answers, and 5 and 10 % wrong ones. Writes
`benchmarks/results/hil_study.json`, and all rows into the work folder. Runs without Ray, `--workers` processes of one thread each.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
from threadpoolctl import threadpool_limits

from benchmarks.hil_study_judgement import judge, recommend
from benchmarks.hil_study_problems import JURKAT_FOLDS, jurkat_problem, phantom_problem, release_problem
from benchmarks.hil_study_tables import draw, print_markdown
from benchmarks.segment_accuracy import hardware
from ctc_ray.hil.loop import Trial, run_trial
from ctc_ray.hil.pools import Problem
from ctc_ray.hil.settings import LoopSettings
from ctc_ray.hil.strategies import STRATEGIES
from ctc_ray.records import library_versions
from ctc_ray.schema import TRIAL_SCHEMA

RESULTS = Path(__file__).parent / "results" / "hil_study.json"
SCENARIO = "limited-global"
FLIP_RATES = (0.0, 0.05, 0.10)
COHORTS = 25
RELEASE_STARTS = 25


@dataclass(frozen=True)
class Task:
    """One strategy on one problem from one start."""

    data: str
    number: int
    strategy: str
    start: int
    flip_rate: float

    @property
    def seed(self) -> int:
        """Pairs arms: the same cohort and the same first labels."""
        return 1_000 * self.number + self.start


def problem_of(data: str, number: int, options: argparse.Namespace) -> Problem:
    """The numbered problem of a data set."""
    if data == "phantom":
        return phantom_problem(number, options.work)
    if data == "jurkat":
        return jurkat_problem(number, options.jurkat, options.work)
    return release_problem(options.release)


def tasks_of(phase: str, strategies: list[str]) -> Iterator[Task]:
    """All runs of a phase."""
    first = 1 if phase == "choose" else 1000
    runs = [("phantom", first + cohort, 0) for cohort in range(COHORTS)]
    if phase == "choose":
        runs += [("jurkat", half, start) for half in range(2 * JURKAT_FOLDS) for start in range(2 + half % 2)]
    else:
        runs += [("release", 0, start) for start in range(RELEASE_STARTS)]
    for data, number, start in runs:
        for flip_rate in FLIP_RATES:
            for strategy in strategies:
                yield Task(data, number, strategy, start, flip_rate)


_PROBLEMS: dict[tuple[str, int], Problem] = {}


def run(task: Task, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one run; keeps the last problem, since tasks come problem by problem."""
    key = (task.data, task.number)
    if key not in _PROBLEMS:
        _PROBLEMS.clear()
        _PROBLEMS[key] = problem_of(task.data, task.number, options)
    trial = Trial(SCENARIO, task.strategy, None, task.start + 1, task.seed)
    with threadpool_limits(1):
        rows = run_trial(_PROBLEMS[key], trial, LoopSettings(flip_rate=task.flip_rate))
    return [row for row in rows if row["split"] == "test"]


def run_all(tasks: list[Task], options: argparse.Namespace) -> pl.DataFrame:
    """All rows: columns of `TRIAL_SCHEMA`, `data` and `flip_rate`."""
    for data, number in dict.fromkeys((task.data, task.number) for task in tasks):
        problem_of(data, number, options)  # made once, here, and read by the workers
    found: list[pl.DataFrame] = []
    started = time.monotonic()
    # A forked worker would wait for ever for threads of Arrow and polars that stayed with its parent.
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        for done, (task, rows) in enumerate(
            zip(tasks, pool.map(run, tasks, [options] * len(tasks), chunksize=14), strict=True), 1
        ):
            about = {"data": pl.lit(task.data), "flip_rate": pl.lit(task.flip_rate)}
            found.append(_frame(rows).with_columns(**about))
            if done % 100 == 0:
                print(f"  {done} of {len(tasks)} runs in {time.monotonic() - started:.0f} s", flush=True)
    return pl.concat(found)


def _frame(rows: list[dict[str, Any]]) -> pl.DataFrame:
    frame = pl.from_arrow(pa.Table.from_pylist(rows, schema=TRIAL_SCHEMA))
    if not isinstance(frame, pl.DataFrame):
        raise TypeError("a table gives a frame")
    return frame


def judged_by_set(results: pl.DataFrame) -> dict[str, Any]:
    """Judgements by `<data set> <share of wrong answers>`."""
    parts = results.partition_by("data", "flip_rate", as_dict=True, include_key=False)
    return {f"{data} {flips:.2f}": judge(part) for (data, flips), part in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=("choose", "confirm", "show"))
    parser.add_argument("--work", type=Path, default=Path("hil_study"), help="keeps embeddings, maps and all rows")
    parser.add_argument("--jurkat", type=Path, default=Path("../shared/data/jurkat_ifc/cells.npz"))
    parser.add_argument("--release", type=Path, default=Path("../shared/data/hil_release"))
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--figure", type=Path, help="where `show` draws the figure (SVG)")
    options = parser.parse_args()
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if options.phase == "show":
        print_markdown(known)
        if options.figure:
            draw(known, options.figure)
        return
    started = time.monotonic()
    with threadpool_limits(1):
        results = run_all(list(tasks_of(options.phase, options.strategies)), options)
    results.write_parquet(options.work / f"rows-{options.phase}.parquet")
    judged = judged_by_set(results)
    seconds = time.monotonic() - started
    found = {"data": judged, "seconds": seconds, "hardware": hardware(), "versions": library_versions()}
    if options.phase == "choose":
        found |= recommend(judged)
        print(f"\nrecommended: {found['recommended']}; refused: {found['refused']}")
    else:
        print(f"\njudged: {known.get('choose', {}).get('recommended')}, as chosen before")
    known[options.phase] = found
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    print_markdown(known, phases=(options.phase,))


if __name__ == "__main__":
    main()
