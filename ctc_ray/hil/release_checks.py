"""Does a release hang together: are its clusters those of its own UMAP, and does its training set score as published?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.metrics import adjusted_rand_score

from ctc_ray.hil.pools import BACKGROUND
from ctc_ray.hil.release import Release
from ctc_ray.hil.scores import score, score_clusters
from ctc_ray.hil.svm import Classifier
from ctc_ray.latent.cluster import Clusters


@dataclass(frozen=True)
class ReleaseChecks:
    """Figures to hold beside the paper's.

    Attributes:
        adjusted_rand: agreement of the stored clusters with HDBSCAN on the joint UMAP; 1 is perfect, ids may differ.
        num_clusters_stored: clusters in the tables, without background.
        num_clusters_found: clusters that HDBSCAN finds now.
        full_train_f1: test F1 of the classifier trained on all labelled training cells (paper: 0.923).
        weakest_cluster: cluster with the lowest test F1, background left out (paper: 2); None where no cluster has one.
        weakest_f1: its F1 (paper: 0.524).
    """

    adjusted_rand: float
    num_clusters_stored: int
    num_clusters_found: int
    full_train_f1: float | None
    weakest_cluster: int | None
    weakest_f1: float | None


def check_release(release: Release) -> ReleaseChecks:
    """Cluster the joint UMAP again, and train on all labelled training cells.

    Source: reference implementation: HDBSCAN 15 / 90 / leaf / 0.25 on test, then unlabelled cells; SVC as in the loop.
    """
    name = "labeled_test_and_unlabeled_train"
    stored = release.tables[name]["cluster"].to_numpy()
    umap = np.ascontiguousarray(release.umap[name], np.float32)
    found = Clusters.fit(umap, min_cluster_size=15, min_samples=90, selection="leaf", epsilon=0.25)
    problem = release.problem()
    predictions = Classifier.fit(problem.train.features, problem.train.labels).predict(problem.test.features)
    total = score(problem.test.labels, predictions, "null", is_cluster=False)
    clusters = score_clusters(problem.test.labels, predictions, problem.test.clusters, "null")
    defined = {c: s.f1 for c, s in clusters.items() if s.f1 is not None and c != BACKGROUND}
    weakest = min(defined, key=lambda c: defined[c]) if defined else None
    return ReleaseChecks(
        adjusted_rand=float(adjusted_rand_score(stored, found.labels)),
        num_clusters_stored=len(set(stored.tolist()) - {BACKGROUND}),
        num_clusters_found=found.num_clusters,
        full_train_f1=total.f1,
        weakest_cluster=weakest,
        weakest_f1=None if weakest is None else defined[weakest],
    )
