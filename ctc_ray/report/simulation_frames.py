"""Tidy frames of a simulation: learning curves, Table 1, and what strategies gain over the two of the paper."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from ctc_ray.hil.comparison import (
    BASELINES,
    areas,
    areas_over_minutes,
    compare,
    final_scores,
    labels_to_reach,
    reach_summary,
    shared_labels,
    worst_clusters,
)
from ctc_ray.hil.statistics import FLIP_RATE, arm_keys, first_and_last, run_keys, setting_keys, summarise

SEEDS_NEEDED = 20
"""Below so many runs an arm, a page says that its intervals are from few."""
_TESTED = ("mean_difference", "low", "high", "p_holm", "num_pairs")


@dataclass(frozen=True)
class SimulationFrames:
    """What the figures and tables of a simulation are drawn from.

    Attributes:
        curves: test rows of `summarise` (the paper's Figure 3).
        table1: `first_and_last` (the paper's Table 1).
        comparison: `comparison_frame`.
    """

    curves: pl.DataFrame
    table1: pl.DataFrame
    comparison: pl.DataFrame


def simulation_frames(results: pl.DataFrame, effort: pl.DataFrame | None) -> SimulationFrames:
    """All frames of a simulation.

    Args:
        results: rows of `results.parquet`.
        effort: rows of `effort.parquet`; None for a simulation that has none, whose minutes are then unknown.

    Raises:
        SchemaError: a column is missing, or the two are of different simulations.
    """
    curves = summarise(results).filter(pl.col("split") == "test")
    return SimulationFrames(curves, first_and_last(results), comparison_frame(results, effort))


def comparison_frame(results: pl.DataFrame, effort: pl.DataFrame | None) -> pl.DataFrame:
    """One row an arm: its figures over runs, and its differences to the baselines, seed by seed.

    Args:
        results: rows of `results.parquet`.
        effort: rows of `effort.parquet`; None leaves the columns of minutes null.

    Returns:
        Columns of the arm (`arm_keys`), num_runs; shared_labels (how many labels the areas of the setting span, median over seeds);
        mean and sd (`_sd`) of `area` (mean height of test F1 over labels), `final_f1`, `worst_cluster_f1` and `minutes_area`;
        `reach_f1` (mean F1 of random after its last loop), num_reached, median_labels; and for each of `area_vs_random`,
        `area_vs_cluster_f1`, `minutes_area_vs_random`: the mean difference under that name, and `_low`, `_high` (95 % interval),
        `_p_holm`, `_num_pairs`. Null where undefined, or where the baseline was not run. The settings in order, the largest area
        first.

    Raises:
        SchemaError: a column is missing, or the two frames are of different simulations.
    """
    keys = arm_keys(results)
    over_labels = areas(results)
    over_minutes = over_labels.with_columns(value=pl.lit(None, pl.Float64))
    if effort is not None:
        over_minutes = areas_over_minutes(results, effort)
    table = results.group_by(keys).agg(pl.struct(run_keys(results)).n_unique().cast(pl.Int32).alias("num_runs"))
    figures = {
        "area": over_labels,
        "final_f1": final_scores(results),
        "worst_cluster_f1": worst_clusters(results),
        "minutes_area": over_minutes,
    }
    spans = (
        shared_labels(results)
        .group_by(setting_keys(results))
        .agg(shared_labels=(pl.col("high") - pl.col("low")).median())
    )
    table = table.join(spans, on=setting_keys(results), how="left", nulls_equal=True)
    parts = [_mean_and_sd(figure, name) for name, figure in figures.items()]
    parts.append(_reached(results, figures["final_f1"]))
    parts += [_differences(over_labels, baseline, f"area_vs_{baseline.replace('-', '_')}") for baseline in BASELINES]
    parts.append(_differences(over_minutes, "random", "minutes_area_vs_random"))
    for part in parts:
        table = table.join(part, on=keys, how="left", nulls_equal=True)
    setting = setting_keys(results)
    order = [*setting, "area", "strategy"]
    falls = [name == "area" for name in order]
    return table.sort(order, descending=falls, nulls_last=falls)


def _mean_and_sd(figures: pl.DataFrame, name: str) -> pl.DataFrame:
    value = pl.col("value")
    return figures.group_by(arm_keys(figures)).agg(value.mean().alias(name), value.std(ddof=1).alias(f"{name}_sd"))


def _reached(results: pl.DataFrame, finals: pl.DataFrame) -> pl.DataFrame:
    """How each arm gets to the F1 that random has at the end of the same setting."""
    parts = []
    for setting, rows in settings_of(results):
        ends = one_setting(finals, setting).filter(pl.col("strategy") == "random")["value"].drop_nulls()
        height = float(ends.to_numpy().mean()) if len(ends) else None
        counted = reach_summary(labels_to_reach(rows, 2.0 if height is None else height))
        known = pl.lit(height is not None)
        parts.append(
            counted.select(
                *arm_keys(counted),
                pl.lit(height, pl.Float64).alias("reach_f1"),
                pl.when(known).then(pl.col("num_reached")).alias("num_reached"),
                pl.col("median").alias("median_labels"),
            )
        )
    return pl.concat(parts)


def _differences(figures: pl.DataFrame, baseline: str, name: str) -> pl.DataFrame:
    keys = arm_keys(figures)
    new = {source: name if source == "mean_difference" else f"{name}_{source}" for source in _TESTED}
    if baseline not in figures["strategy"]:
        kinds = {column: pl.Int32() if column.endswith("num_pairs") else pl.Float64() for column in new.values()}
        return figures.select(keys).unique().with_columns(pl.lit(None, kind).alias(c) for c, kind in kinds.items())
    return compare(figures, baseline).select(*keys, *(pl.col(source).alias(column) for source, column in new.items()))


Setting = Mapping[str, Any]
"""Value of each of `setting_keys`."""


def settings_of(frame: pl.DataFrame) -> Iterator[tuple[Setting, pl.DataFrame]]:
    """The settings of a frame in order (no main cluster first, fewest wrong answers first), each with its rows."""
    keys = setting_keys(frame)
    for row in frame.select(keys).unique().sort(keys).iter_rows(named=True):
        yield row, one_setting(frame, row)


def one_setting(frame: pl.DataFrame, setting: Setting) -> pl.DataFrame:
    """Rows of one setting."""
    return frame.filter(
        pl.all_horizontal(pl.col(name).eq_missing(pl.lit(value, frame.schema[name])) for name, value in setting.items())
    )


def setting_name(setting: Setting) -> str:
    """How the page calls a setting: `limited-local, main cluster 2, 5 % wrong answers`."""
    parts = [str(setting["scenario"])]
    if setting["main_cluster"] is not None:
        parts.append(f"main cluster {setting['main_cluster']}")
    if setting.get(FLIP_RATE) is not None:
        parts.append(f"{percent(setting[FLIP_RATE])} wrong answers")
    return ", ".join(parts)


def percent(share: float) -> str:
    """`5 %` for 0.05."""
    return f"{100 * share:.4g} %"
