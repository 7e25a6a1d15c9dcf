"""Small problems for the human-in-the-loop tests."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from ctc_ray.hil.pools import Problem, cell_set


def make_problem(
    num_train: int = 240, num_test: int = 120, width: int = 6, seed: int = 0, background: int = 0
) -> Problem:
    """Gaussian clusters 0 to 3 of growing size, each with CTCs and others that overlap; seeded."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(0, 4, (4, width))
    shift = rng.normal(0, 1.2, width)
    sets, filled = [], None
    for name, num in (("train", num_train), ("test", num_test)):
        clusters = rng.choice(4, num, p=[0.1, 0.2, 0.3, 0.4])
        labels = (rng.random(num) < np.array([0.3, 0.4, 0.5, 0.6])[clusters]).astype(np.int8)
        features = centres[clusters] + labels[:, None] * shift + rng.normal(0, 1, (num, width))
        order = rng.permutation(num)
        shown = clusters.copy()
        shown[order[:background]] = -1
        ids = [f"{name}-{i:05d}" for i in range(num)]
        sets.append(cell_set(name, ids, features, labels, shown))
        filled = clusters if filled is None else filled
    assert filled is not None
    return Problem(sets[0], filled.astype(np.int64), sets[1])


@pytest.fixture
def problem() -> Problem:
    return make_problem()


@pytest.fixture
def make() -> Callable[..., Problem]:
    """Make problems of other sizes."""
    return make_problem
