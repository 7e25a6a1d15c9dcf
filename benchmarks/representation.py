"""How good are the features? SVM scores of encoders against raw-pixel PCA, from few labels, on phantom and real cells.

Run: python -m benchmarks.representation [--encoder FOLDER]... [--jurkat FILE] [--out FILE]

Rows: an SVM (rbf, C = 1, balanced) on standardised features; phantom cells are scored by F1 of the CTCs on cells of other
patients, the Jurkat cells by balanced accuracy on the cells that gave no labels. Five seeds choose the labels.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from sklearn.decomposition import PCA
from sklearn.metrics import balanced_accuracy_score, f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from ctc_ray.phantom import CellKind, draw_crops
from ctc_ray.pretrain.encoder import DEFAULT_FOLDER, build_backbone, load_folder
from ctc_ray.pretrain.intensity import IntensityRule, scale_for_network, to_fraction

Features = npt.NDArray[np.float32]
SEEDS = (164, 29, 7, 190, 71)
PHANTOM_LABELS = (25, 100, 500)
JURKAT_LABELS = (5, 25, 100)
PCA_WIDTHS = (32, 128)


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


def phantom_cells(per_kind: int, patients: list[str]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.str_]]:
    """Crops of patients that are named, all kinds evenly, and 'ctc' or 'other' for each."""
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


def jurkat_cells(file: Path) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.str_]]:
    """Real imaging-flow-cytometry cells, mirrored at the border from 40 to 48 px; 12-bit counts."""
    with np.load(file, allow_pickle=False) as data:
        images, labels = data["X"], data["y"]
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="reflect")
    return np.ascontiguousarray(padded.transpose(0, 3, 1, 2)), labels


def _draw_labels(labels: npt.NDArray[np.str_], per_class: int, seed: int) -> npt.NDArray[np.intp]:
    """Indices of `per_class` cells of each class, at most half of a class."""
    rng = np.random.default_rng(seed)
    chosen = []
    for name in np.unique(labels):
        rows = np.flatnonzero(labels == name)
        chosen.append(rng.choice(rows, size=min(per_class, len(rows) // 2), replace=False))
    return np.concatenate(chosen)


def _svm() -> Any:
    return make_pipeline(StandardScaler(), SVC(C=1.0, gamma="scale", class_weight="balanced"))


def score_phantom(train: Features, train_y: Any, test: Features, test_y: Any) -> list[dict[str, Any]]:
    """F1 of the CTCs on other patients' cells per label count and seed."""
    rows = []
    for per_class in PHANTOM_LABELS:
        for seed in SEEDS:
            chosen = _draw_labels(train_y, per_class, seed)
            predicted = _svm().fit(train[chosen], train_y[chosen]).predict(test)
            rows.append({"labels": per_class, "seed": seed, "score": f1_score(test_y, predicted, pos_label="ctc")})
    return rows


def score_jurkat(features: Features, labels: Any) -> list[dict[str, Any]]:
    """Balanced accuracy over seven classes per label count and seed."""
    rows = []
    for per_class in JURKAT_LABELS:
        for seed in SEEDS:
            chosen = _draw_labels(labels, per_class, seed)
            rest = np.setdiff1d(np.arange(len(labels)), chosen)
            predicted = _svm().fit(features[chosen], labels[chosen]).predict(features[rest])
            rows.append({"labels": per_class, "seed": seed, "score": balanced_accuracy_score(labels[rest], predicted)})
    return rows


def _pca(width: int, fit_on: npt.NDArray[Any]) -> Callable[[npt.NDArray[Any]], Features]:
    scale = float(np.iinfo(fit_on.dtype).max)
    model = PCA(n_components=width, random_state=0).fit(fit_on.reshape(len(fit_on), -1)[:2000] / scale)
    return lambda crops: model.transform(crops.reshape(len(crops), -1) / scale).astype(np.float32)


def compare(encoders: dict[str, tuple[torch.nn.Module, IntensityRule]], jurkat: Path | None) -> pl.DataFrame:
    """Score all methods; columns method, data, labels, seed, score."""
    train, train_y = phantom_cells(250, [f"bench-train-{i}" for i in range(8)])
    test, test_y = phantom_cells(150, [f"bench-test-{i}" for i in range(8)])
    cells, cell_y = jurkat_cells(jurkat) if jurkat else (None, None)
    rows: list[dict[str, Any]] = []

    def note(method: str, data: str, scores: list[dict[str, Any]]) -> None:
        rows.extend({"method": method, "data": data, **score} for score in scores)
        summary = pl.DataFrame(scores).group_by("labels").agg(pl.col("score").mean()).sort("labels")
        print(f"{method:24} {data:8}", *(f"{labels}: {score:.3f}" for labels, score in summary.iter_rows()), flush=True)

    for width in PCA_WIDTHS:
        reduce = _pca(width, train)
        note(f"pixels-pca{width}", "phantom", score_phantom(reduce(train), train_y, reduce(test), test_y))
        if cells is not None:
            note(f"pixels-pca{width}", "jurkat", score_jurkat(_pca(width, cells)(cells), cell_y))
    for name, (backbone, rule) in encoders.items():
        fitted = (features_of(backbone, rule, part, None) for part in (train, test))
        note(name, "phantom", score_phantom(next(fitted), train_y, next(fitted), test_y))
        if cells is not None:
            note(name, "jurkat", score_jurkat(features_of(backbone, rule, cells, 4095.0), cell_y))
    return pl.DataFrame(rows)


def main(argv: list[str] | None = None) -> None:
    """Score random-init, raw-pixel PCA and the named encoders, and write the rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, action="append", default=[], help="folder of an encoder")
    parser.add_argument("--jurkat", type=Path, default=Path("../shared/data/jurkat_ifc/cells.npz"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    folders = arguments.encoder or [DEFAULT_FOLDER]
    encoders = {folder.name: load_folder(folder) for folder in folders}
    _, first_spec = next(iter(encoders.values()))
    torch.manual_seed(0)
    random = build_backbone(
        first_spec.architecture, channels=first_spec.channels, input_size_px=first_spec.input_size_px
    )
    methods = {"random-init": (random, first_spec.intensity)}
    methods |= {name: (backbone, spec.intensity) for name, (backbone, spec) in encoders.items()}
    frame = compare(methods, arguments.jurkat if arguments.jurkat.is_file() else None)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(frame.to_dicts(), indent=1) + "\n")


if __name__ == "__main__":
    main()
