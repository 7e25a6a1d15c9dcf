"""The data sets of the study of strategies: labelled cells with features and clusters, to draw from and to be judged on.

Features are PCA scores (32) of the shipped encoder's embeddings, PCA and UMAP fitted on the cells to draw from, HDBSCAN on all, with the
parameters of the paper. Sets that are slow to make are kept as npz files and read again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.phantom_difficulty import TEST, TRAIN, draw_labelled
from benchmarks.representation import jurkat_task
from ctc_ray.config import MapConfig
from ctc_ray.hil.pools import CellSet, Problem, cell_set
from ctc_ray.hil.release import fill_background, read_release
from ctc_ray.latent.cluster import Clusters
from ctc_ray.latent.reduce import PrincipalComponents, UmapPlane
from ctc_ray.storage import Store

MITOTIC = ("Prophase", "Metaphase", "Anaphase", "Telophase")
JURKAT_FOLDS = 5
"""Times that the labelled Jurkat cells are halved anew; each half is drawn from once."""
Array = npt.NDArray[Any]


def phantom_problem(seed: int, folder: Path) -> Problem:
    """A phantom cohort of the paper's size: 2,638 cells of ten patients to draw from, 2,773 of ten others to be judged on."""

    def make() -> dict[str, Array]:
        train, train_label, _ = draw_labelled(TRAIN, [f"study-{seed}-train-{n}" for n in range(10)], seed)
        test, test_label, _ = draw_labelled(TEST, [f"study-{seed}-test-{n}" for n in range(10)], seed)
        return on_a_map(_embed(train, None), train_label, _embed(test, None), test_label)

    return _problem(_kept(folder / f"phantom-{seed}.npz", make))


def jurkat_problem(number: int, file: Path, folder: Path) -> Problem:
    """Half of the labelled Jurkat cells (Experiment_1) to draw from, the other half to be judged on; dividing cells are positive.

    Args:
        number: 0 and 1 are the two halves of the first split, 2 and 3 of the second, ...
        file: `cells.npz`.
        folder: keeps the embeddings.
    """
    task = jurkat_task(file)
    with np.load(file, allow_pickle=False) as data:
        mine = data["experiment"] == "Experiment_1"
    label = np.isin(task.labels[mine], MITOTIC).astype(np.int8)
    vectors = _kept(folder / "jurkat.npz", lambda: {"vectors": _embed(task.crops[mine], task.full_scale)})["vectors"]
    order = np.random.default_rng([number // 2, 0x6A75]).permutation(len(label))
    halves = [np.concatenate([order[label[order] == value][part::2] for value in (0, 1)]) for part in (0, 1)]
    train, test = halves[number % 2], halves[1 - number % 2]

    def make() -> dict[str, Array]:
        return on_a_map(vectors[train], label[train], vectors[test], label[test])

    return _problem(_kept(folder / f"jurkat-{number}.npz", make))


def release_problem(folder: Path) -> Problem:
    """The processed release."""
    return read_release(Store(str(folder))).problem()


def on_a_map(train_ND: Array, train_label: Array, test_ND: Array, test_label: Array) -> dict[str, Array]:
    """PCA scores, labels and clusters of both sets, and the clusters without background of the first."""
    config = MapConfig()
    pca = PrincipalComponents.fit(train_ND, config.pca_dim)
    train, test = pca.transform(train_ND), pca.transform(test_ND)
    plane = UmapPlane.fit(
        train, num_neighbors=config.umap_neighbors, min_dist=config.umap_min_dist, seed=config.umap_seed
    )
    placed = plane.place(test)
    clusters = Clusters.fit(
        np.concatenate([plane.points, placed]),
        min_cluster_size=config.hdbscan_min_cluster_size,
        min_samples=config.hdbscan_min_samples,
        selection=config.hdbscan_selection,
        epsilon=config.hdbscan_epsilon,
    )
    of_train, of_test = clusters.labels[: len(train)].astype(np.int64), clusters.labels[len(train) :].astype(np.int64)
    filled = fill_background(plane.points, of_train, plane.points, of_train)
    return {
        **{"train": train, "train_label": train_label, "train_cluster": of_train, "train_filled": filled},
        **{"test": test, "test_label": test_label, "test_cluster": of_test},
    }


def _embed(crops: Array, full_scale: float | None) -> Array:
    from ctc_ray.embed import Embedder

    return Embedder.load(precision="fp32")(crops, full_scale=full_scale)


def _kept(path: Path, make: Callable[[], dict[str, Array]]) -> dict[str, Array]:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, **make())
        partial.rename(path)
    with np.load(path, allow_pickle=False) as stored:
        return dict(stored)


def _problem(found: dict[str, Array]) -> Problem:
    def cells(name: str) -> CellSet:
        ids = [f"{name}-{row:05d}" for row in range(len(found[name]))]
        return cell_set(name, ids, found[name], found[f"{name}_label"], found[f"{name}_cluster"])

    return Problem(cells("train"), found["train_filled"].astype(np.int64), cells("test"))
