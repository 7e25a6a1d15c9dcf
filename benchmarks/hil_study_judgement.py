"""Figures of the study of strategies: means, paired comparisons, gains by number of labels, and the recommendation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import polars as pl

from ctc_ray.hil.comparison import (
    BASELINES,
    areas,
    compare,
    final_scores,
    labels_to_reach,
    reach_summary,
    worst_clusters,
)

CHOSEN_ON = ("phantom", "jurkat")
FIGURES: dict[str, Callable[[pl.DataFrame], pl.DataFrame]] = {
    "area": areas,
    "final_f1": final_scores,
    "worst_cluster_f1": worst_clusters,
}


def judge(results: pl.DataFrame) -> dict[str, Any]:
    """Judge all strategies on one data set.

    Args:
        results: test rows of all runs, columns of `RESULTS_SCHEMA`.

    Returns:
        random_end_f1; means (figure -> strategy -> mean, sd, runs); area_against and worst_against (baseline -> rows of `compare`);
        reached (strategy -> how many runs reach what `random` reaches on average at the end, and the median of the labels they need,
        null where fewer than half do); by_labels (strategy -> gain of F1 over `random` at each number of labels).
    """
    figures = {name: make(results) for name, make in FIGURES.items()}
    random_end = float(figures["final_f1"].filter(pl.col("strategy") == "random")["value"].mean() or 0.0)
    return {
        "random_end_f1": random_end,
        "means": {name: _means(figure) for name, figure in figures.items()},
        "area_against": {base: compare(figures["area"], base).to_dicts() for base in BASELINES},
        "worst_against": {base: compare(figures["worst_cluster_f1"], base).to_dicts() for base in BASELINES},
        "reached": _reached(labels_to_reach(results, random_end)),
        "by_labels": _by_labels(results),
    }


def _means(figure: pl.DataFrame) -> dict[str, dict[str, float | int | None]]:
    """Mean, standard deviation and number of runs of each strategy."""
    summary = figure.group_by("strategy").agg(
        pl.col("value").mean().alias("mean"), pl.col("value").std().alias("sd"), pl.col("value").count().alias("runs")
    )
    return {row.pop("strategy"): row for row in summary.sort("strategy").to_dicts()}


def _reached(labels: pl.DataFrame) -> dict[str, dict[str, float | int | None]]:
    """`reach_summary` by strategy."""
    return {
        row["strategy"]: {"runs": row["num_runs"], "reached": row["num_reached"], "median_labels": row["median"]}
        for row in reach_summary(labels).to_dicts()
    }


def _by_labels(results: pl.DataFrame) -> dict[str, list[dict[str, Any]]]:
    """Mean gain of F1 over `random` after each loop, with its interval."""
    total = results.filter(pl.col("cluster").is_null()).rename({"f1": "value"})
    found: dict[str, list[dict[str, Any]]] = {}
    for (labels,), group in total.sort("num_train").group_by("num_train", maintain_order=True):
        for row in compare(group, "random").to_dicts():
            gain = {name: row[name] for name in ("mean_difference", "low", "high")}
            found.setdefault(row["strategy"], []).append({"labels": labels, **gain})
    return found


def recommend(judged: dict[str, Any]) -> dict[str, Any]:
    """The recommendation by the rule of `benchmarks/hil_study.py`, on clean answers."""
    gains: dict[str, list[float]] = {}
    refused: dict[str, str] = {}
    for data in CHOSEN_ON:
        for base in BASELINES:
            for row in judged[f"{data} 0.00"]["area_against"][base]:
                if row["high"] < 0:
                    refused[row["strategy"]] = f"worse than {base} on {data}"
                if base == "random":
                    gains.setdefault(row["strategy"], []).append(row["mean_difference"])
    ranked = sorted(((sum(found) / len(found), name) for name, found in gains.items()), reverse=True)
    allowed = [(gain, name) for gain, name in ranked if name not in refused and name not in BASELINES]
    return {"recommended": allowed[0][1] if allowed else None, "mean_gain": ranked, "refused": refused}
