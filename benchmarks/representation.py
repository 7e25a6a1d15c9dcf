"""How good are the features? Probes on few labels, on phantom and on real cells, against what needs no training.

Run: python -m benchmarks.representation [--marker FOLDER] [--paper FOLDER] [--jurkat FILE] [--out FILE]

Methods: raw pixels reduced by PCA; the encoder with random weights; encoders trained by DINO from random weights with the
`paper` and with the `marker` views (`benchmarks/train_default_encoder.py`: both at 48 px, same crops, steps and schedules; the
shipped encoder is the one with `marker` views, and stands for it unless `--marker` names another); a small convolutional network
trained on the few labels alone.

Probes on standardised features: an SVM (rbf, C = 1), a linear probe (logistic regression, C = 0.1) and the five nearest
neighbours by cosine. Phantom cells: F1 of the CTCs among all kinds evenly, on patients that gave no labels. Jurkat cells: balanced
accuracy over seven classes on the cells that gave no labels (at most half of a class gives labels). Five seeds choose the labels.
Every probe and count of labels is held against the bars, which are printed; nothing is chosen on the scores.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, f1_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from benchmarks.segment_accuracy import hardware
from benchmarks.supervised_cnn import train_and_predict
from ctc_ray.phantom import CellKind, draw_crops
from ctc_ray.pretrain.encoder import DEFAULT_FOLDER, build_backbone, load_folder
from ctc_ray.pretrain.intensity import IntensityRule, scale_for_network, to_fraction
from ctc_ray.records import library_versions

Features = npt.NDArray[np.float32]
Labels = npt.NDArray[np.str_]
Encoders = dict[str, tuple[torch.nn.Module, IntensityRule]]
SEEDS = (164, 29, 7, 190, 71)
LABEL_COUNTS = {"phantom": (25, 100, 500), "jurkat": (5, 25, 100)}
PCA_WIDTHS = (32, 128)
MARGIN = 0.02
"""`marker` is to beat the encoder with random weights by this much."""


@dataclass(frozen=True)
class Task:
    """Labelled cells to learn from and cells to be judged on.

    Attributes:
        name: `phantom` or `jurkat`.
        crops: (N, 3, 48, 48) counts.
        labels: (N,) classes.
        full_scale: count of a saturated pixel; None takes the dtype's maximum.
        candidates: rows that may give labels.
        judged: rows that are judged where they gave none.
    """

    name: str
    crops: npt.NDArray[Any]
    labels: Labels
    full_scale: float | None
    candidates: npt.NDArray[np.intp]
    judged: npt.NDArray[np.intp]

    def draw(self, per_class: int, seed: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        """Rows that give labels (`per_class` of each class, at most half of a class) and rows that are judged."""
        rng = np.random.default_rng(seed)
        chosen = []
        for name in np.unique(self.labels):
            rows = self.candidates[self.labels[self.candidates] == name]
            chosen.append(rng.choice(rows, size=min(per_class, len(rows) // 2), replace=False))
        train = np.concatenate(chosen)
        return train, np.setdiff1d(self.judged, train)

    def score(self, rows: npt.NDArray[np.intp], predicted: Labels) -> float:
        """F1 of the CTCs, or balanced accuracy."""
        if self.name == "phantom":
            return float(f1_score(self.labels[rows], predicted, pos_label="ctc"))
        return float(balanced_accuracy_score(self.labels[rows], predicted))


def phantom_task() -> Task:
    """All kinds of object evenly; labels from eight patients, judged on eight others."""
    train, train_y = _phantom_cells(250, [f"bench-train-{i}" for i in range(8)])
    test, test_y = _phantom_cells(150, [f"bench-test-{i}" for i in range(8)])
    crops, labels = np.concatenate([train, test]), np.concatenate([train_y, test_y])
    return Task("phantom", crops, labels, None, np.arange(len(train)), np.arange(len(train), len(crops)))


def jurkat_task(file: Path) -> Task:
    """Real imaging-flow-cytometry cells, mirrored at the border from 40 to 48 px; 12-bit counts."""
    with np.load(file, allow_pickle=False) as data:
        images, labels = data["X"], data["y"]
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="reflect")
    crops = np.ascontiguousarray(padded.transpose(0, 3, 1, 2))
    everything = np.arange(len(crops))
    return Task("jurkat", crops, labels, 4095.0, everything, everything)


def _phantom_cells(per_kind: int, patients: list[str]) -> tuple[npt.NDArray[np.uint8], Labels]:
    crops, labels = [], []
    for index, patient in enumerate(patients):
        drawn, kinds = draw_crops(
            per_kind * len(CellKind) // len(patients),
            seed=9000 + index,
            kinds=dict.fromkeys(CellKind, 1.0),
            patient=patient,
        )
        crops.append(drawn)
        labels.append(np.where(np.char.startswith(kinds, "ctc"), "ctc", "other"))
    return np.concatenate(crops), np.concatenate(labels)


def features_of(
    backbone: torch.nn.Module, rule: IntensityRule, crops_NCHW: npt.NDArray[Any], full_scale: float | None
) -> Features:
    """Vectors (N, D) of crops by a backbone in eval mode, fp32."""
    backbone.eval()
    parts = []
    with torch.inference_mode():
        for start in range(0, len(crops_NCHW), 256):
            fraction = to_fraction(crops_NCHW[start : start + 256], full_scale)
            parts.append(backbone(scale_for_network(fraction, rule)).float().numpy())
    return np.concatenate(parts)


def pca_features(task: Task, width: int) -> Features:
    """Raw pixels reduced by a PCA that saw the cells which may give labels."""
    flat = task.crops.reshape(len(task.crops), -1)
    scale = float(np.iinfo(flat.dtype).max)
    model = PCA(n_components=width, random_state=0).fit(flat[task.candidates[:2000]] / scale)
    return np.concatenate([model.transform(part / scale) for part in np.array_split(flat, 8)]).astype(np.float32)


PROBES: dict[str, Callable[[], Any]] = {
    "svm": lambda: SVC(C=1.0, gamma="scale", class_weight="balanced"),
    "linear": lambda: LogisticRegression(C=0.1, class_weight="balanced", max_iter=2000),
    "knn": lambda: KNeighborsClassifier(n_neighbors=5, metric="cosine", weights="distance"),
}


def probe(task: Task, features: Features) -> list[dict[str, Any]]:
    """Scores of every probe, count of labels and seed."""
    rows = []
    for per_class in LABEL_COUNTS[task.name]:
        for seed in SEEDS:
            train, judged = task.draw(per_class, seed)
            for name, make in PROBES.items():
                model = make_pipeline(StandardScaler(), make()).fit(features[train], task.labels[train])
                score = task.score(judged, model.predict(features[judged]))
                rows.append({"probe": name, "labels": per_class, "seed": seed, "score": score})
    return rows


def supervised(task: Task, rule: IntensityRule) -> list[dict[str, Any]]:
    """Scores of a small network that is trained on the few labels alone."""
    pixels = scale_for_network(to_fraction(task.crops, task.full_scale), rule)
    rows = []
    for per_class in LABEL_COUNTS[task.name]:
        for seed in SEEDS:
            train, judged = task.draw(per_class, seed)
            predicted = train_and_predict(pixels[train], task.labels[train], pixels[judged], seed=seed)
            rows.append({"probe": "cnn", "labels": per_class, "seed": seed, "score": task.score(judged, predicted)})
    return rows


def methods_of(task: Task, encoders: Encoders) -> dict[str, Callable[[], list[dict[str, Any]]]]:
    """What is compared: a name and how to score it."""

    def of_pixels(width: int) -> list[dict[str, Any]]:
        return probe(task, pca_features(task, width))

    def of_encoder(backbone: torch.nn.Module, rule: IntensityRule) -> list[dict[str, Any]]:
        return probe(task, features_of(backbone, rule, task.crops, task.full_scale))

    methods: dict[str, Callable[[], list[dict[str, Any]]]]
    methods = {f"pixels-pca{width}": partial(of_pixels, width) for width in PCA_WIDTHS}
    methods |= {name: partial(of_encoder, backbone, rule) for name, (backbone, rule) in encoders.items()}
    return methods | {"supervised-cnn": partial(supervised, task, encoders["marker"][1])}


def compare(tasks: list[Task], encoders: Encoders) -> pl.DataFrame:
    """Score all methods; columns data, method, probe, labels, seed, score."""
    rows: list[dict[str, Any]] = []
    for task in tasks:
        for name, run in methods_of(task, encoders).items():
            started = time.perf_counter()
            scores = run()
            rows.extend({"data": task.name, "method": name, **score} for score in scores)
            _show(task, name, scores, time.perf_counter() - started)
    return pl.DataFrame(rows)


def _show(task: Task, method: str, scores: list[dict[str, Any]], seconds: float) -> None:
    frame = pl.DataFrame(scores)
    for name in frame["probe"].unique(maintain_order=True):
        own = (
            frame.filter(pl.col("probe") == name)
            .group_by("labels")
            .agg(pl.col("score").mean(), pl.col("score").std().alias("sd"))
        )
        cells = (f"{labels:4d}: {score:.3f} ({sd:.3f})" for labels, score, sd in own.sort("labels").iter_rows())
        print(f"{task.name:8} {method:15} {name:7}", *cells, f" {seconds:.0f} s", flush=True)


def judge(frame: pl.DataFrame) -> pl.DataFrame:
    """`marker` and the shipped encoder against what they are to beat, on means over the seeds.

    Returns:
        Columns encoder, probe, data, labels, against, difference, bar, holds.
    """
    key = ["data", "probe", "labels"]
    means = frame.group_by("method", *key).agg(pl.col("score").mean())
    ours = means.filter(pl.col("method").is_in(["marker", "shipped"])).rename({"score": "own", "method": "encoder"})
    bars = pl.DataFrame(
        {"method": ["random-init", "pixels-pca32", "pixels-pca128", "paper"], "bar": [MARGIN, 0.0, 0.0, 0.0]}
    )
    return (
        means.join(bars, on="method")
        .join(ours, on=key)
        .with_columns(difference=pl.col("own") - pl.col("score"))
        .with_columns(holds=pl.col("difference") >= pl.col("bar"))
        .select("encoder", "probe", "data", "labels", "difference", "bar", "holds", against="method")
        .sort("encoder", "probe", "data", "labels", "against")
    )


def main(argv: list[str] | None = None) -> None:
    """Score all methods, print the bars and write rows and bars as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--marker", type=Path, default=None, help="encoder trained with the marker views")
    parser.add_argument("--paper", type=Path, default=None, help="encoder trained with the paper views")
    parser.add_argument("--jurkat", type=Path, default=Path("../shared/data/jurkat_ifc/cells.npz"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/representation.json"))
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    started = time.monotonic()
    folders = {"marker": arguments.marker or DEFAULT_FOLDER, "paper": arguments.paper}
    if arguments.marker is not None:
        folders["shipped"] = DEFAULT_FOLDER
    loaded = {name: load_folder(folder) for name, folder in folders.items() if folder is not None}
    _, spec = loaded["marker"]
    torch.manual_seed(0)
    random = build_backbone(spec.architecture, channels=spec.channels, input_size_px=spec.input_size_px)
    encoders: Encoders = {"random-init": (random, spec.intensity)}
    encoders |= {name: (backbone, own.intensity) for name, (backbone, own) in loaded.items()}
    provenance = {name: own.provenance | {"fingerprint": own.fingerprint} for name, (_, own) in loaded.items()}
    tasks = [phantom_task()] + ([jurkat_task(arguments.jurkat)] if arguments.jurkat.is_file() else [])
    frame = compare(tasks, encoders)
    bars = judge(frame)
    with pl.Config(tbl_rows=-1, tbl_hide_dataframe_shape=True, tbl_hide_column_data_types=True, float_precision=3):
        print(bars)
    report = {
        "rows": frame.to_dicts(),
        "bars": bars.to_dicts(),
        "encoders": provenance,
        "seconds": time.monotonic() - started,
        "versions": library_versions(),
        "hardware": hardware(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
