"""Is one strategy better than another, and by how much: figures of each run, paired by seed, with intervals and tests.

Arms of one seed start from the same labels, so that differences are taken seed by seed. Every function takes the frame of
`simulations/<name>/results.parquet` (columns of `RESULTS_SCHEMA`) or a frame of figures: columns scenario, strategy, main_cluster, run,
seed and `value`.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import polars as pl

from ctc_ray.errors import SchemaError
from ctc_ray.hil.statistics import area_under_curve, require_columns

Floats = npt.NDArray[np.float64]
_RUN: Final = ["scenario", "strategy", "main_cluster", "run", "seed"]
_EXACT_PAIRS: Final = 16
"""Up to this many pairs all sign patterns are tried."""


def areas(results: pl.DataFrame) -> pl.DataFrame:
    """Mean height of each run's curve of test F1 over labels, all cells together, as `value`."""
    found = area_under_curve(results).filter((pl.col("split") == "test") & pl.col("cluster").is_null())
    return found.select(*_RUN, pl.col("area").alias("value"))


def final_scores(results: pl.DataFrame) -> pl.DataFrame:
    """Test F1 of each run after its last loop, all cells together, as `value`."""
    require_columns(results)
    total = results.filter((pl.col("split") == "test") & pl.col("cluster").is_null())
    last = pl.col("loop") == pl.col("loop").max().over(_RUN)
    return total.filter(last).select(*_RUN, pl.col("f1").alias("value")).sort(_RUN)


def worst_clusters(results: pl.DataFrame) -> pl.DataFrame:
    """Lowest test F1 of any cluster after each run's last loop, as `value`; background and undefined scores left out."""
    require_columns(results)
    clusters = results.filter((pl.col("split") == "test") & (pl.col("cluster") >= 0))
    last = clusters.filter(pl.col("loop") == pl.col("loop").max().over(_RUN))
    return last.group_by(_RUN).agg(pl.col("f1").min().alias("value")).sort(_RUN)


def labels_to_reach(results: pl.DataFrame, f1: float) -> pl.DataFrame:
    """Labels at which each run's curve of test F1 first reaches a height, all cells together.

    Args:
        results: rows of `results.parquet`.
        f1: the height.

    Returns:
        Columns scenario, strategy, main_cluster, run, seed, `value` (float labels, interpolated between loops on a straight
        line; null where the curve never gets there).
    """
    require_columns(results)
    total = results.filter((pl.col("split") == "test") & pl.col("cluster").is_null()).drop_nulls("f1")
    rows = []
    for key, group in total.sort("loop").group_by(_RUN, maintain_order=True):
        rows.append((*key, _first_crossing(group["num_train"].to_numpy(), group["f1"].to_numpy(), f1)))
    schema = {name: results.schema[name] for name in _RUN} | {"value": pl.Float64()}
    return pl.DataFrame(rows, schema=schema, orient="row").sort(_RUN)


def _first_crossing(labels: npt.NDArray[np.int32], heights: Floats, wanted: float) -> float | None:
    above = np.flatnonzero(heights >= wanted)
    if len(above) == 0:
        return None
    first = int(above[0])
    if first == 0:
        return float(labels[0])
    rise = (wanted - heights[first - 1]) / (heights[first] - heights[first - 1])
    return float(labels[first - 1] + rise * (labels[first] - labels[first - 1]))


