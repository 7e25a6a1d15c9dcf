"""Time of the paper's limited-global protocol: Ray Tune against plain loops in one process.

The protocol has 2 strategies x 5 seeds x 5 evaluations x 100 Monte-Carlo splits (faithful mode). Three ways are timed:
`plain` fits scikit-learn's SVC split by split, as the reference does; `kernel` is ctc_ray's loop in the same process; `tune` is
the sweep of `ctc-ray simulate` on a connected cluster. All three must give the same rows.

python -m benchmarks.hil [--release DIR] [--concurrent N] [--json PATH]
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import polars as pl
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

from benchmarks.segment_accuracy import hardware
from ctc_ray.cluster import connect
from ctc_ray.config import RayConfig
from ctc_ray.hil import evidence, loop
from ctc_ray.hil.loop import Trial, run_trial
from ctc_ray.hil.pools import Floats, Labels, Problem, cell_set
from ctc_ray.hil.release import read_release
from ctc_ray.hil.scores import PooledPredictions, monte_carlo_seeds
from ctc_ray.hil.settings import PAPER_SEEDS, LoopSettings
from ctc_ray.progress import Progress
from ctc_ray.records import library_versions
from ctc_ray.storage import Store

SETTINGS = LoopSettings(mode="faithful")
TRIALS = [
    Trial("limited-global", strategy, None, run, seed)
    for strategy in ("random", "cluster-f1")
    for run, seed in enumerate(PAPER_SEEDS, start=1)
]


def mixture(seed: int = 0) -> Problem:
    """A seeded Gaussian mixture of the size of the paper's labelled sets: 2,638 to draw from, 2,773 to test, 32 features."""
    rng = np.random.default_rng(seed)
    centres, shift = rng.normal(0, 2.0, (6, 32)), rng.normal(0, 0.35, (6, 32))
    sets = []
    for name, num in (("train", 2638), ("test", 2773)):
        clusters = rng.choice(6, num, p=[0.25, 0.2, 0.18, 0.15, 0.12, 0.1])
        labels = (rng.random(num) < 0.45).astype(np.int8)
        features = centres[clusters] + labels[:, None] * shift[clusters] + rng.normal(0, 1, (num, 32))
        sets.append(cell_set(name, [f"{name}-{i}" for i in range(num)], features, labels, clusters))
    return Problem(sets[0], sets[0].clusters, sets[1])


class PlainClassifier:
    """scikit-learn's SVC behind the two methods that the loop calls."""

    def __init__(self, model: SVC) -> None:
        self.model = model

    @classmethod
    def fit(cls, features: Floats, labels: Labels) -> "PlainClassifier":
        """Fit with the reference's settings."""
        return cls(SVC(class_weight="balanced").fit(features, labels))

    def predict(self, features: Floats) -> Labels:
        """Predicted labels."""
        return np.asarray(self.model.predict(features))


def plain_monte_carlo(features: Floats, labels: Labels, num_splits: int) -> PooledPredictions:
    """The Monte-Carlo estimate with one SVC a split."""
    rows, predictions = [], []
    for seed in monte_carlo_seeds(num_splits):
        kept, held_out = train_test_split(np.arange(len(labels)), test_size=0.1, random_state=seed)
        model = SVC(class_weight="balanced").fit(features[kept], labels[kept])
        rows.append(held_out)
        predictions.append(model.predict(features[held_out]))
    return PooledPredictions(np.concatenate(rows), np.concatenate(predictions))


def timed(work: Callable[[], pl.DataFrame]) -> tuple[pl.DataFrame, float, float]:
    """Result, wall seconds and processor seconds (of this process)."""
    wall, processor = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - wall, time.process_time() - processor


def in_one_process(problem: Problem) -> pl.DataFrame:
    """All trials one after another."""
    rows = [row for trial in TRIALS for row in run_trial(problem, trial, SETTINGS)]
    return pl.DataFrame(rows, infer_schema_length=None)


def with_tune(problem: Problem, concurrent: int) -> pl.DataFrame:
    """All trials through the sweep."""
    from ctc_ray.hil.parts import Parts
    from ctc_ray.hil.sweep import run_sweep

    with tempfile.TemporaryDirectory() as folder:
        parts = Parts(Store(folder), "benchmark", SETTINGS, {})
        run_sweep(problem, TRIALS, parts, max_concurrent=concurrent, progress=Progress(quiet=True))
        return pl.concat([pl.read_parquet(f"{folder}/{parts.path(trial)}") for trial in TRIALS])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release", help="processed release; without it a seeded mixture of its size")
    parser.add_argument("--concurrent", type=int, default=2, help="trials at a time")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/hil.json"))
    arguments = parser.parse_args()
    problem = read_release(Store(arguments.release)).problem() if arguments.release else mixture()
    seconds: dict[str, dict[str, float]] = {}
    with (
        mock.patch.object(loop, "Classifier", PlainClassifier),
        mock.patch.object(evidence, "monte_carlo", plain_monte_carlo),
    ):
        plain, wall, processor = timed(lambda: in_one_process(problem))
    seconds["plain"] = {"wall_s": wall, "processor_s": processor}
    kernel, wall, processor = timed(lambda: in_one_process(problem))
    seconds["kernel"] = {"wall_s": wall, "processor_s": processor}
    with connect(config=RayConfig(num_cpus=4, object_store_mb=200)):
        swept, wall, _ = timed(lambda: with_tune(problem, arguments.concurrent))
    seconds["tune"] = {"wall_s": wall}
    largest = max(float((frame["f1"] - plain["f1"]).abs().max() or 0.0) for frame in (kernel, swept))  # type: ignore[arg-type]
    report = {
        "data": "release" if arguments.release else "mixture",
        "trials": len(TRIALS),
        "rows": plain.height,
        "largest_f1_difference": largest,
        "concurrent": arguments.concurrent,
        "seconds": seconds,
        "speedup_tune_over_plain": seconds["plain"]["wall_s"] / wall,
        "speedup_kernel_over_plain": seconds["plain"]["wall_s"] / seconds["kernel"]["wall_s"],
        "load_average": os.getloadavg()[0],
        "hardware": hardware(),
        "versions": library_versions(),
    }
    for name, values in seconds.items():
        faster = seconds["plain"]["wall_s"] / values["wall_s"]
        print(
            f"{name:8s} {values['wall_s']:7.1f} s wall   {values.get('processor_s', float('nan')):7.1f} s processor   {faster:4.1f}x"
        )
    print(
        f"largest difference of F1 between the three: {largest:.1e} over {plain.height} rows; load {report['load_average']:.1f}"
    )
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
