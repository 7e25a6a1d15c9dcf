"""Sections of a simulation, on its own page and in the report of a cohort: Figure 3, Table 1, comparisons of strategies."""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np
import polars as pl

from ctc_ray.hil.comparison import BASELINES
from ctc_ray.hil.statistics import FLIP_RATE, paper_layout, paper_order
from ctc_ray.report.curves import f1_panel, highlighted, key_lines, panels_of
from ctc_ray.report.figures import cluster_name
from ctc_ray.report.forest import SIGNIFICANT, forest_plot, interval, signed
from ctc_ray.report.markup import Column, Section, count, fraction, missing, note, plural, table, words
from ctc_ray.report.simulation_frames import (
    SEEDS_NEEDED,
    Setting,
    SimulationFrames,
    one_setting,
    percent,
    setting_name,
    settings_of,
)

_PAPER_COLUMNS = 4
"""Up to so many strategies Table 1 has a column a strategy, as in the paper; with more, a row a strategy."""


def learning_curves(frames: SimulationFrames | None, command: str) -> Section:
    """F1 against labelling loops per strategy (the paper's Figure 3); `command` is named where nothing was simulated."""
    title = "Labelling strategies"
    if frames is None or frames.curves.is_empty():
        return Section("strategies", title, missing("Simulation", command))
    order = paper_order(frames.curves["strategy"].unique())
    runs = frames.comparison["num_runs"]
    number = f"{'' if runs.n_unique() == 1 else 'up to '}{plural(runs.max(), 'run')}"
    parts = [
        note(
            f"F1 of the test set after each loop of labelling: mean and standard deviation of {number}. Below each loop stands the "
            "number of labels. The scale differs between panels."
        )
    ]
    for setting, rows in settings_of(frames.curves):
        shown = [name for name in order if name in set(rows["strategy"])]
        chosen = highlighted(shown, one_setting(frames.comparison, setting))
        panels = "".join(
            f"<figure><figcaption>{escape(name)}</figcaption>{f1_panel(own, name, order, chosen)}</figure>"
            for name, own in panels_of(rows)
        )
        body = f'<div class="curves">{key_lines(order, shown, chosen)}<div class="panels">{panels}</div></div>'
        parts.append(_block(setting, body, frames.curves))
    return Section("strategies", title, "".join(parts))


def _block(setting: Setting, body: str, frame: pl.DataFrame) -> str:
    """A setting with its heading; those with more wrong answers than the least are folded."""
    name = escape(setting_name(setting))
    rate = setting.get(FLIP_RATE)
    if rate is None or rate == frame[FLIP_RATE].min():
        return f"<h3>{name}</h3>{body}"
    return f"<details><summary>{name}</summary>{body}</details>"


def table1(frames: SimulationFrames | None, command: str) -> Section:
    """First and last loop per cluster and strategy (the paper's Table 1); `command` is named where nothing was simulated."""
    title = "First and last loop"
    if frames is None or frames.table1.is_empty():
        return Section("table1", title, missing("Simulation", command))
    parts = []
    for setting, rows in settings_of(frames.table1):
        caption = f"{setting_name(setting)}: F1, mean ± standard deviation over runs (the paper's Table 1)"
        strategies = paper_order(rows["strategy"].unique())
        drawn = _clusters_as_rows(rows, strategies, caption)
        if len(strategies) > _PAPER_COLUMNS:
            drawn = _strategies_as_rows(rows, strategies, caption)
        parts.append(_block(setting, drawn, frames.table1))
    return Section("table1", title, "".join(parts))


def _clusters_as_rows(rows: pl.DataFrame, strategies: list[str], caption: str) -> str:
    columns = [
        Column("cluster", "F1", cluster_name, is_number=False),
        Column("moment", "Moment", words, is_number=False),
        *(Column(name, name, words) for name in strategies),
    ]
    return table(paper_layout(rows), columns, caption)


def _strategies_as_rows(rows: pl.DataFrame, strategies: list[str], caption: str) -> str:
    """A row a strategy and moment; the first loop once where all share it, as arms of the same seeds do."""
    wide = paper_layout(rows)
    clusters = wide["cluster"].unique().sort(nulls_last=False).to_list()
    texts = {
        (row["cluster"], row["moment"], name): row[name] for row in wide.iter_rows(named=True) for name in strategies
    }
    init, *last = wide["moment"].unique(maintain_order=True).to_list()
    shared = len({tuple(texts.get((c, init, name)) for c in clusters) for name in strategies}) == 1
    arms = [(f"{init}, all strategies", strategies[0], init)] if shared else []
    for moment in last if shared else (init, *last):
        arms += [(name if shared else f"{name}, {moment}", name, moment) for name in strategies]
    if shared and last:
        caption += f". First row: before the first loop; the others: after {last[-1]}"
    names = [cluster_name(cluster) for cluster in clusters]
    frame = pl.DataFrame(
        [(head, *(texts.get((c, moment, name)) for c in clusters)) for head, name, moment in arms],
        schema=dict.fromkeys(["arm", *names], pl.String()),
        orient="row",
    )
    columns = [Column("arm", "F1", words, is_number=False), *(Column(name, name, words) for name in names)]
    return table(frame, columns, caption, dense=True)


