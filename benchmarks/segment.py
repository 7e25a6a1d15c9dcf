"""StarDist here beside the stock package on TensorFlow: seconds a field, memory, agreement; in one run.

    make .venv-parity/.installed                       # the stock package, in an environment of its own
    python -m benchmarks.segment --stock-python .venv-parity/bin/python --nuclei ../shared/data/dsb2018/test/images

Same weights, same fields (phantom CK fields of 10, 84 and 465 objects and a real image of nuclei), same number of threads, one
process for each way, asked in turn: medians of 7 rounds. `post` is non-maximum suppression and drawing; end to end starts at
the raw image. Agreement is 2 TP / (objects of both), matched at IoU 0.9, with stock as the truth, over that field and `--more` others
of its kind. Peak memory is that of the whole process after all fields. Prints a table and writes `benchmarks/results/segment.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from skimage.io import imread
from stardist.matching import matching

from benchmarks.segment_accuracy import hardware
from ctc_ray.phantom import PROFILES, draw_field
from ctc_ray.records import library_versions

PHANTOM_SEED = 779
OBJECTS = (10, 84, 465)
"""Few, the paper's average, and a crowded field."""
WAYS = ("fp32", "fp32, background skipped", "bf16", "bf16, background skipped")
IOU = 0.9


def draw_images(nuclei: Path | None, more: int) -> dict[str, list[np.ndarray]]:
    """CK pages (H, W) of phantom fields with so many CK objects, a patient each, and the largest real images."""
    images: dict[str, list[np.ndarray]] = {}
    for objects in OBJECTS:
        profile = replace(PROFILES["paper"], ck_objects_mean=float(objects), ck_objects_sd=0.0)
        images[f"phantom, {objects} objects"] = [
            draw_field(profile, patient=f"S{1 + number}", field=1, seed=PHANTOM_SEED).pages[2]
            for number in range(1 + more)
        ]
    if nuclei is not None:
        paths = [path for pattern in ("*.tif*", "*.png") for path in sorted(nuclei.glob(pattern))]
        real = sorted((np.asarray(imread(path)) for path in paths), key=np.size, reverse=True)[: 1 + more]
        images[f"real nuclei, {real[0].shape[0]}x{real[0].shape[1]}"] = real
    return images


class Way:
    """A process that segments images when asked."""

    def __init__(self, command: list[str], threads: int) -> None:
        environment = dict(os.environ, OMP_NUM_THREADS=str(threads))
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.about = self._read()

    def ask(self, image: Path, labels: Path | None = None) -> dict[str, Any]:
        """Segment one image; the answer has seconds, the number of objects and the peak memory."""
        if self._process.stdin is None:
            raise RuntimeError("the process has no input")
        print(
            json.dumps({"image": str(image), "labels": str(labels) if labels else None}),
            file=self._process.stdin,
            flush=True,
        )
        return self._read()

    def _read(self) -> dict[str, Any]:
        if self._process.stdout is None:
            raise RuntimeError("the process has no output")
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args!r} ended with {self._process.wait()}; run it by hand to see why")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()


