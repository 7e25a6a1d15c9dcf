"""Paired comparisons of strategies, beside slow loops and SciPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from scipy import stats

from ctc_ray.errors import SchemaError
from ctc_ray.hil.comparison import (
    areas,
    areas_over_minutes,
    compare,
    final_scores,
    holm,
    labels_to_reach,
    mean_height,
    reach_summary,
    shared_labels,
    sign_flip_p,
    worst_clusters,
)
from ctc_ray.hil.statistics import area_under_curve
from ctc_ray.schema import EFFORT_SCHEMA, RESULTS_SCHEMA


def results_of(
    heights: dict[str, list[list[float | None]]], clusters: dict[int, float | None] | None = None
) -> pl.DataFrame:
    """One row a strategy, run and loop; `clusters` are the scores of clusters at every loop."""
    rows = []
    for strategy, runs in heights.items():
        for run, curve in enumerate(runs, 1):
            for loop, f1 in enumerate(curve):
                for cluster, value in [(None, f1), *(clusters or {}).items()]:
                    rows.append(
                        {
                            "scenario": "limited-global",
                            "strategy": strategy,
                            "main_cluster": None,
                            "run": run,
                            "seed": run,
                            "loop": loop,
                            "split": "test",
                            "cluster": cluster,
                            "f1": value,
                            "recall": value,
                            "precision": value,
                            "num_train": 100 + 50 * loop,
                        }
                    )
    found = pl.from_arrow(pa.Table.from_pylist(rows, schema=RESULTS_SCHEMA))
    assert isinstance(found, pl.DataFrame)
    return found


def figures_of(values: dict[str, np.ndarray]) -> pl.DataFrame:
    return pl.concat(
        pl.DataFrame(
            {
                "scenario": "s",
                "strategy": name,
                "main_cluster": pl.Series([None] * len(found), dtype=pl.Int32),
                "run": range(len(found)),
                "seed": range(len(found)),
                "value": found,
            }
        )
        for name, found in values.items()
    )


def test_areas_final_and_worst_are_those_of_each_run() -> None:
    results = results_of({"margin": [[0.2, 0.6, 0.8], [0.0, 0.0, 1.0]]}, {-1: 0.01, 0: 0.5, 1: 0.3, 2: None})
    assert areas(results)["value"].to_list() == pytest.approx([0.55, 0.25])
    assert final_scores(results)["value"].to_list() == [0.8, 1.0]
    assert worst_clusters(results)["value"].to_list() == pytest.approx([0.3, 0.3])


def test_labels_to_reach_interpolates_and_is_null_where_the_curve_stays_below() -> None:
    results = results_of({"margin": [[0.2, 0.6, 0.8], [0.5, 0.4, 0.3], [0.1, 0.1, 0.2]]})
    assert labels_to_reach(results, 0.4)["value"].to_list() == [125.0, 100.0, None]


def test_labels_to_reach_takes_the_first_crossing_of_a_curve_that_falls_again() -> None:
    results = results_of({"margin": [[0.0, 0.8, 0.2, 0.9]]})
    assert labels_to_reach(results, 0.4)["value"].to_list() == [125.0]


@pytest.mark.parametrize("num", [8, 30])
def test_sign_flip_p_is_that_of_scipys_permutation_test(num: int) -> None:
    difference = np.random.default_rng(0).normal(0.3, 1.0, num)
    expected = stats.permutation_test(
        (difference,), lambda x, axis: x.mean(axis=axis), permutation_type="samples", n_resamples=20_000, rng=1
    )
    assert sign_flip_p(difference, 20_000, np.random.default_rng(0)) == pytest.approx(expected.pvalue, abs=0.01)


def test_sign_flip_p_of_differences_on_one_side_is_the_smallest_there_is() -> None:
    assert sign_flip_p(np.full(6, 0.1), 10, np.random.default_rng(0)) == pytest.approx(2 / 2**6)


def test_holm_multiplies_by_the_hypotheses_left_and_never_falls() -> None:
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_compare_pairs_by_seed_whatever_the_order_of_rows() -> None:
    base = np.random.default_rng(0).random(20)
    figures = figures_of({"random": base, "margin": base + 0.05, "badge": base + np.tile([0.3, -0.3], 10)})
    table = compare(figures.sample(fraction=1.0, shuffle=True, seed=4), "random").sort("strategy")
    assert table["mean_difference"].to_list() == pytest.approx([0.0, 0.05], abs=1e-12)
    assert table["num_better"].to_list() == [10, 20]
    badge, margin = table.to_dicts()
    assert badge["low"] < 0 < badge["high"]
    assert badge["p_value"] > 0.5
    assert margin["low"] == pytest.approx(0.05)
    assert margin["p_holm"] == pytest.approx(2 * margin["p_value"])
    assert margin["p_holm"] < 0.01


def test_compare_interval_covers_the_true_difference_nearly_always() -> None:
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(200):
        base = rng.random(30)
        table = compare(
            figures_of({"random": base, "margin": base + rng.normal(0.1, 0.2, 30)}), "random", resamples=500
        )
        covered += int(table["low"][0] <= 0.1 <= table["high"][0])
    assert 175 <= covered <= 199


def test_compare_leaves_undefined_runs_out_and_says_how_many_pairs_remain() -> None:
    figures = figures_of({"random": np.array([0.1, 0.2, 0.3]), "margin": np.array([0.2, 0.2, np.nan])}).fill_nan(None)
    assert compare(figures, "random")["num_pairs"].to_list() == [2]
    single = figures.filter(pl.col("seed") == 0)
    assert compare(single, "random").select("num_pairs", "low", "p_value", "p_holm").row(0) == (1, None, None, None)


def test_compare_without_the_baseline_names_what_there_is() -> None:
    with pytest.raises(SchemaError, match=r"'random'.*\(margin\)"):
        compare(figures_of({"margin": np.zeros(3)}), "random")


Curve = list[tuple[int, float, float | None]]
"""Labels, minutes and F1 of each loop."""


def simulated(curves: dict[str, list[Curve]], flip_rate: float | None = None) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Results and effort of runs with labels and minutes of their own."""
    results, effort = [], []
    for strategy, runs in curves.items():
        for run, curve in enumerate(runs, 1):
            for loop, (labels, minutes, f1) in enumerate(curve):
                key = ("rare-positive", strategy, None, run, 10 * run, loop)
                results.append((*key, "test", None, f1, f1, f1, labels))
                effort.append((*key, labels, int(minutes * 20), None, None, minutes))
    frames = []
    for rows, schema in ((results, RESULTS_SCHEMA), (effort, EFFORT_SCHEMA)):
        empty = pl.from_arrow(schema.empty_table())
        assert isinstance(empty, pl.DataFrame)
        frame = pl.DataFrame(rows, schema=empty.schema, orient="row")
        frames.append(frame if flip_rate is None else frame.with_columns(flip_rate=pl.lit(flip_rate)))
    return frames[0], frames[1]