def comparison(frames: SimulationFrames | None, command: str) -> Section:
    """Which strategy is better, by how much, and how sure that is; `command` is named where nothing was simulated."""
    title = "Comparison of strategies"
    if frames is None or frames.comparison.is_empty():
        return Section("comparison", title, missing("Simulation", command))
    parts = [
        note(
            "Area: mean height of a run's curve of test F1 over labels, over the labels that all arms with the same seed have; over "
            "minutes likewise. Differences are taken seed by seed: mean, 95 % bootstrap interval, and p of a sign-flip test, corrected "
            "by Holm for the strategies of the table. Worst cluster: its test F1 after the last loop, whichever it is, without "
            "background. Labels: the median over all runs, those that never got there counted as infinite (a dash)."
        ),
        _seeds_note(frames.comparison),
    ]
    for setting, rows in settings_of(frames.comparison):
        parts.append(_block(setting, _comparison_table(rows, setting) + _forests(rows, setting), frames.comparison))
    return Section("comparison", title, "".join(parts) + _robustness(frames.comparison))


def _seeds_note(rows: pl.DataFrame) -> str:
    runs = rows["num_runs"].to_numpy()
    fewest, most = int(runs.min()), int(runs.max())
    html = ""
    if fewest < most:
        html = note(
            "Some strategies have fewer runs: their means are of fewer seeds, while differences are taken over the seeds of both."
        )
    if fewest >= SEEDS_NEEDED:
        return html
    least = 2 / 2**fewest
    least_p = f" With {fewest} pairs no p value can be below {least:.3g}." if fewest > 1 and least > 0.01 else ""
    seeds = plural(fewest, "seed") if fewest == most else f"{fewest} to {most} seeds"
    return html + (
        f'<p class="missing">Intervals and tests are from {seeds}; {SEEDS_NEEDED} or more are needed for a comparison.{least_p} '
        f"<code>--seeds {SEEDS_NEEDED}</code></p>"
    )


def _comparison_table(rows: pl.DataFrame, setting: Setting) -> str:
    """Figures over labels; those over minutes in a table of their own where they say something else."""
    written = pl.DataFrame(_written(rows), infer_schema_length=None)
    head = Column("strategy", "Strategy", words, is_number=False)
    differ = rows["num_runs"].n_unique() > 1
    columns = [
        head,
        *([Column("num_runs", "Runs", count)] if differ else []),
        Column("area", "Area over labels", words),
        Column("area_vs_random", "minus random's", words),
        Column("area_vs_random_p", "p", words),
        Column("area_vs_cluster_f1", "minus cluster-f1's", words),
        Column("area_vs_cluster_f1_p", "p", words),
        Column("final_f1", "F1 at the end", words),
        Column("worst_cluster_f1", "Worst cluster", words),
        Column("reached", "Runs that reach it", words),
        Column("median_labels", "Labels for it", _rounded),
    ]
    runs = "" if differ else f", {plural(rows['num_runs'][0], 'run')} each"
    span = rows["shared_labels"][0]
    over = "" if span is None else f" over the {plural(round(span), 'label')} that the arms of a seed share"
    caption = f"{setting_name(setting)}: strategies by area{over}{runs}."
    target = rows["reach_f1"].drop_nulls()
    if len(target):
        caption += f" Random ends at F1 {fraction(target[0])}: runs that reach it, and the labels for it, those at the start included."
    if rows["minutes_area"].null_count() < rows.height and not _minutes_differ(rows):
        caption += " Every label costs the same time, so that the area over minutes is that over labels."
    html = table(written, columns, caption, dense=True)
    if _minutes_differ(rows):
        minutes = [
            head,
            Column("minutes_area", "Area over minutes", words),
            Column("minutes_area_vs_random", "minus random's", words),
            Column("minutes_area_vs_random_p", "p", words),
        ]
        title = f"{setting_name(setting)}: the same runs over the expert's minutes."
        html += table(written.sort("minutes_area_order", descending=True, nulls_last=True), minutes, title, dense=True)
    return html


def _minutes_differ(rows: pl.DataFrame) -> bool:
    gap = (rows["minutes_area"] - rows["area"]).abs().drop_nulls().to_numpy()
    return bool((gap > 1e-9).any())


