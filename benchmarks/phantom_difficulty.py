"""Is the phantom as hard as the real thing? Classifier F1, latent clusters, weakest cluster, and PPV of the event lists.

    python benchmarks/phantom_difficulty.py [--encoder default|features|FOLDER] [--unlabelled N] [--json PATH] [--map PATH]

The sets have the sizes of the paper (1,509 CTCs and 1,129 others to train, 1,214 and 1,559 to test, of different patients).
PCA, SVM, UMAP and HDBSCAN have the parameters of the reference implementation, except HDBSCAN's epsilon. Fewer points than the
paper's 51,085 lie further apart: epsilon, a length in the plane, grows by the square root of that ratio and so keeps its meaning
in neighbours, while `min_samples` stays at 90, because the noise of a density estimate depends on the count alone.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ctc_ray.phantom import PROFILES, CellKind, draw_crops, draw_field

Array = npt.NDArray[Any]
TRAIN = (1509, 1129)
TEST = (1214, 1559)
PAPER_POINTS = 51_085
TARGETS = {"f1": (0.90, 0.95), "clusters": (4, 8), "weakest_f1": (0.0, 0.6), "ppv": (0.09, 0.37)}


def draw_labelled(counts: tuple[int, int], names: list[str], seed: int) -> tuple[Array, Array, Array]:
    """Crops, label (1 CTC) and kind of so many CTCs and others, in equal parts from the named patients."""
    weights = PROFILES["paper"].kind_weights
    ctcs = {kind: weight for kind, weight in weights.items() if kind.is_ctc}
    others = {kind: weight for kind, weight in weights.items() if not kind.is_ctc}
    crops, kinds = [], []
    for total, mix in zip(counts, (ctcs, others), strict=True):
        for number, name in enumerate(names):
            share = total // len(names) + (number < total % len(names))
            drawn, kind = draw_crops(share, seed=seed, patient=name, kinds=mix)
            crops.append(drawn)
            kinds.append(kind)
    kind = np.concatenate(kinds)
    return np.concatenate(crops), np.array([CellKind(name).is_ctc for name in kind], dtype=int), kind


def features(crops: Array) -> Array:
    """Radial profiles, percentiles and overlaps of the channels: a stand-in where no encoder is trained yet."""
    light = np.arcsinh(crops.astype(np.float32) / 4.0)
    light -= np.median(light, axis=(2, 3), keepdims=True)
    down, right = np.mgrid[:48, :48] - 23.5
    radius = np.hypot(down, right)
    rings = np.stack([(radius >= inner) & (radius < inner + 2.5) for inner in np.arange(0.0, 24.0, 2.5)]).astype(
        np.float32
    )
    rings /= rings.sum(axis=(1, 2), keepdims=True)
    profile = np.einsum("nchw,rhw->ncr", light, rings).reshape(len(crops), -1)
    spread = np.sqrt(np.maximum(np.einsum("nchw,rhw->ncr", light**2, rings).reshape(len(crops), -1) - profile**2, 0.0))
    levels = np.percentile(light, (50, 75, 90, 97, 99.5), axis=(2, 3)).transpose(1, 2, 0).reshape(len(crops), -1)
    centre = light[:, :, 8:40, 8:40].reshape(len(crops), 3, -1)
    overlap = np.stack([(centre[:, a] * centre[:, b]).mean(1) for a, b in ((0, 1), (0, 2), (1, 2))], axis=1)
    return np.concatenate([profile, spread, levels, np.sqrt(np.maximum(overlap, 0.0))], axis=1)


def encoder_named(name: str) -> Callable[[Array], Array]:
    """The stand-in, the shipped default encoder, or one from a folder."""
    if name == "features":
        return features
    from ctc_ray.embed import Embedder

    return Embedder.load(None if name == "default" else name)


def f1_of(truth: Array, called: Array) -> float | None:
    """F1 of the CTC class; None where there is neither a CTC nor a call."""
    both = int((truth * called).sum())
    total = int(truth.sum() + called.sum())
    return 2.0 * both / total if total else None


def measure_clusters(
    encode: Callable[[Array], Array], unlabelled: int, seed: int
) -> tuple[dict[str, Any], dict[str, Array]]:
    """F1 overall and by cluster of the latent map; figures, and the map's points for a picture."""
    import hdbscan
    import umap
    from sklearn.decomposition import PCA
    from sklearn.svm import SVC

    train, train_label, _ = draw_labelled(TRAIN, [f"train-{n}" for n in range(10)], seed)
    test, label, kind = draw_labelled(TEST, [f"test-{n}" for n in range(10)], seed)
    pool, pool_kind = draw_crops(unlabelled, seed=seed)
    raw = [np.asarray(encode(part), dtype=np.float64) for part in (train, test, pool)]
    if encode is features:  # columns of different units; an encoder's have one
        scale = raw[0].std(axis=0) + 1e-6
        raw = [(part - raw[0].mean(axis=0)) / scale for part in raw]
    pca = PCA(32, random_state=0).fit(raw[0])
    train_pca, test_pca, pool_pca = (pca.transform(part) for part in raw)
    called = SVC(class_weight="balanced", cache_size=1000).fit(train_pca, train_label).predict(test_pca)
    points = np.concatenate([test_pca, pool_pca])
    reducer = umap.UMAP(n_neighbors=200, min_dist=0.8, random_state=42).fit(train_pca)
    plane = reducer.transform(points)
    epsilon = 0.25 * max(PAPER_POINTS / len(points), 1.0) ** 0.5
    cluster = hdbscan.HDBSCAN(
        min_cluster_size=15, min_samples=90, cluster_selection_method="leaf", cluster_selection_epsilon=epsilon
    ).fit_predict(plane)
    rows = []
    for number in sorted(set(cluster.tolist())):
        inside = cluster[: len(label)] == number
        names, counts = np.unique(np.concatenate([kind, pool_kind])[cluster == number], return_counts=True)
        rows.append(
            {
                "cluster": number,
                "cells": int((cluster == number).sum()),
                "labelled": int(inside.sum()),
                "ctcs": int(label[inside].sum()),
                "f1": f1_of(label[inside], called[inside]),
                "mostly": ", ".join(f"{names[n]} {counts[n]}" for n in np.argsort(-counts)[:3]),
            }
        )
    by_kind = {name: float((called[kind == name] == label[kind == name]).mean()) for name in np.unique(kind)}
    weakest = [row["f1"] for row in rows if row["cluster"] >= 0 and row["f1"] is not None and row["labelled"] >= 10]
    figures = {
        "f1": f1_of(label, called),
        "clusters": sum(row["cluster"] >= 0 for row in rows),
        "weakest_f1": min(weakest) if weakest else None,
        "accuracy_by_kind": by_kind,
        "by_cluster": rows,
        "hdbscan_epsilon": round(epsilon, 3),
    }
    where = {"plane": plane, "cluster": cluster, "kind": np.concatenate([kind, pool_kind])}
    return figures, {**where, "wrong": np.concatenate([called != label, np.zeros(len(pool), bool)])}


