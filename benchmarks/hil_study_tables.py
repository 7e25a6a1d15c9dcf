"""The study of strategies as Markdown tables and figures, from `benchmarks/results/hil_study.json`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

TITLES = {
    "phantom": "Phantom cohorts",
    "jurkat": "Jurkat cells (dividing against not)",
    "release": "The release folder",
}
PHASES = ("choose", "confirm")
_HIGHLIGHTS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # of Okabe and Ito: told apart by colour-blind readers too


def print_markdown(study: dict[str, Any], phases: Sequence[str] = PHASES) -> None:
    """Print one table a data set and share of wrong answers, one of gains by number of labels, and the verdicts."""
    print("\n".join(markdown(study, phases)))


def markdown(study: dict[str, Any], phases: Sequence[str] = PHASES) -> list[str]:
    """Lines of all tables of these phases."""
    lines: list[str] = []
    for phase in phases:
        for name, judged in study.get(phase, {}).get("data", {}).items():
            data, flips = name.split()
            wrong = "" if float(flips) == 0 else f", {float(flips):.0%} wrong answers"
            lines += ["", f"### {phase}: {TITLES[data]}{wrong}", "", *_main_table(judged)]
            if float(flips) == 0:
                lines += ["", *_by_labels(judged)]
    return lines


def _main_table(judged: dict[str, Any]) -> list[str]:
    means = judged["means"]
    runs = max(found["runs"] for found in means["area"].values())
    lines = [
        f"{runs} runs; `random` ends at F1 {judged['random_end_f1']:.3f}.",
        "",
        "| strategy | area | gain over random (95 %) | p (Holm) | gain over cluster-f1 (95 %) | p (Holm) | F1 at the end | "
        "worst cluster's F1 at the end (over random, 95 %) | "
        "labels to random's end |",
        f"|{'---|' * 9}",
    ]
    for strategy in sorted(means["area"], key=lambda name: -means["area"][name]["mean"]):
        against = [_against(judged, base, strategy) for base in ("random", "cluster-f1")]
        lines.append(
            f"| {strategy} | {_mean(means, 'area', strategy)} | {' | '.join(against)} | {_mean(means, 'final_f1', strategy)} | "
            f"{_worst(judged, strategy)} | {_reached(judged['reached'][strategy])} |"
        )
    return lines


def _mean(means: dict[str, Any], figure: str, strategy: str) -> str:
    found = means[figure].get(strategy, {})
    return "-" if found.get("mean") is None else f"{found['mean']:.3f} ± {found['sd']:.3f}"


def _worst(judged: dict[str, Any], strategy: str) -> str:
    mean = judged["means"]["worst_cluster_f1"].get(strategy, {}).get("mean")
    row = next((row for row in judged["worst_against"]["random"] if row["strategy"] == strategy), None)
    shown = "-" if mean is None else f"{mean:.3f}"
    return shown if row is None else f"{shown} ({row['low']:+.3f} to {row['high']:+.3f})"


def _against(judged: dict[str, Any], base: str, strategy: str) -> str:
    row = next((row for row in judged["area_against"][base] if row["strategy"] == strategy), None)
    if row is None:
        return "- | -"
    return f"{row['mean_difference']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f}) | {_p(row['p_holm'])}"


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "<0.001"


def _reached(found: dict[str, Any]) -> str:
    if found["median_labels"] is None:
        return f"{found['reached']} of {found['runs']} runs"
    return f"{found['median_labels']:.0f} ({found['reached']} of {found['runs']})"


def _by_labels(judged: dict[str, Any]) -> list[str]:
    """Gain of F1 over random after each loop."""
    by_labels = judged["by_labels"]
    heads = [row["labels"] for row in next(iter(by_labels.values()))]
    lines = [
        "F1 over `random` by number of labels:",
        "",
        f"| strategy | {' | '.join(map(str, heads))} |",
        f"|---|{'---|' * len(heads)}",
    ]
    for strategy in sorted(by_labels, key=lambda name: -sum(row["mean_difference"] for row in by_labels[name])):
        gains = [f"{row['mean_difference']:+.3f}{_mark(row)}" for row in by_labels[strategy]]
        lines.append(f"| {strategy} | {' | '.join(gains)} |")
    return [*lines, "", "`*`: the 95 % interval leaves zero out."]


def _mark(row: dict[str, Any]) -> str:
    return "*" if row["low"] > 0 or row["high"] < 0 else ""


def draw(study: dict[str, Any], path: Path) -> None:
    """Draw the gain in area over random with its interval: a panel a data set, a row a strategy, clean answers.

    Args:
        study: the stored results.
        path: an SVG file.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = [
        (f"{phase}: {TITLES[name.split()[0]]}", judged)
        for phase in PHASES
        for name, judged in study.get(phase, {}).get("data", {}).items()
        if name.endswith("0.00")
    ]
    chosen = study["choose"]["recommended"]
    order = [name for _, name in study["choose"]["mean_gain"]]
    figure = Figure(figsize=(3.2 * len(panels) + 1.2, 4.4), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, judged) in zip(axes, panels, strict=True):
        rows = {row["strategy"]: row for row in judged["area_against"]["random"]}
        for place, strategy in enumerate(reversed(order)):
            row = rows[strategy]
            colour = _HIGHLIGHTS[0] if strategy == chosen else _HIGHLIGHTS[1] if strategy == "cluster-f1" else "#555555"
            axis.plot([row["low"], row["high"]], [place, place], color=colour, lw=1.6)
            axis.plot(row["mean_difference"], place, "o", color=colour, ms=5)
        axis.axvline(0, color="#999999", lw=0.8)
        axis.set_title(title, fontsize=9)
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.set_xlabel("gain in mean test F1 over random")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(order)), list(reversed(order)))
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "hil_study"}):
        figure.savefig(path, metadata={"Date": None})