def _written(rows: pl.DataFrame) -> list[dict[str, Any]]:
    """Rows of `comparison_frame` as the tables show them."""
    decimals = {name: _decimals(rows[name]) for name in _DIFFERENCES}
    lines = []
    for row in rows.iter_rows(named=True):
        text = {name: mean_and_sd(row[name], row[f"{name}_sd"]) for name in _MEANS}
        for name in _DIFFERENCES:
            text[name] = difference(row, name, decimals[name])
            text[f"{name}_p"] = p_value(row[f"{name}_p_holm"])
        reached = "–" if row["num_reached"] is None else f"{row['num_reached']} of {row['num_runs']}"
        plain = {name: row[name] for name in ("strategy", "num_runs", "median_labels")}
        lines.append(plain | text | {"reached": reached, "minutes_area_order": row["minutes_area"]})
    return lines


def _decimals(values: pl.Series) -> int:
    """Decimals that give the largest difference two digits, at least four."""
    largest = float(np.max(np.abs(values.drop_nulls().to_numpy()), initial=0.0))
    return max(4, 1 - int(np.floor(np.log10(largest)))) if largest > 0 else 4


_MEANS = ("area", "final_f1", "worst_cluster_f1", "minutes_area")
_DIFFERENCES = ("area_vs_random", "area_vs_cluster_f1", "minutes_area_vs_random")


def _rounded(value: float | None) -> str:
    return count(None if value is None else round(value))


def mean_and_sd(mean: float | None, sd: float | None) -> str:
    """`0.874 ± 0.008`; a dash where undefined, no spread of a single run."""
    return fraction(mean) if mean is None or sd is None else f"{mean:.3f} ± {sd:.3f}"


def difference(row: dict[str, Any], name: str, decimals: int = 4) -> str:
    """Mean difference and interval of a row of `comparison_frame`; the pairs where some runs have none."""
    if row[name] is None:
        return "–"
    pairs = "" if row[f"{name}_num_pairs"] == row["num_runs"] else f" ({row[f'{name}_num_pairs']} pairs)"
    return signed(row[name], decimals) + interval(row[f"{name}_low"], row[f"{name}_high"], decimals) + pairs


def p_value(value: float | None) -> str:
    """Three decimals; a dash where there is no test."""
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _forests(rows: pl.DataFrame, setting: Setting) -> str:
    """An interval plot against each baseline, and over minutes where that says something else than over labels."""
    plots = [(f"area_vs_{name.replace('-', '_')}", f"Area over labels minus {name}'s") for name in BASELINES]
    if _minutes_differ(rows):
        plots.append(("minutes_area_vs_random", "Area over minutes minus random's"))
    drawn = [
        f"<figure><figcaption>{escape(title)}</figcaption>{forest_plot(rows, name, f'{setting_name(setting)}: {title}')}</figure>"
        for name, title in plots
        if rows[name].drop_nulls().len()
    ]
    if not drawn:
        return ""
    text = f"Points: mean over seeds; lines: 95 % intervals; filled: corrected p below {SIGNIFICANT:g}."
    return f'<div class="panels forests">{"".join(drawn)}</div>{note(text)}'


def _robustness(rows: pl.DataFrame) -> str:
    """Area at each share of wrong answers, and what the largest share costs."""
    if FLIP_RATE not in rows.columns or rows[FLIP_RATE].n_unique() < 2:
        return ""
    parts = ["<h3>Robustness to wrong answers</h3>"]
    for group, own in settings_of(rows.rename({FLIP_RATE: "share"})):
        rates = own["share"].unique().sort().to_list()
        names = [f"at {percent(rate)}" for rate in rates]
        lines = []
        for (strategy,), arm in own.group_by(["strategy"], maintain_order=True):
            found = {row["share"]: row for row in arm.iter_rows(named=True)}
            texts = {
                name: mean_and_sd(found[rate]["area"], found[rate]["area_sd"]) if rate in found else "–"
                for name, rate in zip(names, rates, strict=True)
            }
            first, last = (found[rate]["area"] if rate in found else None for rate in (rates[0], rates[-1]))
            lost = None if first is None or last is None else last - first
            lines.append({"strategy": strategy, **texts, "lost": signed(lost), "order": lost})
        columns = [
            Column("strategy", "Strategy", words, is_number=False),
            *(Column(name, f"Area {name}", words) for name in names),
            Column("lost", f"{percent(rates[-1])} minus {percent(rates[0])}", words),
        ]
        frame = pl.DataFrame(lines, infer_schema_length=None).sort("order", descending=True, nulls_last=True)
        caption = f"{setting_name(group)}: area over labels by the share of wrong answers, the smallest loss first"
        parts.append(table(frame, columns, caption))
    return "".join(parts)
