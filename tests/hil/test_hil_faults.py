"""Faults of the reference that corrected mode leaves in, one by one and all together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import get_args

import numpy as np
import polars as pl
import pytest

from ctc_ray.config import FaultName, load_config
from ctc_ray.errors import ConfigError
from ctc_ray.hil import faithful
from ctc_ray.hil.labellers import SimulatedLabeller
from ctc_ray.hil.loop import Trial, run_trial
from ctc_ray.hil.pools import Problem
from ctc_ray.hil.scores import Score
from ctc_ray.hil.settings import FAULTS, LoopSettings
from ctc_ray.hil.state import LoopState
from ctc_ray.hil.strategies import choose_cluster_f1

SMALL = LoopSettings(initial=30, per_loop=20, loops=3, mc_splits=8)
OF_CLUSTER_F1: tuple[FaultName, ...] = ("short-cluster", "rounding", "unscored-clusters", "reseeding")


def keeping(*faults: FaultName) -> LoopSettings:
    return dataclasses.replace(SMALL, faults=faults)


def state_of(sizes: list[int], f1: dict[int, float | None], count: int, seed: int = 29) -> LoopState:
    """Clusters 0, 1, ... of so many cells in the pool, in an order of their own; scores as given."""
    clusters = np.random.default_rng(1).permutation(np.repeat(np.arange(len(sizes)), sizes))
    num = len(clusters)
    state = LoopState(
        np.zeros((num + 1, 2)), np.array([*clusters, 0]), np.array([num]), np.array([1], np.int8), np.arange(num), seed
    )
    scores = {c: Score(v, v, v, 9) for c, v in f1.items()}
    return dataclasses.replace(state, cluster_scores=scores, count=count)


def counts_of(state: LoopState, chosen: np.ndarray, num: int) -> list[int]:
    return [int(count) for count in np.bincount(state.clusters[chosen], minlength=num)]


def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def test_every_fault_of_the_config_has_a_description() -> None:
    assert set(get_args(FaultName)) == set(FAULTS)


@pytest.mark.parametrize("sizes", [[60, 60, 60], [3, 50, 9], [0, 4, 1], [0, 0, 0]])
@pytest.mark.parametrize("f1", [{0: 0.5, 1: 0.75, 2: 0.8}, {0: 0.1}, {0: 1.0, 1: 1.0, 2: 1.0}, {1: None, 2: 0.0}])
def test_cluster_f1_without_faults_chooses_what_the_mended_strategy_does(
    sizes: list[int], f1: dict[int, float | None]
) -> None:
    state = state_of(sizes, f1, 20)
    assert np.array_equal(faithful.cluster_f1_keeping()(state, rng()), choose_cluster_f1(state, rng()))


def test_rounding_gives_the_difference_to_the_lowest_cluster_and_mends_the_rest() -> None:
    f1: dict[int, float | None] = {0: 0.5, 1: 0.75, 2: 0.85}
    ample = state_of([60, 60, 60], f1, 10)  # 5.56, 2.78, 1.67
    choose = faithful.cluster_f1_keeping("rounding")
    assert counts_of(ample, choose(ample, rng()), 3) == [5, 3, 2]
    assert counts_of(ample, choose_cluster_f1(ample, rng()), 3) == [5, 3, 2]
    equal = state_of([60, 60, 60], dict.fromkeys(range(3), 0.4), 11)  # 3.67 each: 4, 4, 4, and one too many
    assert counts_of(equal, choose(equal, rng()), 3) == [3, 4, 4]
    assert counts_of(equal, choose_cluster_f1(equal, rng()), 3) == [4, 4, 3]
    short = state_of([2, 60, 60], dict.fromkeys(range(3), 0.4), 11)
    chosen = choose(short, rng())
    assert counts_of(short, chosen, 3)[0] == 2
    assert len(chosen) == len(set(chosen.tolist())) == 11


def test_short_cluster_is_filled_from_the_one_listed_after_the_lowest_with_repeats() -> None:
    state = state_of([3, 20, 40], {0: 0.0, 1: 0.2, 2: 0.9}, 30)
    chosen = faithful.cluster_f1_keeping("short-cluster")(state, rng())
    assert counts_of(state, chosen, 3) == [
        3,
        13 + 13,
        1,
    ]  # quotas 16, 13 and 1; the first cluster's other 13 from the second
    assert len(set(chosen.tolist())) < 30
    mended = choose_cluster_f1(state, rng())
    assert len(set(mended.tolist())) == 30


def test_short_cluster_last_of_all_stops_as_the_reference_does() -> None:
    state = state_of([40, 2], {0: 0.9, 1: 0.0}, 20)
    with pytest.raises(ConfigError, match=r"IndexError.*without --fault short-cluster"):
        faithful.cluster_f1_keeping("short-cluster")(state, rng())
    assert len(faithful.cluster_f1_keeping("rounding")(state, rng())) == 20


def test_unscored_cluster_is_never_drawn_from_even_when_the_others_are_used_up() -> None:
    choose = faithful.cluster_f1_keeping("unscored-clusters")
    state = state_of([30, 30, 4], {0: 0.9, 2: 0.5}, 20)
    assert counts_of(state, choose(state, rng()), 3) == [16, 0, 4]
    assert counts_of(state, choose_cluster_f1(state, rng()), 3)[1] > 0
    used_up = state_of([5, 30, 4], {0: 0.9, 2: 0.5}, 20)
    assert counts_of(used_up, choose(used_up, rng()), 3) == [5, 0, 4]


def test_unscored_clusters_with_every_f1_at_one_stop_as_the_reference_does() -> None:
    state = state_of([30, 30], {0: 1.0, 1: 1.0}, 20)
    with pytest.raises(ConfigError, match=r"divides by zero.*without --fault unscored-clusters"):
        faithful.cluster_f1_keeping("unscored-clusters")(state, rng())
    assert counts_of(state, faithful.cluster_f1_keeping("short-cluster")(state, rng()), 2) == [10, 10]


def test_reseeding_draws_alike_in_every_loop_and_cluster_whatever_the_generator() -> None:
    f1: dict[int, float | None] = {0: 0.5, 1: 0.5}
    state = state_of([40, 40], f1, 12)
    choose = faithful.cluster_f1_keeping("reseeding")
    chosen = choose(state, rng())
    assert np.array_equal(chosen, choose(state, np.random.default_rng(99)))
    assert not np.array_equal(chosen, choose(dataclasses.replace(state, seed=30), rng()))
    places = [np.flatnonzero(np.flatnonzero(state.clusters[state.pool] == c) == i)[0] for c, i in _by_cluster(chosen)]
    assert places[:6] == places[6:]  # the same numbers in both clusters


def _by_cluster(chosen: np.ndarray) -> list[tuple[int, int]]:
    return [(number // 6, int(position)) for number, position in enumerate(chosen)]


def frame_of(problem: Problem, trial: Trial, settings: LoopSettings) -> pl.DataFrame:
    return pl.DataFrame(run_trial(problem, trial, settings), infer_schema_length=None)


def with_validation(problem: Problem) -> Problem:
    held = dataclasses.replace(problem.test, name="validation", cell_ids=np.char.add("v-", problem.test.cell_ids))
    return dataclasses.replace(problem, validation=held)


@pytest.mark.parametrize("validated", [False, True])
@pytest.mark.parametrize("strategy", ["random", "cluster-f1", "margin"])
@pytest.mark.parametrize(("scenario", "main_cluster"), [("limited-global", None), ("limited-local", 2)])
def test_corrected_mode_with_every_fault_is_faithful_mode(
    make: Callable[..., Problem], scenario: str, main_cluster: int | None, strategy: str, validated: bool
) -> None:
    problem = make(background=15)
    problem = with_validation(problem) if validated else problem
    trial = Trial(scenario, strategy, main_cluster, 1, 7)
    every = frame_of(problem, trial, keeping(*FAULTS))
    whole = frame_of(problem, trial, dataclasses.replace(SMALL, mode="faithful"))
    if strategy != "cluster-f1":  # faithful mode shows Monte-Carlo scores in all arms; they steer this one alone
        whole = whole.filter(pl.col("split") == "test")
    assert every.equals(whole)
    mended = frame_of(problem, trial, SMALL)
    assert strategy == "margin" or not mended.filter(pl.col("split") == "test").equals(whole)


@pytest.mark.parametrize("fault", ["monte-carlo", "undefined-is-zero"])
def test_single_fault_changes_what_it_says_and_no_more(problem: Problem, fault: FaultName) -> None:
    trial = Trial("limited-global", "cluster-f1", None, 1, 7)
    found = with_validation(problem)
    mended, kept = frame_of(found, trial, SMALL), frame_of(found, trial, keeping(fault))
    assert ("mc" in kept["split"].unique()) == (fault == "monte-carlo")
    if fault == "monte-carlo":  # then validation cells change nothing
        assert kept.equals(frame_of(problem, trial, SMALL))
        assert not kept.filter(pl.col("split") == "test").equals(mended)
    else:
        defined = mended["f1"].is_not_null()
        assert kept.filter(defined)["f1"].equals(mended.filter(defined)["f1"])
        assert kept["num_train"].equals(mended["num_train"])


def test_undefined_is_zero_but_one_for_a_cluster_of_others_alone(problem: Problem) -> None:
    clear = problem.test.clusters == 0
    labels = np.where(clear, 0, problem.test.labels).astype(np.int8)
    features = np.where(clear[:, None], 300.0, problem.test.features)  # far away: no kernel reaches it
    test = dataclasses.replace(problem.test, labels=labels, features=features)
    shown = dataclasses.replace(problem, test=test)
    trial = Trial("limited-global", "random", None, 1, 7)
    mended, kept = (
        frame_of(shown, trial, s).filter(pl.col("cluster") == 0) for s in (SMALL, keeping("undefined-is-zero"))
    )
    undefined = mended["f1"].is_null()
    assert undefined.any()
    assert kept.filter(undefined)["f1"].to_list() == [1.0] * int(undefined.sum())
    assert kept["recall"].to_list() == [0.0] * 4
    assert mended["recall"].null_count() == 4


class Asked(SimulatedLabeller):
    """Keeps what it was asked about."""

    def __init__(self, truth: np.ndarray) -> None:
        super().__init__(truth)
        self.cells: list[int] = []

    def answer(self, positions: np.ndarray) -> np.ndarray:
        self.cells += positions.tolist()
        return super().answer(positions)


def num_repeats(problem: Problem, seed: int, settings: LoopSettings) -> int:
    """Cells that a run learns again; -1 where it stops as the reference would."""
    expert = Asked(problem.train.labels)
    try:
        rows = run_trial(problem, Trial("limited-global", "cluster-f1", None, 1, seed), settings, expert)
    except ConfigError:
        return -1
    assert rows[-1]["num_train"] == 90
    return len(expert.cells) - len(set(expert.cells))


def test_short_cluster_in_a_whole_run_learns_cells_again_or_stops_where_the_mended_one_does_neither(
    make: Callable[..., Problem],
) -> None:
    problem = make(num_train=130, seed=3)
    kept = [num_repeats(problem, seed, keeping("short-cluster")) for seed in range(8)]
    assert max(kept) > 0
    assert [num_repeats(problem, seed, SMALL) for seed in range(8)] == [0] * 8


@pytest.mark.parametrize("faults", ["short-cluster", "[rounding, reseeding]"])
def test_config_refuses_faults_in_faithful_mode_and_unknown_ones(faults: str) -> None:
    listed = faults if faults.startswith("[") else f"[{faults}]"
    with pytest.raises(ConfigError, match="faithful mode has every fault"):
        load_config(None, [f"hil.faults={listed}", "hil.mode=faithful"])
    with pytest.raises(ConfigError, match="faults"):
        load_config(None, ["hil.faults=[shortcluster]"])


def test_config_without_faults_has_the_identity_of_before_and_their_order_does_not_matter() -> None:
    assert "faults" not in load_config(None, []).hil.identity()
    one = load_config(None, ["hil.faults=[rounding, monte-carlo]"]).hil
    other = load_config(None, ["hil.faults=[monte-carlo, rounding, rounding]"]).hil
    assert one.identity() == other.identity()
    assert one.identity() != load_config(None, ["hil.faults=[rounding]"]).hil.identity()


def test_loop_settings_refuse_an_unknown_fault_and_faults_in_faithful_mode() -> None:
    with pytest.raises(ConfigError, match="no fault 'shrot': known are short-cluster, rounding"):
        LoopSettings(faults=("shrot",))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="faithful mode has every fault: leave out rounding"):
        LoopSettings(mode="faithful", faults=("rounding",))
