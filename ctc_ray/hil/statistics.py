"""Summaries of simulation results: mean and spread over runs, paired differences, area under the F1-vs-labels curve.

Every function takes the frame of `simulations/<name>/results.parquet` (columns of `RESULTS_SCHEMA`) and returns a tidy frame.
A sweep over several shares of wrong answers has the further column `flip_rate`; where it is there, it belongs to the arm, and every
result has it after `main_cluster`. An undefined F1 is null and is left out of a mean; `num_runs` and `num_pairs` say how many values
remain.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import polars as pl

from ctc_ray.errors import SchemaError
from ctc_ray.schema import FLIP_RATE as FLIP_RATE_FIELD
from ctc_ray.schema import RESULTS_SCHEMA

FLIP_RATE = FLIP_RATE_FIELD.name
"""Share of wrong answers of the simulated expert: a column of sweeps over several, absent where there was one."""
_PAPER_ORDER = ("cluster-f1", "random")


def setting_keys(frame: pl.DataFrame) -> list[str]:
    """Columns that say in which setting strategies are compared: scenario, main_cluster, and flip_rate where the frame has it."""
    return ["scenario", "main_cluster", *([FLIP_RATE] if FLIP_RATE in frame.columns else [])]


def arm_keys(frame: pl.DataFrame) -> list[str]:
    """Columns that name an arm: those of its setting and the strategy."""
    scenario, *rest = setting_keys(frame)
    return [scenario, "strategy", *rest]


def run_keys(frame: pl.DataFrame) -> list[str]:
    """Columns that name one run of an arm."""
    return [*arm_keys(frame), "run", "seed"]


def paper_order(strategies: Iterable[str]) -> list[str]:
    """Strategies in the order of tables and figures: the paper's two first, the others by name."""
    found = set(strategies)
    return [name for name in _PAPER_ORDER if name in found] + sorted(found - set(_PAPER_ORDER))


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
    keys = [*arm_keys(results), "split", "cluster", "loop"]
    return (
        results.group_by(keys)
        .agg(
            pl.col("num_train").median().round().cast(pl.Int32),
            pl.col("f1").mean().alias("mean_f1"),
            pl.col("f1").std(ddof=1).alias("sd_f1"),
            pl.col("f1").count().cast(pl.Int32).alias("num_runs"),
        )
        .select(*keys, "num_train", "mean_f1", "sd_f1", "num_runs")
        .sort(keys)
    )


def first_and_last(results: pl.DataFrame) -> pl.DataFrame:
    """Test F1 before the first loop and after the last one: the numbers of the paper's Table 1, tidy.

    Args:
        results: rows of `results.parquet`.

    Returns:
        Rows of `summarise` of loop 0 and of the last loop of each setting, without `split`.

    Raises:
        SchemaError: a column is missing.
    """
    summary = summarise(results).filter(pl.col("split") == "test").drop("split")
    last = pl.col("loop").max().over(setting_keys(results))
    return summary.filter((pl.col("loop") == 0) | (pl.col("loop") == last))


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
    return paper_layout(first_and_last(results))


def paper_layout(ends: pl.DataFrame) -> pl.DataFrame:
    """Rows of `first_and_last` as `table1` lays them out."""
    cells = ends.with_columns(
        moment=pl.when(pl.col("loop") == 0).then(pl.lit("init")).otherwise(pl.format("loop {}", pl.col("loop"))),
        text=pl.struct("mean_f1", "sd_f1").map_elements(_mean_and_sd, return_dtype=pl.String),
    )
    keys = [*setting_keys(ends), "cluster", "loop", "moment"]
    wide = cells.select(keys).unique()
    for strategy in paper_order(cells["strategy"].unique()):
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
    keys = [*setting_keys(results), "split", "cluster", "loop", "seed"]
    reference = results.filter(pl.col("strategy") == baseline).select(*keys, pl.col("f1").alias("baseline_f1"))
    if reference.is_empty():
        names = ", ".join(sorted(results["strategy"].unique()))
        raise SchemaError(f"no run of the baseline strategy {baseline!r} among the results ({names}): simulate it too")
    pairs = results.filter(pl.col("strategy") != baseline).join(reference, on=keys, how="inner", nulls_equal=True)
    difference = pl.col("f1") - pl.col("baseline_f1")
    found = [*arm_keys(results), "split", "cluster", "loop"]
    return (
        pairs.group_by(found)
        .agg(
            difference.mean().alias("mean_difference"),
            difference.std(ddof=1).alias("sd_difference"),
            difference.count().cast(pl.Int32).alias("num_pairs"),
            (difference > 0).sum().cast(pl.Int32).alias("num_better"),
        )
        .sort(found)
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
    keys = [*arm_keys(results), "split", "cluster", "run", "seed"]
    groups = results.sort("loop").group_by(keys, maintain_order=True)
    for key, group in groups:
        defined = group.drop_nulls("f1")
        rows.append((*key, _mean_height(defined["num_train"].to_numpy(), defined["f1"].to_numpy())))
    schema = {name: results.schema[name] for name in keys} | {"area": pl.Float64()}
    return pl.DataFrame(rows, schema=schema, orient="row").sort(keys)


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