def answer_here(weights: str, threads: int, precision: str, skip_background: bool) -> None:
    """What `Way` talks to for our ways."""
    import torch

    from ctc_ray.segment.instances import instances_from_candidates
    from ctc_ray.segment.model import StarDist

    torch.set_num_threads(threads)
    model = StarDist.load(weights, precision=precision, skip_background=skip_background)
    print(json.dumps({"precision": model.precision}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        image = np.load(job["image"])
        started = time.perf_counter()
        candidates = model.candidates(image)
        networked = time.perf_counter()
        found = instances_from_candidates(candidates, nms_thresh=model.thresholds.nms)
        ended = time.perf_counter()
        if job["labels"]:
            np.save(job["labels"], found.labels)
        status = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(row.split()[1]) * 1024 for row in status if row.startswith("VmHWM"))
        answer = {"network_s": networked - started, "post_s": ended - networked, "end_to_end_s": ended - started}
        print(json.dumps(answer | {"objects": len(found), "peak_bytes": peak}), flush=True)


def measure(
    ways: Mapping[str, Way], images: Mapping[str, Sequence[np.ndarray]], rounds: int, folder: Path
) -> list[dict[str, Any]]:
    """One row for each kind of image and way: medians over the rounds, agreement with stock."""
    rows: list[dict[str, Any]] = []
    for kind, (name, fields) in enumerate(images.items()):
        paths = [folder / f"{kind}-{number}.npy" for number in range(len(fields))]
        for path, image in zip(paths, fields, strict=True):
            np.save(path, image)
        found = {way: [_labels(ways[way], path, folder) for path in reversed(paths)] for way in ways}
        answers: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way in ways:
                answers[way].append(ways[way].ask(paths[0]))
        for way, runs in answers.items():
            rows.append({"image": name, "way": way, "objects": runs[-1]["objects"]})
            rows[-1] |= _timing(answers["stock"], runs) | _agreement(found["stock"], found[way])
            print(line_of(rows[-1]), flush=True)
    return rows


def _labels(way: Way, path: Path, folder: Path) -> np.ndarray:
    way.ask(path, folder / "labels.npy")
    labels: np.ndarray = np.load(folder / "labels.npy")
    return labels


def _timing(stock: Sequence[Mapping[str, float]], runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    medians = {key: statistics.median(run[key] for run in runs) for key in ("network_s", "post_s", "end_to_end_s")}
    # Ratios round by round, so that a slow minute of the machine counts for both.
    ratios = [theirs["end_to_end_s"] / ours["end_to_end_s"] for theirs, ours in zip(stock, runs, strict=True)]
    return medians | {"stock_over_this": statistics.median(ratios)}


def _agreement(stock: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> dict[str, Any]:
    matches = [matching(theirs, ours, thresh=IOU) for theirs, ours in zip(stock, found, strict=True)]
    true, every = sum(match.tp for match in matches), sum(match.n_true + match.n_pred for match in matches)
    identical = all(np.array_equal(theirs, ours) for theirs, ours in zip(stock, found, strict=True))
    counted = sum(match.n_true for match in matches)
    return {"agreement": 2 * true / every if every else 1.0, "compared": counted, "identical": identical}


HEADER = (
    f"{'image':24} {'way':26} {'found':>5} {'network s':>9} {'post s':>7} {'end to end s':>12} {'stock/this':>10} "
    f"{'agreement':>9} {'of':>5} {'identical':>9}"
)


def line_of(row: Mapping[str, Any]) -> str:
    """One line of the table."""
    return (
        f"{row['image']:24} {row['way']:26} {row['objects']:5d} {row['network_s']:9.3f} {row['post_s']:7.3f} "
        f"{row['end_to_end_s']:12.3f} {row['stock_over_this']:9.2f}x {row['agreement']:9.4f} {row['compared']:5d} "
        f"{row['identical']!s:>9}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stock-python", type=Path, help="interpreter that has stardist and TensorFlow")
    parser.add_argument("--nuclei", type=Path, help="folder of real images")
    parser.add_argument("--weights", help="weight folder; default: the shipped one")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--more", type=int, default=5, help="further fields of each kind, for the agreement")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "segment.json")
    parser.add_argument("--answer", nargs=2, metavar=("PRECISION", "SKIP"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.answer:
        answer_here(arguments.weights, arguments.threads, arguments.answer[0], arguments.answer[1] == "yes")
        return
    if arguments.stock_python is None:
        parser.error("--stock-python is needed: `make .venv-parity/.installed` makes such an environment")
    from ctc_ray.segment.weights import load_weights, save_keras_folder  # torch, which the children measure without

    weights = load_weights(arguments.weights)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_keras_folder(weights.network, weights.thresholds, folder / "weights")
        stock = [str(arguments.stock_python), str(Path(__file__).with_name("stock_stardist.py"))]
        ways = {"stock": Way([*stock, str(folder / "weights"), str(arguments.threads)], arguments.threads)}
        for way in WAYS:
            here = [sys.executable, "-m", "benchmarks.segment", "--weights", str(folder / "weights")]
            answer = ["--answer", way.split(",")[0], "yes" if "skipped" in way else "no"]
            ways[way] = Way([*here, "--threads", str(arguments.threads), *answer], arguments.threads)
        print(HEADER)
        rows = measure(ways, draw_images(arguments.nuclei, arguments.more), arguments.rounds, folder)
        blank = folder / "0-0.npy"
        peaks = {name: way.ask(blank)["peak_bytes"] for name, way in ways.items()}
        for name, peak in peaks.items():
            print(f"peak memory of the process, {name}: {peak / 2**20:,.0f} MiB")
        versions = ways["stock"].about
        for way in ways.values():
            way.close()
    report = {
        "rows": rows,
        "peak_bytes": peaks,
        "rounds": arguments.rounds,
        "threads": arguments.threads,
        "weights": weights.fingerprint,
        "hardware": hardware() | {"instructions": instructions(), "platform": platform.platform()},
        "versions": library_versions() | versions,
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


def instructions() -> list[str]:
    """The processor's instruction sets that matter here."""
    text = Path("/proc/cpuinfo").read_text()
    return [name for name in ("avx512f", "avx512_bf16", "amx_bf16") if name in text]


if __name__ == "__main__":
    main()
