"""Which strategy spends the expert's labels best? All strategies on phantom cohorts, real Jurkat cells and the release folder.

    python -m benchmarks.hil_study choose  [--work FOLDER] [--jurkat FILE]
    python -m benchmarks.hil_study confirm [--work FOLDER] [--release DIR]

`choose` runs every strategy on five phantom cohorts (seeds 1 to 5, five starts each) and on five halvings of the real Jurkat cells
(dividing cells positive, each half drawn from, two to three starts each), and recommends one by a rule fixed before the first run: of the
strategies that are significantly worse (95 % interval below zero) than neither `random` nor `cluster-f1` on neither set, the one with the
highest mean gain over `random`, averaged over both sets. `confirm` runs once on five further phantom cohorts (seeds from 1000) and on the
release, judges the recommendation that `choose` wrote down, and changes nothing.

Scenario limited-global as in the paper: 100 labels, then 100 a loop, four loops. The figure is the area under the curve of test F1 over
labels (mean height). Differences are paired by cohort and start. Clean answers, and 5 and 10 % wrong ones. Writes
`benchmarks/results/hil_study.json`. Runs without Ray, `--workers` processes of one thread each.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
from threadpoolctl import threadpool_limits

from benchmarks.hil_study_problems import JURKAT_FOLDS, jurkat_problem, phantom_problem, release_problem
from benchmarks.segment_accuracy import hardware
from ctc_ray.hil.comparison import areas, compare, final_scores, labels_to_reach, worst_clusters
from ctc_ray.hil.loop import Trial, run_trial
from ctc_ray.hil.pools import Problem
from ctc_ray.hil.settings import LoopSettings
from ctc_ray.hil.strategies import STRATEGIES
from ctc_ray.records import library_versions
from ctc_ray.schema import TRIAL_SCHEMA

RESULTS = Path(__file__).parent / "results" / "hil_study.json"
SCENARIO = "limited-global"
BASELINES = ("random", "cluster-f1")
FLIP_RATES = (0.0, 0.05, 0.10)
STARTS = 5
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
    runs = [("phantom", first + cohort, start) for cohort in range(5) for start in range(STARTS)]
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


def run_all(tasks: list[Task], options: argparse.Namespace) -> dict[tuple[str, float], pl.DataFrame]:
    """Results by data set and share of wrong answers."""
    for data, number in dict.fromkeys((task.data, task.number) for task in tasks):
        problem_of(data, number, options)  # made once, here, and read by the workers
    found: dict[tuple[str, float], list[dict[str, Any]]] = {}
    started = time.monotonic()
    with ProcessPoolExecutor(options.workers) as pool:
        for done, (task, rows) in enumerate(
            zip(tasks, pool.map(run, tasks, [options] * len(tasks), chunksize=14), strict=True), 1
        ):
            found.setdefault((task.data, task.flip_rate), []).extend(rows)
            if done % 100 == 0:
                print(f"  {done} of {len(tasks)} runs in {time.monotonic() - started:.0f} s", flush=True)
    return {key: _frame(rows) for key, rows in found.items()}


def _frame(rows: list[dict[str, Any]]) -> pl.DataFrame:
    frame = pl.from_arrow(pa.Table.from_pylist(rows, schema=TRIAL_SCHEMA))
    if not isinstance(frame, pl.DataFrame):
        raise TypeError("a table gives a frame")
    return frame


FIGURES: dict[str, Callable[[pl.DataFrame], pl.DataFrame]] = {
    "area": areas,
    "final_f1": final_scores,
    "worst_cluster_f1": worst_clusters,
}


def judge(results: pl.DataFrame) -> dict[str, Any]:
    """Means of every figure, comparisons with both baselines, and labels to reach what chance reaches at the end."""
    random_end = float(final_scores(results).filter(pl.col("strategy") == "random")["value"].mean() or 0.0)
    reached = labels_to_reach(results, random_end)
    figures = {name: make(results) for name, make in FIGURES.items()} | {"labels_to_random_end": reached}
    means = {
        name: {
            str(key[0]): {"mean": group["value"].mean(), "sd": group["value"].std(), "runs": group["value"].count()}
            for key, group in figure.sort("strategy").group_by("strategy", maintain_order=True)
        }
        for name, figure in figures.items()
    }
    against = {base: compare(figures["area"], base).to_dicts() for base in BASELINES}
    return {"random_end_f1": random_end, "means": means, "area_against": against}


def recommend(judged: dict[str, Any]) -> dict[str, Any]:
    """The recommendation by the rule of this module's docstring, on clean answers."""
    gains: dict[str, list[float]] = {}
    refused: dict[str, str] = {}
    for data in ("phantom", "jurkat"):
        for base in BASELINES:
            for row in judged[f"{data} 0.00"]["area_against"][base]:
                if row["high"] < 0:
                    refused[row["strategy"]] = f"worse than {base} on {data}"
                if base == "random":
                    gains.setdefault(row["strategy"], []).append(row["mean_difference"])
    ranked = sorted(((sum(found) / len(found), name) for name, found in gains.items()), reverse=True)
    allowed = [(gain, name) for gain, name in ranked if name not in refused and name not in BASELINES]
    return {"recommended": allowed[0][1] if allowed else None, "mean_gain": ranked, "refused": refused}


def show(name: str, judged: dict[str, Any]) -> None:
    """One table a data set and share of wrong answers."""
    print(f"\n{name}: random ends at F1 {judged['random_end_f1']:.3f}")
    print(
        f"{'strategy':20}{'area':>7}{'vs random (95 %)':>26}{'vs cluster-f1 (95 %)':>28}{'end F1':>8}{'worst':>7}{'labels':>8}"
    )
    means, against = judged["means"], judged["area_against"]
    for strategy in sorted(means["area"], key=lambda s: -means["area"][s]["mean"]):
        texts = []
        for base in BASELINES:
            row = next((r for r in against[base] if r["strategy"] == strategy), None)
            texts.append(f"{row['mean_difference']:+.4f} [{row['low']:+.4f} {row['high']:+.4f}]" if row else "-")
        end, worst = means["final_f1"][strategy]["mean"], means["worst_cluster_f1"][strategy]["mean"]
        labels = means["labels_to_random_end"][strategy]
        reach = f"{labels['mean']:.0f}" if labels["mean"] is not None else "-"
        print(
            f"{strategy:20}{means['area'][strategy]['mean']:7.4f}{texts[0]:>26}{texts[1]:>28}{end:8.3f}{worst:7.3f}{reach:>8}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=("choose", "confirm"))
    parser.add_argument("--work", type=Path, default=Path("hil_study"), help="keeps embeddings and maps")
    parser.add_argument("--jurkat", type=Path, default=Path("../shared/data/jurkat_ifc/cells.npz"))
    parser.add_argument("--release", type=Path, default=Path("../shared/data/hil_release"))
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES))
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    started = time.monotonic()
    with threadpool_limits(1):
        results = run_all(list(tasks_of(options.phase, options.strategies)), options)
    judged = {f"{data} {flip:.2f}": judge(frame) for (data, flip), frame in results.items()}
    for name, found in judged.items():
        show(name, found)
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found = {
        "data": judged,
        "seconds": time.monotonic() - started,
        "hardware": hardware(),
        "versions": library_versions(),
    }
    if options.phase == "choose":
        found |= recommend(judged)
        print(f"\nrecommended: {found['recommended']}; refused: {found['refused']}")
    else:
        print(f"\njudged: {known.get('choose', {}).get('recommended')}, as chosen before")
    known[options.phase] = found
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
