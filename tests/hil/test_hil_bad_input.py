"""Bad input in every scenario: clusters without training cells, one class, pools smaller than a loop, labels of other kinds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import polars as pl
import pytest

from ctc_ray.config import FaultName
from ctc_ray.errors import ConfigError, LabelError, SchemaError
from ctc_ray.hil.loop import Trial, run_trial
from ctc_ray.hil.pools import CellSet, Problem, cell_set
from ctc_ray.hil.scenarios import SCENARIOS, scenario_named
from ctc_ray.hil.settings import FAULTS, LoopSettings
from ctc_ray.hil.strategies import STRATEGIES

SMALL = LoopSettings(initial=30, per_loop=20, loops=3, mc_splits=8, budget_s=30.0)
MAIN = {"limited-global": None, "limited-local": 2, "rare-positive": None}


def frame_of(problem: Problem, scenario: str, strategy: str, settings: LoopSettings = SMALL) -> pl.DataFrame:
    rows = run_trial(problem, Trial(scenario, strategy, MAIN[scenario], 1, 5), settings)
    return pl.DataFrame(rows, infer_schema_length=None).filter(pl.col("split") == "test")


def totals_of(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.filter(pl.col("cluster").is_null()).sort("loop")


def subset(cells: CellSet, inside: np.ndarray) -> CellSet:
    return CellSet(
        cells.name, cells.cell_ids[inside], cells.features[inside], cells.labels[inside], cells.clusters[inside]
    )


def without_training_cells(problem: Problem, cluster: int) -> Problem:
    kept = problem.train_clusters_filled != cluster
    return Problem(subset(problem.train, kept), problem.train_clusters_filled[kept], problem.test)


def with_validation(problem: Problem) -> Problem:
    held = dataclasses.replace(problem.test, name="validation", cell_ids=np.char.add("v-", problem.test.cell_ids))
    return dataclasses.replace(problem, validation=held)


@pytest.mark.parametrize("validated", [False, True])
@pytest.mark.parametrize("strategy", ["random", "cluster-f1", "margin", "cluster-herding"])
@pytest.mark.parametrize("scenario", list(SCENARIOS))
def test_test_cluster_without_training_cells_is_scored_in_every_loop_and_never_searched(
    make: Callable[..., Problem], scenario: str, strategy: str, validated: bool
) -> None:
    problem = without_training_cells(make(num_train=300, seed=3), 0)
    frame = frame_of(with_validation(problem) if validated else problem, scenario, strategy)
    alone = frame.filter(pl.col("cluster") == 0).sort("loop")
    assert alone["loop"].to_list() == [0, 1, 2, 3]
    assert alone["recall"].null_count() == 0  # it has CTCs to find
    assert 0 not in frame["searched_cluster"].drop_nulls().to_list()
    assert totals_of(frame)["num_train"].is_sorted()


def test_test_cluster_without_training_cells_is_not_searched_by_the_test_set_either(
    make: Callable[..., Problem],
) -> None:
    problem = without_training_cells(make(num_train=300, seed=3), 0)
    frame = frame_of(
        problem, "rare-positive", "cluster-f1", dataclasses.replace(SMALL, faults=("test-target", "fixed-target"))
    )
    assert set(frame["searched_cluster"].drop_nulls().to_list()) <= {1, 2, 3}


@pytest.mark.parametrize("strategy", ["random", "cluster-f1", "margin"])
@pytest.mark.parametrize(
    ("scenario", "message"),
    [("limited-local", r"one of 1, 2, 3, not 0"), ("rare-positive", r"--main-cluster 0 is none of 1, 2, 3")],
)
def test_main_cluster_of_test_cells_alone_is_refused(
    problem: Problem, scenario: str, message: str, strategy: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_trial(without_training_cells(problem, 0), Trial(scenario, strategy, 0, 1, 5), SMALL)


@pytest.mark.parametrize("num", [1, 4])
def test_limited_local_main_cluster_of_fewer_than_five_cells_is_refused(problem: Problem, num: int) -> None:
    few = np.ones(len(problem.train), bool)
    few[np.flatnonzero(problem.train.clusters == 2)[num:]] = False
    small = Problem(subset(problem.train, few), problem.train_clusters_filled[few], problem.test)
    with pytest.raises(ConfigError, match=f"cluster 2 has {num} labelled training cells: .* at least 5"):
        frame_of(small, "limited-local", "random")


def test_sets_of_one_class_are_refused_by_name(problem: Problem) -> None:
    for name in ("train", "test"):
        for label, kind in ((0, "non-CTCs"), (1, "CTCs")):
            cells: CellSet = getattr(problem, name)
            one = dataclasses.replace(cells, labels=np.full(len(cells), label, np.int8))
            with pytest.raises(LabelError, match=f"{name}: all {len(cells)} labels are {kind}"):
                dataclasses.replace(problem, **{name: one})


def with_ctcs_in_the_pool_alone(problem: Problem, scenario: str, strategy: str) -> Problem:
    """Two CTCs in all, which can be drawn and are not among the first labels."""
    start = scenario_named(scenario)(problem, strategy, 5, MAIN[scenario], SMALL)
    labels = np.zeros(len(problem.train), np.int8)
    labels[start.pool[:2]] = 1
    return dataclasses.replace(problem, train=dataclasses.replace(problem.train, labels=labels))


@pytest.mark.parametrize("strategy", list(STRATEGIES))
@pytest.mark.parametrize("scenario", list(SCENARIOS))
def test_first_labels_of_one_class_predict_that_class_and_the_run_goes_on(
    problem: Problem, scenario: str, strategy: str
) -> None:
    rare = with_validation(with_ctcs_in_the_pool_alone(problem, scenario, strategy))
    frame = totals_of(frame_of(rare, scenario, strategy))
    assert frame["loop"].to_list() == [0, 1, 2, 3]
    assert (frame["recall"][0], frame["precision"][0]) == (0.0, None)  # nothing is called a CTC
    assert frame["num_viewed"].is_sorted()
    assert scenario == "rare-positive" or frame["num_train"][3] > frame["num_train"][0]


def test_rare_positive_first_labels_of_one_class_and_no_validation_has_no_weakest_cluster(problem: Problem) -> None:
    rare = with_ctcs_in_the_pool_alone(problem, "rare-positive", "margin")
    with pytest.raises(ConfigError, match=r"no cluster has a CTC among the held-out cells.*label more cells"):
        frame_of(rare, "rare-positive", "margin")


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_limited_global_pool_smaller_than_a_loop_gives_all_of_it(make: Callable[..., Problem], strategy: str) -> None:
    settings = dataclasses.replace(SMALL, per_loop=60, loops=1)
    frame = totals_of(frame_of(make(num_train=85), "limited-global", strategy, settings))
    assert frame["num_train"].to_list() == [30, 85]


@pytest.mark.parametrize("mode", ["corrected", "faithful"])
def test_limited_global_without_a_pool_is_refused(make: Callable[..., Problem], mode: str) -> None:
    settings = dataclasses.replace(SMALL, per_loop=60, loops=1, mode=mode)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"has 30 labelled cells.*need 90"):
        frame_of(make(num_train=30), "limited-global", "random", settings)


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_limited_local_pool_used_up_before_the_last_loop_gives_no_more(problem: Problem, strategy: str) -> None:
    settings = dataclasses.replace(SMALL, loops=9)
    frame = totals_of(frame_of(problem, "limited-local", strategy, settings))
    start = scenario_named("limited-local")(problem, strategy, 5, 2, settings)
    assert frame["num_train"][-1] == len(start.labelled) + sum(start.counts)
    assert start.counts[-1] == 0
    assert sum(start.counts) <= len(start.pool)
    assert frame["num_train"][-1] == frame["num_train"][-2]


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault not in ("short-cluster", "unscored-clusters")])
def test_limited_global_pool_smaller_than_a_loop_gives_all_of_it_with_a_fault_left_in(
    make: Callable[..., Problem], fault: FaultName
) -> None:
    settings = dataclasses.replace(SMALL, per_loop=60, loops=1, faults=(fault,))
    frame = totals_of(frame_of(make(num_train=85), "limited-global", "cluster-f1", settings))
    assert frame["num_train"].to_list() == [30, 85]


@pytest.mark.parametrize("label", [2, 10, -1, 256, 0.7, float("nan")])
def test_cell_set_label_outside_0_and_1_is_refused_whatever_its_type(problem: Problem, label: float) -> None:
    train = problem.train
    labels = [label, *train.labels.tolist()[1:]]
    with pytest.raises(LabelError, match=r"train: label .* is neither 0 \(no CTC\) nor 1 \(CTC\)"):
        cell_set("train", train.cell_ids, train.features, labels, train.clusters)
    accepted = cell_set("train", train.cell_ids, train.features, train.labels.astype(bool), train.clusters)
    assert np.array_equal(accepted.labels, train.labels)


def test_problem_sets_that_do_not_fit_together_are_refused(problem: Problem) -> None:
    with pytest.raises(SchemaError, match="239 filled clusters for 240 training cells"):
        dataclasses.replace(problem, train_clusters_filled=problem.train_clusters_filled[1:])
    narrow = dataclasses.replace(problem.test, features=problem.test.features[:, :3])
    with pytest.raises(SchemaError, match="test has 3 features a cell and train 6"):
        dataclasses.replace(problem, test=narrow)
    empty = subset(problem.test, np.zeros(len(problem.test), bool))
    with pytest.raises(SchemaError, match="test: no cells"):
        dataclasses.replace(problem, test=empty)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_refused_in_every_set(problem: Problem, value: float) -> None:
    for cells in (problem.train, problem.test):
        features = cells.features.copy()
        features[7, 0] = value
        with pytest.raises(SchemaError, match=f"{cells.name}: features of 1 of {len(cells)} .* the first in row 7"):
            dataclasses.replace(cells, features=features)