def compare(figures: pl.DataFrame, baseline: str, *, resamples: int = 10_000, seed: int = 0) -> pl.DataFrame:
    """Compare every strategy with one, seed by seed.

    Args:
        figures: one `value` a run; undefined ones are left out with their pairs.
        baseline: strategy to compare with.
        resamples: draws of the bootstrap, and of sign patterns where there are too many to try all.
        seed: of these draws.

    Returns:
        Columns scenario, main_cluster, strategy, baseline, num_pairs, mean_difference, low and high (95 % percentile bootstrap
        interval of the mean of paired differences), p_value (two-sided sign-flip permutation test), p_holm (the same, corrected by
        Holm for the number of strategies compared in the scenario), num_better. One pair gives no interval and no test: null.

    Raises:
        SchemaError: a column is missing, or no run has the baseline.

    Source: Efron and Tibshirani (1993), chapter 13; sign-flip test of Fisher (1935); Holm (1979).
    """
    missing = [name for name in [*_RUN, "value"] if name not in figures.columns]
    if missing:
        raise SchemaError(f"figures lack the columns {', '.join(missing)}")
    group = ["scenario", "main_cluster", "seed"]
    reference = figures.filter(pl.col("strategy") == baseline).select(*group, pl.col("value").alias("baseline_value"))
    if reference.is_empty():
        names = ", ".join(sorted(figures["strategy"].unique()))
        raise SchemaError(f"no run of the baseline strategy {baseline!r} among the results ({names}): simulate it too")
    others = figures.filter(pl.col("strategy") != baseline)
    pairs = others.join(reference, on=group, how="inner", nulls_equal=True).drop_nulls(["value", "baseline_value"])
    rows = []
    for key, rows_of in pairs.sort("seed").group_by(["scenario", "main_cluster", "strategy"], maintain_order=True):
        difference = (rows_of["value"] - rows_of["baseline_value"]).to_numpy()
        rows.append((*key, baseline, *_compared(difference, resamples, seed)))
    schema = {
        **{name: figures.schema[name] for name in ("scenario", "main_cluster", "strategy")},
        **{"baseline": pl.String(), "num_pairs": pl.Int32(), "mean_difference": pl.Float64()},
        **dict.fromkeys(("low", "high", "p_value"), pl.Float64()),
        "num_better": pl.Int32(),
    }
    table = pl.DataFrame(rows, schema=schema, orient="row")
    corrected = [_with_holm(part) for _, part in table.group_by(["scenario", "main_cluster"], maintain_order=True)]
    order = ["scenario", "main_cluster", "mean_difference"]
    empty = table.with_columns(pl.lit(None, pl.Float64()).alias("p_holm"))
    return (pl.concat(corrected) if corrected else empty).sort(order, descending=[False, False, True])


def _compared(
    difference: Floats, resamples: int, seed: int
) -> tuple[int, float, float | None, float | None, float | None, int]:
    num, mean = len(difference), float(difference.mean())
    better = int((difference > 0).sum())
    if num < 2:
        return num, mean, None, None, None, better
    rng = np.random.default_rng([seed, num])
    means = difference[rng.integers(num, size=(resamples, num))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return num, mean, float(low), float(high), sign_flip_p(difference, resamples, rng), better


def sign_flip_p(difference: Floats, resamples: int, rng: np.random.Generator) -> float:
    """Two-sided chance of a mean difference at least as far from zero, were every difference as likely to have the other sign.

    Args:
        difference: (N,) paired differences.
        resamples: sign patterns to draw where N is above 16; below, all 2^N are tried.
        rng: for these draws.
    """
    num = len(difference)
    if num <= _EXACT_PAIRS:
        bits = (np.arange(2**num)[:, None] >> np.arange(num)) & 1
        extreme = np.abs((1 - 2 * bits) @ difference) >= np.abs(difference.sum()) - 1e-12
        return float(extreme.mean())
    signs = rng.integers(0, 2, size=(resamples, num)) * 2 - 1
    extreme = np.abs(signs @ difference) >= np.abs(difference.sum()) - 1e-12
    return float((extreme.sum() + 1) / (resamples + 1))


def holm(p_values: Floats) -> Floats:
    """Holm's corrected p values (N,), in the order given."""
    order = np.argsort(p_values, kind="stable")
    stepped = np.maximum.accumulate(p_values[order] * np.arange(len(order), 0, -1))
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected


def _with_holm(part: pl.DataFrame) -> pl.DataFrame:
    tested = part["p_value"].is_not_null().to_numpy()
    corrected = np.full(part.height, np.nan)
    corrected[tested] = holm(part["p_value"].drop_nulls().to_numpy())
    return part.with_columns(pl.Series("p_holm", corrected).fill_nan(None))
