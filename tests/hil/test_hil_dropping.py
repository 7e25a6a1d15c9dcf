"""Arms that are clearly behind get no more seeds; the others, and the baselines, do."""

from __future__ import annotations

import numpy as np
import polars as pl

from ctc_ray.hil.dropping import hopeless_arms, is_hopeless
from ctc_ray.hil.loop import Trial
from ctc_ray.schema import RESULTS_SCHEMA


def _results(heights: dict[str, float], num_seeds: int, spread: float = 0.01) -> pl.DataFrame:
    """Curves of two loops around given heights; the noise of a seed differs from arm to arm."""
    rng = np.random.default_rng(0)
    rows = []
    for strategy, height in heights.items():
        for run in range(1, num_seeds + 1):
            f1 = height + spread * rng.normal()
            for loop in range(3):
                row = dict.fromkeys(RESULTS_SCHEMA.names)
                row |= {"scenario": "limited-global", "strategy": strategy, "run": run, "seed": run, "loop": loop}
                rows.append(row | {"split": "test", "f1": f1, "num_train": 100 * (loop + 1)})
    schema = pl.DataFrame(pl.from_arrow(RESULTS_SCHEMA.empty_table())).schema
    return pl.DataFrame(rows, schema=schema)


def test_hopeless_arms_are_those_clearly_behind_the_best_but_never_a_baseline() -> None:
    heights = {"margin": 0.9, "entropy": 0.899, "k-center": 0.8, "random": 0.7, "cluster-f1": 0.75}
    assert hopeless_arms(_results(heights, 20)) == {("limited-global", "k-center", None, None)}


def test_hopeless_arms_needs_more_than_a_few_seeds() -> None:
    heights = {"margin": 0.9, "k-center": 0.8, "random": 0.7}
    assert hopeless_arms(_results(heights, 4)) == set()
    assert hopeless_arms(_results({"margin": 0.9}, 20)) == set()


def test_hopeless_arms_are_judged_for_each_share_of_wrong_answers() -> None:
    clean = _results({"margin": 0.9, "k-center": 0.8}, 20).with_columns(flip_rate=pl.lit(0.0))
    noisy = _results({"margin": 0.7, "k-center": 0.7}, 20).with_columns(flip_rate=pl.lit(0.1))
    found = hopeless_arms(pl.concat([clean, noisy]))
    assert found == {("limited-global", "k-center", None, 0.0)}
    assert is_hopeless(Trial("limited-global", "k-center", None, 21, 20, 0.0), found)
    assert not is_hopeless(Trial("limited-global", "k-center", None, 21, 20, 0.1), found)


def test_is_hopeless_of_a_sweep_over_one_share_goes_by_the_arm() -> None:
    found = {("limited-local", "k-center", 2, None)}
    assert is_hopeless(Trial("limited-local", "k-center", 2, 9, 8, 0.05), found)
    assert not is_hopeless(Trial("limited-local", "k-center", 3, 9, 8, 0.05), found)