def dense_mean(at: list[float], f1: list[float], low: float, high: float) -> float:
    """Mean height by looking everywhere."""
    places = np.linspace(low, high, 200_001)
    return float(np.interp(places, at, f1).mean())


def test_mean_height_of_a_part_is_the_mean_of_the_curve_there() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        at, f1 = np.sort(rng.uniform(0, 10, 6)), rng.random(6)
        low, high = np.sort(rng.uniform(at[0], at[-1], 2))
        assert mean_height(at, f1, low, high) == pytest.approx(dense_mean(list(at), list(f1), low, high), abs=1e-4)


def test_mean_height_takes_the_side_of_a_jump_that_lies_inside() -> None:
    at, f1 = np.array([0.0, 1.0, 1.0, 2.0, 2.0]), np.array([0.2, 0.2, 0.8, 0.8, 0.1])
    assert mean_height(at, f1, 0.0, 1.0) == pytest.approx(0.2)
    assert mean_height(at, f1, 1.0, 2.0) == pytest.approx(0.8)
    assert mean_height(at, f1, 0.0, 2.0) == pytest.approx(0.5)


def test_areas_of_arms_with_equal_spans_are_those_of_each_run_alone() -> None:
    rng = np.random.default_rng(0)
    results = results_of({name: rng.random((6, 5)).tolist() for name in ("random", "margin", "badge")})
    alone = area_under_curve(results).filter((pl.col("split") == "test") & pl.col("cluster").is_null())
    assert areas(results)["value"].to_list() == alone["area"].to_list()


