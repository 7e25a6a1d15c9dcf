"""The reference's draws: quotas, the fallback with repeats, the split of a cluster."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from ctc_ray.errors import ConfigError
from ctc_ray.hil import faithful
from ctc_ray.hil.loop import Trial, run_trial
from ctc_ray.hil.pools import Problem
from ctc_ray.hil.release import read_release
from ctc_ray.hil.scores import Score
from ctc_ray.hil.settings import PAPER_SEEDS, LoopSettings
from ctc_ray.hil.state import LoopState
from ctc_ray.storage import Store

_reference = faithful.cluster_f1_keeping("short-cluster", "rounding", "unscored-clusters", "reseeding")
_KEYS = ["scenario", "strategy", "main_cluster", "run", "seed", "loop", "split", "cluster"]


def _state(clusters: list[int], f1: dict[int, float], count: int) -> LoopState:
    num = len(clusters)
    state = LoopState(
        np.zeros((num + 1, 2)), np.array([*clusters, 0]), np.array([num]), np.array([1], np.int8), np.arange(num), 29
    )
    return state.with_evidence(None, {c: Score(v, v, v, 9) for c, v in f1.items()}, count)  # type: ignore[arg-type]


def test_sample_repeats_the_module_functions() -> None:
    random.seed(164)
    expected = random.sample(range(50), 7)
    assert faithful.sample(164, range(50), 7).tolist() == expected


def test_choose_cluster_f1_ample_clusters_has_the_rounded_quotas() -> None:
    state = _state([0] * 60 + [1] * 60 + [2] * 60, {0: 0.5, 1: 0.75, 2: 0.85}, 10)
    chosen = _reference(state, np.random.default_rng(0))
    counts = np.bincount(state.clusters[chosen], minlength=3)
    assert counts.tolist() == [5, 3, 2]  # 5.56 -> 6, 2.78 -> 3, 1.67 -> 2: one too many, taken from the lowest
    assert len(set(chosen.tolist())) == 10


def test_choose_cluster_f1_short_cluster_draws_from_the_next_one_and_can_repeat() -> None:
    clusters = [0] * 3 + [1] * 20 + [2] * 40
    state = _state(clusters, {0: 0.0, 1: 0.2, 2: 0.9}, 30)
    chosen = _reference(state, np.random.default_rng(0))
    counts = np.bincount(state.clusters[chosen], minlength=3)
    assert len(chosen) == 30
    assert counts[0] == 3  # quota 15; the other 12 come from cluster 1, the one listed after the lowest
    assert counts[1] == 13 + 12
    assert len(set(chosen.tolist())) < 30


def test_choose_cluster_f1_lowest_cluster_last_stops_as_the_reference_does() -> None:
    state = _state([0] * 40 + [1] * 2, {0: 0.9, 1: 0.0}, 20)
    with pytest.raises(ConfigError, match="IndexError"):
        _reference(state, np.random.default_rng(0))


def test_choose_cluster_f1_all_right_stops_as_the_reference_does() -> None:
    with pytest.raises(ConfigError, match="divides by zero"):
        _reference(_state([0] * 9, {0: 1.0}, 3), np.random.default_rng(0))


def test_choose_cluster_f1_more_rounded_up_than_there_are_stops_as_the_reference_does() -> None:
    f1 = dict.fromkeys(range(7), 0.9)
    state = _state([c for c in range(7) for _ in range(3)], f1, 4)  # 0.57 each, rounded up 7: the first is left 1 - 3
    with pytest.raises(ConfigError, match="leave -2 for the lowest"):
        _reference(state, np.random.default_rng(0))


def test_split_cluster_gives_four_fifths_and_the_rest() -> None:
    members = np.arange(100, 153)
    large, rest = faithful.split_cluster(7, members)
    assert len(large) == 42
    assert sorted([*large.tolist(), *rest.tolist()]) == members.tolist()


def _expected(shared_data: Path) -> pl.DataFrame:
    frame = pl.read_csv(shared_data / "hil_release" / "expected_results.csv")
    return frame.with_columns(
        pl.col("main_cluster").cast(pl.Int64), pl.col("strategy").replace({"cluster": "cluster-f1"})
    )


def _reproduce(problem: Problem, wanted: pl.DataFrame) -> None:
    arms = wanted.select("scenario", "strategy", "main_cluster", "run", "seed").unique(maintain_order=True)
    rows = [row for arm in arms.iter_rows() for row in run_trial(problem, Trial(*arm), LoopSettings(mode="faithful"))]
    types = {"main_cluster": pl.Int64, "cluster": pl.Int64}
    found = pl.DataFrame(rows, infer_schema_length=None, schema_overrides=types)
    both = wanted.join(found, on=_KEYS, how="full", nulls_equal=True, suffix="_found", coalesce=True)
    assert both.height == wanted.height == found.height
    error = (both["f1"] - both["f1_found"]).abs()
    assert error.null_count() == 0
    assert error.max() <= 1e-3  # type: ignore[operator]
    assert (error <= 1e-6).mean() >= 0.99  # type: ignore[operator]
    for name in ("recall", "precision"):
        given = both.filter(pl.col(name).is_not_null())
        assert (given[name] - given[f"{name}_found"]).abs().max() <= 1e-4  # type: ignore[operator]


def test_faithful_limited_global_one_seed_reproduces_the_reference(shared_data: Path) -> None:
    problem = read_release(Store(shared_data / "hil_release")).problem()
    wanted = _expected(shared_data).filter((pl.col("scenario") == "limited-global") & (pl.col("seed") == 29))
    assert wanted.height == 150
    _reproduce(problem, wanted)


def test_faithful_limited_local_one_seed_reproduces_the_reference(shared_data: Path) -> None:
    problem = read_release(Store(shared_data / "hil_release")).problem()
    wanted = _expected(shared_data).filter(
        (pl.col("scenario") == "limited-local") & (pl.col("seed") == 7) & pl.col("main_cluster").is_in([0, 5])
    )
    assert wanted.height == 160
    _reproduce(problem, wanted)


@pytest.mark.slow
def test_faithful_all_seeds_and_scenarios_reproduce_the_reference(shared_data: Path) -> None:
    problem = read_release(Store(shared_data / "hil_release")).problem()
    wanted = _expected(shared_data)
    assert tuple(wanted["seed"].unique(maintain_order=True)) == PAPER_SEEDS
    _reproduce(problem, wanted)
