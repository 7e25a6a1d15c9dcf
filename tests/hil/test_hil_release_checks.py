"""The figures that tell whether a release hangs together."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from ctc_ray.hil.release import read_release
from ctc_ray.hil.release_checks import check_release
from ctc_ray.storage import Store


def test_check_release_shared_release_finds_its_own_clusters(shared_data: Path) -> None:
    release = read_release(Store(shared_data / "hil_release"))
    checks = check_release(release)
    assert checks.adjusted_rand > 0.99
    assert checks.num_clusters_found == checks.num_clusters_stored == 6
    assert checks.full_train_f1 == pytest.approx(0.9255, abs=1e-3)
    assert checks.weakest_f1 is not None
    assert checks.weakest_f1 < checks.full_train_f1


def test_check_release_shuffled_umap_has_low_agreement(shared_data: Path) -> None:
    release = read_release(Store(shared_data / "hil_release"))
    name = "labeled_test_and_unlabeled_train"
    shuffled = np.random.default_rng(0).permutation(release.umap[name])
    assert check_release(dataclasses.replace(release, umap={**release.umap, name: shuffled})).adjusted_rand < 0.1
