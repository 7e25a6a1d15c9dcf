"""Summaries of simulation results against sums done by hand."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from ctc_ray.errors import SchemaError
from ctc_ray.hil.statistics import area_under_curve, first_and_last, paired_differences, summarise, table1
from ctc_ray.schema import RESULTS_SCHEMA

_COLUMNS = RESULTS_SCHEMA.names


def _results() -> pl.DataFrame:
    rows = []
    curves = {
        "random": ((0.2, 0.4, 0.6), (0.4, 0.4, 0.8)),
        "cluster-f1": ((0.2, 0.6, 0.8), (0.4, 0.8, 0.7)),
        "margin": ((0.2, 0.5, 0.9), (0.4, 0.6, 0.9)),
    }
    for strategy, runs in curves.items():
        for run, curve in enumerate(runs, start=1):
            for loop, f1 in enumerate(curve):
                for cluster, value in ((None, f1), (-1, None), (2, f1 / 2)):
                    key = ("limited-global", strategy, None, run, 10 * run, loop, "test", cluster)
                    rows.append((*key, value, value, value, 100 * (loop + 1)))
    schema = pl.Schema(pl.from_arrow(RESULTS_SCHEMA.empty_table()).schema)  # type: ignore[union-attr]
    return pl.DataFrame(rows, schema=schema, orient="row")


def test_summarise_two_runs_gives_mean_and_sample_sd_in_the_agreed_columns() -> None:
    summary = summarise(_results())
    assert summary.columns == [
        *("scenario", "strategy", "main_cluster", "split", "cluster", "loop"),
        *("num_train", "mean_f1", "sd_f1", "num_runs"),
    ]
    row = summary.filter(
        (pl.col("strategy") == "random") & pl.col("cluster").is_null() & (pl.col("loop") == 2)
    ).to_dicts()
    assert len(row) == 1
    assert row[0]["mean_f1"] == pytest.approx(0.7)
    assert row[0]["sd_f1"] == pytest.approx(0.1 * 2**0.5)
    assert (row[0]["num_train"], row[0]["num_runs"]) == (300, 2)


def test_summarise_undefined_f1_is_null_and_not_counted() -> None:
    background = summarise(_results()).filter(pl.col("cluster") == -1)
    assert background["mean_f1"].null_count() == background.height > 0
    assert background["num_runs"].to_list() == [0] * background.height


def test_table1_has_init_and_last_loop_with_a_column_a_strategy_in_the_papers_order() -> None:
    table = table1(_results())
    assert table.columns == ["scenario", "main_cluster", "cluster", "moment", "cluster-f1", "random", "margin"]
    assert table["moment"].to_list() == ["init", "loop 2"] * 3
    assert table["cluster"].to_list() == [None, None, -1, -1, 2, 2]
    assert table["random"].to_list()[:3] == ["0.300 ± 0.141", "0.700 ± 0.141", "undefined"]
    assert table["cluster-f1"].to_list()[1] == "0.750 ± 0.071"


def test_paired_differences_pairs_runs_by_seed() -> None:
    shuffled = _results().sample(fraction=1.0, shuffle=True, seed=3)
    row = paired_differences(shuffled).filter(
        (pl.col("strategy") == "cluster-f1") & pl.col("cluster").is_null() & (pl.col("loop") == 2)
    )
    assert row["mean_difference"].item() == pytest.approx(0.05)
    assert (row["num_pairs"].item(), row["num_better"].item()) == (2, 1)


def test_paired_differences_without_the_baseline_says_which_strategies_there_are() -> None:
    with pytest.raises(SchemaError, match=r"'random'.*cluster-f1, margin"):
        paired_differences(_results().filter(pl.col("strategy") != "random"))


def test_area_under_curve_is_the_mean_height_of_the_curve() -> None:
    areas = area_under_curve(_results()).filter(
        (pl.col("strategy") == "random") & pl.col("cluster").is_null() & (pl.col("seed") == 10)
    )
    assert areas["area"].item() == pytest.approx((0.3 + 0.5) / 2)
    undefined = area_under_curve(_results()).filter(pl.col("cluster") == -1)
    assert undefined["area"].null_count() == undefined.height


def test_summarise_results_without_a_column_names_it() -> None:
    with pytest.raises(SchemaError, match="num_train"):
        summarise(_results().drop("num_train"))
    assert set(_COLUMNS) == set(_results().columns)


def test_first_and_last_are_the_numbers_of_table1() -> None:
    ends = first_and_last(_results())
    assert ends["loop"].unique().sort().to_list() == [0, 2]
    row = ends.filter((pl.col("strategy") == "random") & pl.col("cluster").is_null() & (pl.col("loop") == 2))
    assert row.select("num_train", "mean_f1", "num_runs").row(0) == (300, pytest.approx(0.7), 2)
    assert table1(_results())["random"][1] == f"{row['mean_f1'].item():.3f} ± {row['sd_f1'].item():.3f}"


@pytest.mark.parametrize("table", [summarise, first_and_last, table1, paired_differences, area_under_curve])
def test_tables_of_a_sweep_over_flip_rates_are_those_of_each_rate_alone(table: Any) -> None:
    clean = _results()
    noisy = clean.with_columns(pl.col("f1") * (1 - 0.01 * pl.col("loop")), pl.col("num_train") + 1)
    sweep = pl.concat([clean.with_columns(flip_rate=pl.lit(0.0)), noisy.with_columns(flip_rate=pl.lit(0.1))])
    together = table(sweep.sample(fraction=1.0, shuffle=True, seed=1))
    assert together.columns.index("flip_rate") == together.columns.index("main_cluster") + 1
    for rate, alone in ((0.0, table(clean)), (0.1, table(noisy))):
        own = together.filter(pl.col("flip_rate") == rate).drop("flip_rate")
        assert_frame_equal(own, alone, check_exact=False, abs_tol=1e-12)