def test_areas_judge_arms_of_one_seed_on_the_labels_that_all_have() -> None:
    short: Curve = [(100, 0, 0.2), (110, 1, 0.4), (120, 2, 0.4)]
    long: Curve = [(100, 0, 0.2), (105, 1, 0.3), (140, 2, 1.0)]
    results, _ = simulated({"random": [short, long], "margin": [long, long]})
    found = {(s, seed): v for s, seed, v in areas(results).select("strategy", "seed", "value").iter_rows()}
    assert found["random", 10] == pytest.approx(0.35)
    assert found["margin", 10] == pytest.approx(dense_mean([100, 105, 140], [0.2, 0.3, 1.0], 100, 120), abs=1e-6)
    assert found["margin", 20] == found["random", 20] == pytest.approx((5 * 0.25 + 35 * 0.65) / 40)
    assert shared_labels(results).select("seed", "low", "high").rows() == [(10, 100.0, 120.0), (20, 100.0, 140.0)]


def test_areas_of_an_arm_without_new_labels_are_undefined_and_leave_the_others_alone() -> None:
    still: Curve = [(100, 0, 0.2), (100, 1, 0.2)]
    grown: Curve = [(100, 0, 0.2), (110, 1, 0.4)]
    results, effort = simulated({"margin": [still], "random": [grown]})
    assert areas(results)["value"].to_list() == [None, pytest.approx(0.3)]
    assert shared_labels(results).select("low", "high").rows() == [(100.0, 110.0)]
    assert shared_labels(simulated({"margin": [still]})[0]).select("low", "high").rows() == [(None, None)]
    assert areas_over_minutes(results, effort)["value"].to_list() == pytest.approx([0.2, 0.3])


def test_areas_over_minutes_judge_arms_of_one_seed_on_the_minutes_that_all_have() -> None:
    quick: Curve = [(100, 0, 0.2), (110, 5, 0.6), (120, 10, 0.8)]
    slow: Curve = [(100, 0, 0.2), (110, 40, 0.6), (120, 80, 0.8)]
    results, effort = simulated({"cluster-f1": [quick, quick], "random": [slow, slow]})
    found = areas_over_minutes(results, effort.sample(fraction=1.0, shuffle=True, seed=1))
    assert found["value"].to_list() == pytest.approx([0.55, 0.55, 0.25, 0.25])
    assert areas(results)["value"].to_list() == pytest.approx([0.55] * 4)


def test_areas_over_minutes_are_those_over_labels_where_every_label_costs_the_same() -> None:
    curve: Curve = [(100, 0, 0.2), (150, 2.5, 0.7), (250, 7.5, 0.8)]
    results, effort = simulated({"margin": [curve], "random": [curve]})
    over_labels, over_minutes = areas(results)["value"], areas_over_minutes(results, effort)["value"]
    assert over_minutes.to_list() == pytest.approx(over_labels.to_list())