def measure_events(patients: int, fields: int, seed: int) -> list[dict[str, Any]]:
    """Events, assigned events and PPV of each patient of the `paper` profile, from its first fields."""
    rows = []
    for number in range(1, patients + 1):
        events = ctcs = 0
        for field in range(1, fields + 1):
            drawn = draw_field(PROFILES["paper"], patient=f"P{number:02d}", field=field, seed=seed)
            events += len(drawn.events)
            ctcs += sum(event.assigned for event in drawn.events)
        rows.append({"patient": f"P{number:02d}", "events": events, "assigned": ctcs, "ppv": ctcs / max(events, 1)})
    return rows


def draw_map(path: Path, points: dict[str, Array]) -> None:
    """Scatter of the plane: kinds beside clusters, wrong calls as crosses."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(18, 8))
    for axis, key in zip(axes, ("kind", "cluster"), strict=True):
        for number, name in enumerate(np.unique(points[key])):
            chosen = points["plane"][points[key] == name]
            colour = "lightgrey" if str(name) == "-1" else plt.get_cmap("tab10")(number % 10)
            axis.scatter(*chosen.T, s=3, color=colour, label=str(name))
        axis.scatter(*points["plane"][points["wrong"]].T, s=12, marker="x", color="black", linewidths=0.6)
        axis.legend(markerscale=4)
    figure.savefig(path, dpi=70)
    plt.close(figure)


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="default", help="default (shipped), features (stand-in), or a folder")
    parser.add_argument("--unlabelled", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--patients", type=int, default=8, help="patients for the PPV")
    parser.add_argument("--fields", type=int, default=10, help="fields of each for the PPV")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--map", type=Path, help="write a picture of the latent map (PNG)")
    arguments = parser.parse_args()
    started = time.monotonic()
    figures, points = measure_clusters(encoder_named(arguments.encoder), arguments.unlabelled, arguments.seed)
    figures["encoder"] = arguments.encoder
    if arguments.patients:
        figures["events"] = measure_events(arguments.patients, arguments.fields, arguments.seed)
        pooled = [sum(row[key] for row in figures["events"]) for key in ("assigned", "events")]
        figures["ppv"] = pooled[0] / max(pooled[1], 1)
    figures["seconds"] = round(time.monotonic() - started, 1)
    for name, (low, high) in TARGETS.items():
        value = figures.get(name)
        verdict = "not measured" if value is None else ("met" if low <= value <= high else "MISSED")
        print(f"{name:12} {value if value is None else round(value, 3)!s:8} target {low} to {high}  {verdict}")
    for row in figures["by_cluster"]:
        f1 = "-" if row["f1"] is None else f"{row['f1']:.3f}"
        counts = f"{row['cells']:6} cells {row['labelled']:5} labelled {row['ctcs']:5} CTCs"
        print(f"cluster {row['cluster']:3} {counts}  F1 {f1:6} {row['mostly']}")
    for name, share in sorted(figures["accuracy_by_kind"].items()):
        print(f"{name:24} right {share:.3f}")
    for row in figures.get("events", []):
        print(f"{row['patient']} events {row['events']:5} assigned {row['assigned']:4} PPV {row['ppv']:.3f}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    if arguments.map:
        draw_map(arguments.map, points)


if __name__ == "__main__":
    main()
