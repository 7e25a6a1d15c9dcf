"""Which arms of a sweep are not worth more seeds: those that are clearly behind the best arm of their setting."""

from __future__ import annotations

import polars as pl

from ctc_ray.hil.comparison import BASELINES, areas, compare
from ctc_ray.hil.loop import Trial
from ctc_ray.hil.statistics import setting_keys

SIGNIFICANCE = 0.01
Arm = tuple[str, str, int | None, float | None]
"""Scenario, strategy, main cluster, share of wrong answers."""


def hopeless_arms(results: pl.DataFrame) -> set[Arm]:
    """Arms whose area under the F1-vs-labels curve is significantly below that of the best arm of their setting.

    The baselines are never among them, since every other arm is compared with them. The best arm is the one with the highest mean so
    far. An arm is behind where the sign-flip test of paired differences, corrected by Holm, is below `SIGNIFICANCE`, which takes some
    twelve seeds.

    Args:
        results: rows of the runs so far: columns of `RESULTS_SCHEMA`, and `flip_rate` where there are several.

    Returns:
        The arms; the share of wrong answers is None where there is one share.
    """
    keys = setting_keys(results)
    figures = areas(results)
    found: set[Arm] = set()
    for setting, own in figures.group_by(keys, maintain_order=True):
        means = own.group_by("strategy").agg(pl.col("value").mean()).drop_nulls().sort("value", "strategy")
        if means.height < 2:
            continue
        compared = compare(own, str(means["strategy"][-1]))
        behind = compared.filter((pl.col("mean_difference") < 0) & (pl.col("p_holm") < SIGNIFICANCE))
        scenario, main_cluster, *rest = setting
        for strategy in behind["strategy"]:
            if strategy not in BASELINES:
                found.add((scenario, strategy, main_cluster, rest[0] if rest else None))
    return found


def is_hopeless(trial: Trial, arms: set[Arm]) -> bool:
    """Whether a trial belongs to one of the arms that `hopeless_arms` found."""
    arm = (trial.scenario, trial.strategy, trial.main_cluster)
    return (*arm, trial.flip_rate) in arms or (*arm, None) in arms