def test_areas_over_minutes_of_another_simulation_are_refused() -> None:
    curve: Curve = [(100, 0, 0.2), (150, 2.5, 0.7)]
    results, effort = simulated({"margin": [curve, curve]})
    with pytest.raises(SchemaError, match="margin, seed 20, loop 0"):
        areas_over_minutes(results, effort.filter(pl.col("seed") == 10))
    with pytest.raises(SchemaError, match="several rows for one of"):
        areas_over_minutes(results, pl.concat([effort.with_columns(flip_rate=rate) for rate in (0.0, 0.1)]))
    with pytest.raises(SchemaError, match="lacks the columns minutes"):
        areas_over_minutes(results, effort.drop("minutes"))
    with pytest.raises(SchemaError, match="lacks the columns flip_rate"):
        areas_over_minutes(results.with_columns(flip_rate=0.1), effort)


def test_reach_summary_counts_runs_that_never_got_there_as_infinite() -> None:
    heights: dict[str, list[list[float | None]]] = {
        "most": [[0.0, 0.8], [0.0, 0.4], [0.1, 0.2]],
        "half": [[0.0, 0.8], [0.0, 0.1]],
        "never": [[0.0, 0.1], [None, None]],
    }
    found = reach_summary(labels_to_reach(results_of(heights), 0.4)).sort("strategy")
    assert found.columns == ["scenario", "strategy", "main_cluster", "num_reached", "num_runs", "median"]
    assert found.select("strategy", "num_reached", "num_runs", "median").rows() == [
        ("half", 1, 2, None),
        ("most", 2, 3, 150.0),
        ("never", 0, 2, None),
    ]


def swept(rates: tuple[float, ...]) -> pl.DataFrame:
    """Results at several flip rates, each with curves of its own."""
    parts = []
    for number, rate in enumerate(rates):
        rng = np.random.default_rng(number)
        heights = {name: rng.random((8, 4)).tolist() for name in ("random", "margin", "badge")}
        parts.append(results_of(heights, {0: 0.1 * number, 1: 0.5}).with_columns(flip_rate=pl.lit(rate)))
    return pl.concat(parts).sample(fraction=1.0, shuffle=True, seed=0)


@pytest.mark.parametrize("figures", [areas, final_scores, worst_clusters, lambda frame: labels_to_reach(frame, 0.5)])
def test_figures_of_a_sweep_over_flip_rates_are_those_of_each_rate_alone(figures: Any) -> None:
    rates = (0.0, 0.05, 0.1)
    sweep = swept(rates)
    together = figures(sweep)
    assert together.columns == ["scenario", "strategy", "main_cluster", "flip_rate", "run", "seed", "value"]
    for rate in rates:
        alone = figures(sweep.filter(pl.col("flip_rate") == rate).drop("flip_rate"))
        own = together.filter(pl.col("flip_rate") == rate).drop("flip_rate")
        assert own.equals(alone)


def test_compare_pairs_and_corrects_within_each_flip_rate() -> None:
    rates = (0.0, 0.05, 0.1)
    sweep = swept(rates)
    together = compare(areas(sweep), "random", resamples=500)
    assert together.height == 2 * len(rates)
    for rate in rates:
        alone = compare(areas(sweep.filter(pl.col("flip_rate") == rate).drop("flip_rate")), "random", resamples=500)
        assert together.filter(pl.col("flip_rate") == rate).drop("flip_rate").equals(alone)
    reached = reach_summary(labels_to_reach(sweep, 0.5))
    assert reached.select("flip_rate", "num_runs").unique().height == len(rates)
    assert reached["num_runs"].to_list() == [8] * 9


def test_areas_over_minutes_of_a_sweep_keep_flip_rates_apart() -> None:
    first, second = (
        simulated({"margin": [[(100, 0, 0.2), (150, 5, top)]], "random": [[(100, 0, 0.2), (150, end, 0.4)]]}, rate)
        for rate, top, end in ((0.0, 0.8, 5), (0.1, 0.4, 20))
    )
    results, effort = (pl.concat([first[part], second[part]]) for part in (0, 1))
    found = areas_over_minutes(results, effort).sort("flip_rate", "strategy")
    assert found["value"].to_list() == pytest.approx([0.5, 0.3, 0.3, 0.225])
