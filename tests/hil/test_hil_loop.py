"""The loop, its scenarios and their bad input."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import f1_score
from sklearn.svm import SVC

from ctc_ray.errors import ConfigError, LabelError, SchemaError
from ctc_ray.hil.loop import Trial, run_trial
from ctc_ray.hil.pools import Problem, cell_set
from ctc_ray.hil.scenarios import limited_global, limited_local
from ctc_ray.hil.settings import LoopSettings
from ctc_ray.hil.strategies import STRATEGIES
from ctc_ray.schema import TRIAL_SCHEMA

_SMALL = LoopSettings(initial=30, per_loop=20, loops=3, mc_splits=8)
_FAITHFUL = dataclasses.replace(_SMALL, mode="faithful")


def _frame(problem: Problem, strategy: str, settings: LoopSettings = _SMALL, seed: int = 5) -> pl.DataFrame:
    rows = run_trial(problem, Trial("limited-global", strategy, None, 1, seed), settings)
    return pl.DataFrame(rows, infer_schema_length=None)


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_run_trial_gives_the_result_columns_with_growing_labels_for_every_loop(problem: Problem, strategy: str) -> None:
    frame = _frame(problem, strategy)
    assert frame.columns == TRIAL_SCHEMA.names
    test = frame.filter(pl.col("split") == "test")
    assert test.height == 4 * 5  # loops 0 to 3, four clusters and all cells
    totals = test.filter(pl.col("cluster").is_null()).sort("loop")
    assert totals["num_train"].to_list() == [30, 50, 70, 90]
    assert frame["f1"].drop_nulls().is_between(0, 1).all()


def test_run_trial_writes_monte_carlo_rows_for_cluster_f1_alone(problem: Problem) -> None:
    assert "mc" in _frame(problem, "cluster-f1")["split"].unique()
    assert _frame(problem, "random")["split"].unique().to_list() == ["test"]
    assert "mc" in _frame(problem, "random", _FAITHFUL)["split"].unique()


def test_run_trial_same_seed_repeats_and_arms_share_their_start(problem: Problem) -> None:
    first = _frame(problem, "margin")
    assert first.equals(_frame(problem, "margin"))
    other = _frame(problem, "random")
    initial = (pl.col("loop") == 0) & (pl.col("split") == "test")
    columns = ["cluster", "f1", "recall", "precision"]
    assert first.filter(initial).select(columns).equals(other.filter(initial).select(columns))
    assert not _frame(problem, "random", seed=6).equals(other)


def test_run_trial_last_loop_equals_a_plain_svc_on_the_same_labels(make: Callable[..., Problem]) -> None:
    problem = make(num_train=100)
    settings = LoopSettings(initial=40, per_loop=30, loops=2)  # all 100 cells are labelled at the end
    last = _frame(problem, "random", settings).filter((pl.col("loop") == 2) & pl.col("cluster").is_null())
    plain = SVC(class_weight="balanced").fit(problem.train.features, problem.train.labels)
    expected = f1_score(problem.test.labels, plain.predict(problem.test.features))
    assert last["f1"].item() == pytest.approx(expected, abs=0.02)  # the order of rows moves the optimiser a little


def test_run_trial_wrong_answers_lower_the_score(make: Callable[..., Problem]) -> None:
    problem = make(num_train=600, num_test=400)
    settings = LoopSettings(initial=100, per_loop=100, loops=3)

    def last_f1(flip_rate: float) -> float:
        frame = _frame(problem, "random", dataclasses.replace(settings, flip_rate=flip_rate))
        return float(frame.filter((pl.col("loop") == 3) & pl.col("cluster").is_null())["f1"].item())

    assert last_f1(0.45) < last_f1(0.0) - 0.05


def test_run_trial_validation_cells_score_the_clusters_instead_of_monte_carlo(problem: Problem) -> None:
    test = problem.test
    held = cell_set("validation", [f"v-{i}" for i in range(len(test))], test.features, test.labels, test.clusters)
    frame = _frame(dataclasses.replace(problem, validation=held), "cluster-f1")
    assert frame["split"].unique().to_list() == ["test"]


def test_run_trial_pool_is_a_little_short_last_loop_takes_the_remainder(make: Callable[..., Problem]) -> None:
    frame = _frame(make(num_train=85), "random").filter(pl.col("cluster").is_null()).sort("loop")
    assert frame["num_train"].to_list() == [30, 50, 70, 85]


@pytest.mark.parametrize("settings", [_SMALL, _FAITHFUL])
def test_limited_global_pool_too_small_states_numbers_and_settings(
    make: Callable[..., Problem], settings: LoopSettings
) -> None:
    with pytest.raises(ConfigError, match=r"60 labelled cells.*30 initial.*3 loops of 20 need 90.*hil\.per_loop"):
        _frame(make(num_train=60), "random", settings)


def test_limited_global_with_a_main_cluster_raises(problem: Problem) -> None:
    with pytest.raises(ConfigError, match="no main cluster"):
        limited_global(problem, "random", 1, 2, _SMALL)


@pytest.mark.parametrize("settings", [_SMALL, _FAITHFUL])
@pytest.mark.parametrize("strategy", ["random", "cluster-f1", "margin"])
def test_limited_local_starts_alike_and_draws_where_the_strategy_may(
    make: Callable[..., Problem], settings: LoopSettings, strategy: str
) -> None:
    problem = make(background=12)
    start = limited_local(problem, strategy, 29, 2, settings)
    other = limited_local(problem, "random", 29, 2, settings)
    assert np.array_equal(start.labelled, other.labelled)
    assert not np.intersect1d(start.labelled, start.pool).size
    assert start.counts == other.counts
    assert sum(start.counts) <= len(start.pool)
    clusters = set(problem.train.clusters[start.pool].tolist())
    assert clusters == ({2} if strategy == "cluster-f1" else {-1, 0, 1, 2, 3})


def test_limited_local_without_a_main_cluster_lists_the_clusters(problem: Problem) -> None:
    with pytest.raises(ConfigError, match=r"one of 0, 1, 2, 3, not None"):
        limited_local(problem, "random", 1, None, _SMALL)
    with pytest.raises(ConfigError, match="not 9"):
        limited_local(problem, "random", 1, 9, _SMALL)


def test_cell_set_bad_values_name_the_set_and_the_first_row(problem: Problem) -> None:
    train = problem.train
    features = train.features.copy()
    features[3, 1] = np.nan
    with pytest.raises(SchemaError, match="train: features of 1 of 240 cells are not finite, the first in row 3"):
        dataclasses.replace(train, features=features)
    with pytest.raises(LabelError, match="label 10 is neither 0"):
        dataclasses.replace(train, labels=np.where(np.arange(240) == 5, 10, train.labels).astype(np.int8))
    with pytest.raises(SchemaError, match="do not describe the same cells"):
        dataclasses.replace(train, clusters=train.clusters[:-1])
    with pytest.raises(SchemaError, match="occurs twice"):
        dataclasses.replace(train, cell_ids=np.array(["a"] * 240))


def test_problem_one_class_or_shared_cells_raises(problem: Problem) -> None:
    ones = dataclasses.replace(problem.test, labels=np.ones(len(problem.test), np.int8))
    with pytest.raises(LabelError, match="all 120 labels are CTCs"):
        dataclasses.replace(problem, test=ones)
    with pytest.raises(SchemaError, match="disjoint"):
        dataclasses.replace(problem, test=problem.train)
