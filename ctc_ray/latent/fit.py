"""Choose the cells that a latent map is fitted on, and fit it. Runs without Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from ctc_ray.cohort import Cohort
from ctc_ray.config import MapConfig
from ctc_ray.labels.labeller import unit_hash
from ctc_ray.latent.cluster import Clusters
from ctc_ray.latent.embeddings import read_selected
from ctc_ray.latent.model import LatentMap
from ctc_ray.latent.reduce import PrincipalComponents, UmapPlane

MIN_FIT_CELLS = 100
"""With fewer labelled (or unlabelled) training cells, all training cells are taken."""


@dataclass(frozen=True)
class FitSets:
    """Which cells a map is fitted on.

    Attributes:
        plane: ids for PCA and UMAP, sorted.
        clusters: ids for HDBSCAN, sorted.
        notes: how the sets differ from the paper's, for the map's summary.
    """

    plane: tuple[str, ...]
    clusters: tuple[str, ...]
    notes: tuple[str, ...]


def choose_fit_sets(train: Sequence[str], test: Sequence[str], labelled: frozenset[str], config: MapConfig) -> FitSets:
    """Choose the fit sets.

    Args:
        train: ids of all cells of the training patients.
        test: ids of all cells of the test patients.
        labelled: ids that have a label.
        config: `cluster_with` and `max_fit_cells`.

    Returns:
        PCA and UMAP: labelled training cells. HDBSCAN: unlabelled training cells, and labelled test cells with `test_and_pool`.
        Each at most `max_fit_cells`, drawn by a seeded hash of the id.

    Source: reference, PCA and UMAP on labelled train, HDBSCAN on [labelled test, unlabelled train].
    """
    notes = []
    plane = [name for name in train if name in labelled]
    if len(plane) < MIN_FIT_CELLS:
        notes.append(f"PCA and UMAP: all training cells, since only {len(plane)} have a label")
        plane = list(train)
    pool = [name for name in train if name not in labelled]
    if len(pool) < MIN_FIT_CELLS:
        notes.append(f"HDBSCAN: all training cells, since only {len(pool)} have no label")
        pool = list(train)
    if config.cluster_with == "test_and_pool":
        pool += [name for name in test if name in labelled]
    for what, names in (("PCA and UMAP", plane), ("HDBSCAN", pool)):
        if len(names) > config.max_fit_cells:
            notes.append(f"{what}: a sample of {config.max_fit_cells} of {len(names)} cells")
    return FitSets(_sample(plane, config), _sample(pool, config), tuple(notes))


def _sample(names: Sequence[str], config: MapConfig) -> tuple[str, ...]:
    unique = sorted(set(names))
    if len(unique) > config.max_fit_cells:
        unique = sorted(
            sorted(unique, key=lambda name: unit_hash(config.umap_seed, "fit", name))[: config.max_fit_cells]
        )
    return tuple(unique)


def fit_map(cohort: Cohort, config: MapConfig, roles: Mapping[str, str], labels: pl.DataFrame) -> LatentMap:
    """Fit PCA, UMAP and HDBSCAN.

    Args:
        cohort: embeddings of the patients in `roles` are complete.
        config: section `map`.
        roles: patient -> `train` or `test`.
        labels: consensus labels, columns cell_id and label at least.

    Returns:
        The map; its summary holds what was asked, what was used, and notes.

    Raises:
        SchemaError: too few cells, or embeddings that are not finite.
        ResourceError: cuML is asked for and is not there.
    """
    train = _ids(cohort, config.encoder, [name for name, role in roles.items() if role == "train"])
    test = _ids(cohort, config.encoder, [name for name, role in roles.items() if role == "test"])
    sets = choose_fit_sets(train, test, frozenset(labels["cell_id"]), config)
    ids, vectors = read_selected(cohort, config.encoder, roles.keys(), {*sets.plane, *sets.clusters})
    position = {name: index for index, name in enumerate(ids)}
    plane_rows = [position[name] for name in sets.plane]
    pca = PrincipalComponents.fit(vectors[plane_rows], config.pca_dim)
    scores = pca.transform(vectors)
    plane = UmapPlane.fit(
        scores[plane_rows],
        num_neighbors=config.umap_neighbors,
        min_dist=config.umap_min_dist,
        seed=config.umap_seed,
        placing_epochs=config.placing_epochs,
        backend=config.backend,
    )
    places = np.full((len(ids), 2), np.nan, np.float32)
    places[plane_rows] = plane.points
    others = np.flatnonzero(np.isnan(places[:, 0]))
    places[others] = plane.place(scores[others], seed=config.umap_seed)
    clusters = Clusters.fit(
        places[[position[name] for name in sets.clusters]],
        min_cluster_size=config.hdbscan_min_cluster_size,
        min_samples=config.hdbscan_min_samples,
        selection=config.hdbscan_selection,
        epsilon=config.hdbscan_epsilon,
    )
    return LatentMap(
        pca=pca,
        plane=plane,
        clusters=clusters,
        plane_ids=np.array(sets.plane, np.str_),
        cluster_ids=np.array(sets.clusters, np.str_),
        seed=config.umap_seed,
        summary=_summary(config, pca, plane, clusters, sets),
    )


def _ids(cohort: Cohort, encoder: str, patients: Sequence[str]) -> list[str]:
    """Ids of the embedded cells of some patients; ids alone are read."""
    names: list[str] = []
    for patient in sorted(patients):
        names += cohort.read_columns(cohort.embeddings(encoder, patient), ["cell_id"])["cell_id"].to_pylist()
    return names


def _summary(
    config: MapConfig, pca: PrincipalComponents, plane: UmapPlane, clusters: Clusters, sets: FitSets
) -> dict[str, Any]:
    """What was used; a parameter that had to shrink is noted."""
    asked = {
        "pca_dim": (config.pca_dim, len(pca.components)),
        "umap_neighbors": (config.umap_neighbors, plane.num_neighbors),
        "hdbscan_min_cluster_size": (config.hdbscan_min_cluster_size, clusters.min_cluster_size),
        "hdbscan_min_samples": (config.hdbscan_min_samples, clusters.min_samples),
    }
    shrunk = [
        f"{name}: {used} in place of {wished}, for so few cells"
        for name, (wished, used) in asked.items()
        if used != wished
    ]
    if clusters.num_clusters == 0:
        shrunk.append("HDBSCAN found no cluster: every cell is background (-1)")
    return {
        "used": {name: used for name, (_, used) in asked.items()}
        | {"backend": plane.backend, "placing_epochs": plane.placing_epochs},
        "notes": [*sets.notes, *shrunk],
        "num_clusters": clusters.num_clusters,
        "cluster_sizes": [int((clusters.labels == number).sum()) for number in range(-1, clusters.num_clusters)],
        "num_plane_cells": len(sets.plane),
        "num_clustered_cells": len(sets.clusters),
        "explained_variance": round(float(pca.explained.sum()), 6),
    }
