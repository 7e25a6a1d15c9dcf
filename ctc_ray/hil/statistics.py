"""Summaries of simulation results: mean and spread over runs, paired differences, area under the F1-vs-labels curve.

Every function takes the frame of `simulations/<name>/results.parquet` (columns of `RESULTS_SCHEMA`) and returns a tidy frame.
An undefined F1 is null and is left out of a mean; `num_runs` and `num_pairs` say how many values remain.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import polars as pl

from ctc_ray.errors import SchemaError
from ctc_ray.schema import RESULTS_SCHEMA

_ARM = ["scenario", "strategy", "main_cluster", "split", "cluster"]
_PAPER_ORDER = ("cluster-f1", "random")


def summarise(results: pl.DataFrame) -> pl.DataFrame:
    """Mean and sample standard deviation of F1 over the runs of an arm.

    Args:
        results: rows of `results.parquet`.

    Returns:
        Columns scenario, strategy, main_cluster (null: none), split, cluster (null: all cells), loop (0: initial), num_train
        (median over runs), mean_f1, sd_f1 (null below two runs), num_runs; sorted by all but the figures, nulls first.

    Raises:
        SchemaError: a column is missing.
    """
    require_columns(results)
    return (
        results.group_by([*_ARM, "loop"])
        .agg(
            pl.col("num_train").median().round().cast(pl.Int32),
            pl.col("f1").mean().alias("mean_f1"),
            pl.col("f1").std(ddof=1).alias("sd_f1"),
            pl.col("f1").count().cast(pl.Int32).alias("num_runs"),
        )
        .select(*_ARM, "loop", "num_train", "mean_f1", "sd_f1", "num_runs")
        .sort([*_ARM, "loop"])
    )


def table1(results: pl.DataFrame) -> pl.DataFrame:
    """Lay the test F1 out as the paper's Table 1: before the first loop and after the last one, a column a strategy.

    Args:
        results: rows of `results.parquet`.

    Returns:
        Columns scenario, main_cluster, cluster (null: all cells), moment (`init` or `loop N`), then one text column a strategy
        (`cluster-f1` and `random` first, as in the paper) with `mean ± sd`, three decimals; `undefined` where no run has an F1,
        null where the strategy was not run. Rows: all cells first, then background (-1), then the clusters; init before last.

    Raises:
        SchemaError: a column is missing.

    Source: paper, Table 1 (mean ± sample standard deviation over five runs).
    """
    summary = summarise(results).filter(pl.col("split") == "test")
    last = pl.col("loop").max().over("scenario", "main_cluster")
    ends = summary.with_columns(last.alias("last")).filter((pl.col("loop") == 0) | (pl.col("loop") == pl.col("last")))
    cells = ends.select(
        "scenario",
        "main_cluster",
        "cluster",
        "loop",
        "strategy",
        pl.when(pl.col("loop") == 0)
        .then(pl.lit("init"))
        .otherwise(pl.format("loop {}", pl.col("loop")))
        .alias("moment"),
        pl.struct("mean_f1", "sd_f1").map_elements(_mean_and_sd, return_dtype=pl.String).alias("text"),
    )
    keys = ["scenario", "main_cluster", "cluster", "loop", "moment"]
    found = cells["strategy"].unique().to_list()
    strategies = [s for s in _PAPER_ORDER if s in found] + sorted(set(found) - set(_PAPER_ORDER))
    wide = cells.select(keys).unique()
    for strategy in strategies:
        column = cells.filter(pl.col("strategy") == strategy).select(*keys, pl.col("text").alias(strategy))
        wide = wide.join(column, on=keys, how="left", nulls_equal=True)
    return wide.sort(keys).drop("loop")


def paired_differences(results: pl.DataFrame, baseline: str = "random") -> pl.DataFrame:
    """Difference of F1 to the baseline strategy, run by run: both start from the same labels.

    Args:
        results: rows of `results.parquet`.
        baseline: strategy that the others are compared with.

    Returns:
        Columns scenario, strategy, main_cluster, split, cluster, loop, mean_difference, sd_difference (sample), num_pairs,
        num_better (pairs in which the strategy is ahead); pairs with an undefined F1 are left out.

    Raises:
        SchemaError: a column is missing, or no row has the baseline strategy.
    """
    require_columns(results)
    keys = ["scenario", "main_cluster", "split", "cluster", "loop", "seed"]
    reference = results.filter(pl.col("strategy") == baseline).select(*keys, pl.col("f1").alias("baseline_f1"))
    if reference.is_empty():
        names = ", ".join(sorted(results["strategy"].unique()))
        raise SchemaError(f"no run of the baseline strategy {baseline!r} among the results ({names}): simulate it too")
    pairs = results.filter(pl.col("strategy") != baseline).join(reference, on=keys, how="inner", nulls_equal=True)
    difference = pl.col("f1") - pl.col("baseline_f1")
    return (
        pairs.group_by([*_ARM, "loop"])
        .agg(
            difference.mean().alias("mean_difference"),
            difference.std(ddof=1).alias("sd_difference"),
            difference.count().cast(pl.Int32).alias("num_pairs"),
            (difference > 0).sum().cast(pl.Int32).alias("num_better"),
        )
        .sort([*_ARM, "loop"])
    )


def area_under_curve(results: pl.DataFrame) -> pl.DataFrame:
    """Mean height of each run's F1-vs-labels curve: the trapezoid area divided by the span of labels.

    Args:
        results: rows of `results.parquet`.

    Returns:
        Columns scenario, strategy, main_cluster, split, cluster, run, seed, area (0 to 1; null where fewer than two loops have
        an F1, or the number of labels does not grow).

    Raises:
        SchemaError: a column is missing.
    """
    require_columns(results)
    rows = []
    groups = results.sort("loop").group_by([*_ARM, "run", "seed"], maintain_order=True)
    for key, group in groups:
        defined = group.drop_nulls("f1")
        rows.append((*key, _mean_height(defined["num_train"].to_numpy(), defined["f1"].to_numpy())))
    schema = {name: results.schema[name] for name in [*_ARM, "run", "seed"]} | {"area": pl.Float64()}
    return pl.DataFrame(rows, schema=schema, orient="row").sort([*_ARM, "run", "seed"])


def _mean_height(num_train: npt.NDArray[np.int32], f1: npt.NDArray[np.float64]) -> float | None:
    span = float(num_train[-1] - num_train[0]) if len(num_train) else 0.0
    return float(np.trapezoid(f1, num_train) / span) if span > 0 else None


def _mean_and_sd(values: dict[str, float | None]) -> str:
    mean, sd = values["mean_f1"], values["sd_f1"]
    if mean is None:
        return "undefined"
    return f"{mean:.3f}" if sd is None else f"{mean:.3f} ± {sd:.3f}"


def require_columns(results: pl.DataFrame) -> None:
    """Check that a frame has the columns of `RESULTS_SCHEMA`.

    Raises:
        SchemaError: one is missing.
    """
    missing = [name for name in RESULTS_SCHEMA.names if name not in results.columns]
    if missing:
        raise SchemaError(f"simulation results lack the columns {', '.join(missing)}: run `ctc-ray simulate` again")
