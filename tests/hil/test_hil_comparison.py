"""Paired comparisons of strategies, beside slow loops and SciPy."""

from __future__ import annotations

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from scipy import stats

from ctc_ray.errors import SchemaError
from ctc_ray.hil.comparison import areas, compare, final_scores, holm, labels_to_reach, sign_flip_p, worst_clusters
from ctc_ray.schema import RESULTS_SCHEMA


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
