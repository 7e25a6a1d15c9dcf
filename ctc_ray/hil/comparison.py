"""Is one strategy better than another, and by how much: figures of each run, paired by seed, with intervals and tests.

Arms of one seed start from the same labels, so that differences are taken seed by seed. Every function takes the frame of
`simulations/<name>/results.parquet` (columns of `RESULTS_SCHEMA`, and `flip_rate` where there are several) or a frame of figures: columns
scenario, strategy, main_cluster, flip_rate (where the results have it), run, seed and `value`. Strategies are compared within one setting:
one scenario, main cluster and share of wrong answers.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import polars as pl

from ctc_ray.errors import SchemaError
from ctc_ray.hil.statistics import arm_keys, require_columns, run_keys, setting_keys

Floats = npt.NDArray[np.float64]
BASELINES: Final = ("random", "cluster-f1")
"""Strategies of the paper, which all others are compared with."""
_EXACT_PAIRS: Final = 16
"""Up to this many pairs all sign patterns are tried."""


def areas(results: pl.DataFrame) -> pl.DataFrame:
    """Mean height of each run's curve of test F1 over labels, all cells together, as `value`.

    Arms of one setting and seed are judged on the labels that all of them have: from the highest of their first numbers to the lowest
    of their last ones, on straight lines between loops. Where all arms draw alike this is each arm's own span. In `rare-positive` they
    do not, and an arm with more finds would else be judged on another range. An arm without a new label has no area (null), and does
    not narrow the span of the others.

    Args:
        results: rows of `results.parquet`.

    Returns:
        A frame of figures (0 to 1).

    Raises:
        SchemaError: a column is missing.
    """
    require_columns(results)
    return _mean_heights(_labelled(results))


def shared_labels(results: pl.DataFrame) -> pl.DataFrame:
    """The labels over which `areas` judges the arms of each setting and seed.

    Args:
        results: rows of `results.parquet`.

    Returns:
        Columns scenario, main_cluster, flip_rate (where the results have it), seed, `low` and `high` (labels; null where no arm has
        a new label). Sorted.

    Raises:
        SchemaError: a column is missing.
    """
    require_columns(results)
    keys = [*setting_keys(results), "seed"]
    spans = _spanned(_labelled(results)).select(*keys, "low", "high")
    return spans.unique().sort(keys)


def areas_over_minutes(results: pl.DataFrame, effort: pl.DataFrame) -> pl.DataFrame:
    """Mean height of each run's curve of test F1 over the expert's minutes, all cells together, as `value`.

    Minutes count from the first loop; the labels before it have cost nothing here. Arms of one setting and seed are judged on the
    minutes that all of them have, as in `areas`: the random arm of `rare-positive` looks far longer than the others.

    Args:
        results: rows of `results.parquet`.
        effort: rows of `effort.parquet` of the same simulation (columns of `EFFORT_SCHEMA`, and `flip_rate` as in the results).

    Returns:
        A frame of figures (0 to 1).

    Raises:
        SchemaError: a column is missing, or a loop of the results has no row in `effort`, or several.
    """
    require_columns(results)
    keys = [*run_keys(results), "loop"]
    missing = [name for name in [*keys, "minutes"] if name not in effort.columns]
    if missing:
        raise SchemaError(
            f"the effort of a simulation lacks the columns {', '.join(missing)}: run `ctc-ray simulate` again"
        )
    minutes = effort.select(*keys, pl.col("minutes").alias("at"))
    total = _total(results)
    curves = total.join(minutes, on=keys, how="left", nulls_equal=True)
    if curves.height != total.height:
        raise SchemaError(
            f"effort has several rows for one of {', '.join(keys)}: results and effort are of different simulations, run "
            "`ctc-ray simulate` again"
        )
    if curves["at"].null_count():
        row = curves.filter(pl.col("at").is_null()).row(0, named=True)
        raise SchemaError(
            f"effort has no minutes for {row['scenario']}, {row['strategy']}, seed {row['seed']}, loop {row['loop']}: results and effort "
            "are of different simulations, run `ctc-ray simulate` again"
        )
    return _mean_heights(curves)


def _total(results: pl.DataFrame) -> pl.DataFrame:
    """Test rows of all cells together."""
    return results.filter((pl.col("split") == "test") & pl.col("cluster").is_null())


def _labelled(results: pl.DataFrame) -> pl.DataFrame:
    """The same, with the number of labels as `at`."""
    return _total(results).with_columns(pl.col("num_train").cast(pl.Float64).alias("at"))


def _curves(points: pl.DataFrame) -> pl.DataFrame:
    """One row a run: lists `at` and `f1` of its loops in order, those without an F1 left out."""
    keys = run_keys(points)
    defined = pl.col("f1").is_not_null()
    lists = points.sort("loop").group_by(keys).agg(pl.col("at").filter(defined), pl.col("f1").filter(defined))
    return lists.sort(keys)


def _spanned(points: pl.DataFrame) -> pl.DataFrame:
    """Rows of `_curves` with `low` and `high`: the span that the arms of a setting and seed share; null where none grows."""
    first, last, shared = pl.col("at").list.first(), pl.col("at").list.last(), [*setting_keys(points), "seed"]
    curves = _curves(points).with_columns(grows=(last > first).fill_null(value=False))
    return curves.with_columns(
        low=pl.when("grows").then(first).max().over(shared), high=pl.when("grows").then(last).min().over(shared)
    )


def _mean_heights(points: pl.DataFrame) -> pl.DataFrame:
    """Mean height of F1 over `at` for each run, on the span that the arms of a setting and seed share."""
    curves = _spanned(points)
    values = [
        mean_height(np.array(at), np.array(f1), low, high) if grows and low < high else None
        for at, f1, grows, low, high in curves.select("at", "f1", "grows", "low", "high").iter_rows()
    ]
    return curves.select(*run_keys(points), pl.Series("value", values, pl.Float64))


def mean_height(at: Floats, f1: Floats, low: float, high: float) -> float:
    """Trapezoid area of a curve between two places, divided by their distance; linear between points.

    Args:
        at: (N,) places, never falling. Where points share a place, the curve jumps there; a jump at an end lies outside.
        f1: (N,) heights.
        low: where to begin, at least `at[0]`.
        high: where to end, above `low`, at most `at[-1]`.
    """
    first = int(np.searchsorted(at, low, side="right")) - 1
    last = int(np.searchsorted(at, high, side="left"))
    start = np.interp(low, at[first : first + 2], f1[first : first + 2])
    end = np.interp(high, at[last - 1 : last + 1], f1[last - 1 : last + 1])
    places = np.concatenate([[low], at[first + 1 : last], [high]])
    heights = np.concatenate([[start], f1[first + 1 : last], [end]])
    return float(np.trapezoid(heights, places) / (high - low))


def final_scores(results: pl.DataFrame) -> pl.DataFrame:
    """Test F1 of each run after its last loop, all cells together, as `value`."""
    require_columns(results)
    keys = run_keys(results)
    last = pl.col("loop") == pl.col("loop").max().over(keys)
    return _total(results).filter(last).select(*keys, pl.col("f1").alias("value")).sort(keys)


def worst_clusters(results: pl.DataFrame) -> pl.DataFrame:
    """Lowest test F1 of any cluster after each run's last loop, as `value`; background and undefined scores left out."""
    require_columns(results)
    keys = run_keys(results)
    clusters = results.filter((pl.col("split") == "test") & (pl.col("cluster") >= 0))
    last = clusters.filter(pl.col("loop") == pl.col("loop").max().over(keys))
    return last.group_by(keys).agg(pl.col("f1").min().alias("value")).sort(keys)


def labels_to_reach(results: pl.DataFrame, f1: float) -> pl.DataFrame:
    """Labels at which each run's curve of test F1 first reaches a height, all cells together.

    A mean of these numbers leaves out the runs that never got there, and so favours arms that seldom do: use `reach_summary`.

    Args:
        results: rows of `results.parquet`.
        f1: the height.

    Returns:
        A frame of figures; `value` in labels (float, interpolated between loops on a straight line; null where the curve never gets
        there).
    """
    require_columns(results)
    curves = _curves(_total(results).with_columns(pl.col("num_train").alias("at")))
    values = [_first_crossing(np.array(at), np.array(found), f1) for at, found in curves.select("at", "f1").iter_rows()]
    return curves.select(*run_keys(results), pl.Series("value", values, pl.Float64))


def reach_summary(reached: pl.DataFrame) -> pl.DataFrame:
    """How many runs of each arm got to a height, and how many labels a run needs in the middle.

    Args:
        reached: what `labels_to_reach` returned.

    Returns:
        Columns scenario, strategy, main_cluster, flip_rate (where `reached` has it), num_reached, num_runs, median (labels, over all
        runs, those that never got there counted as infinite; null where the median is infinite). Sorted by arm.

    Raises:
        SchemaError: a column is missing.
    """
    _require_figures(reached)
    keys = arm_keys(reached)
    median = pl.col("value").fill_null(float("inf")).median()
    return (
        reached.group_by(keys)
        .agg(
            pl.col("value").count().cast(pl.Int32).alias("num_reached"),
            pl.len().cast(pl.Int32).alias("num_runs"),
            median.alias("median"),
        )
        .with_columns(pl.when(pl.col("median").is_finite()).then(pl.col("median")).alias("median"))
        .sort(keys)
    )


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
        Columns scenario, main_cluster, flip_rate (where the figures have it), strategy, baseline, num_pairs, mean_difference, low and
        high (95 % percentile bootstrap interval of the mean of paired differences), p_value (two-sided sign-flip permutation test),
        num_better, p_holm (the p value corrected by Holm for the number of strategies compared in the setting). One pair gives no
        interval and no test: null.

    Raises:
        SchemaError: a column is missing, or no run has the baseline.

    Source: Efron and Tibshirani (1993), chapter 13; sign-flip test of Fisher (1935); Holm (1979).
    """
    _require_figures(figures)
    setting = setting_keys(figures)
    group = [*setting, "seed"]
    reference = figures.filter(pl.col("strategy") == baseline).select(*group, pl.col("value").alias("baseline_value"))
    if reference.is_empty():
        names = ", ".join(sorted(figures["strategy"].unique()))
        raise SchemaError(f"no run of the baseline strategy {baseline!r} among the results ({names}): simulate it too")
    others = figures.filter(pl.col("strategy") != baseline)
    pairs = others.join(reference, on=group, how="inner", nulls_equal=True).drop_nulls(["value", "baseline_value"])
    rows = []
    for key, rows_of in pairs.sort("seed").group_by([*setting, "strategy"], maintain_order=True):
        difference = (rows_of["value"] - rows_of["baseline_value"]).to_numpy()
        rows.append((*key, baseline, *_compared(difference, resamples, seed)))
    schema = {
        **{name: figures.schema[name] for name in [*setting, "strategy"]},
        **{"baseline": pl.String(), "num_pairs": pl.Int32(), "mean_difference": pl.Float64()},
        **dict.fromkeys(("low", "high", "p_value"), pl.Float64()),
        "num_better": pl.Int32(),
    }
    table = pl.DataFrame(rows, schema=schema, orient="row")
    corrected = [_with_holm(part) for _, part in table.group_by(setting, maintain_order=True)]
    empty = table.with_columns(pl.lit(None, pl.Float64()).alias("p_holm"))
    return (pl.concat(corrected) if corrected else empty).sort(
        [*setting, "mean_difference"], descending=[*(False for _ in setting), True]
    )


def _require_figures(figures: pl.DataFrame) -> None:
    missing = [name for name in [*run_keys(figures), "value"] if name not in figures.columns]
    if missing:
        raise SchemaError(f"figures lack the columns {', '.join(missing)}")


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
