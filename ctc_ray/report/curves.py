"""Learning curves (the paper's Figure 3): panels for the page, and the figure as a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from html import escape

import numpy as np
import polars as pl

from ctc_ray.hil.comparison import BASELINES
from ctc_ray.hil.statistics import paper_order
from ctc_ray.report.figures import cluster_name
from ctc_ray.report.markup import count
from ctc_ray.report.simulation_frames import Setting, one_setting, setting_name, settings_of

CURVE_COLOURS = (
    ("#d55e00", "#f0883e"),
    ("#0072b2", "#5ab0ee"),
    ("#009e73", "#35c79a"),
    ("#cc79a7", "#e0a0c6"),
    ("#8c6d1f", "#c9a84c"),
    ("#7a5195", "#b08fd0"),
    ("#3a9bdc", "#9adcf5"),
    ("#e69f00", "#ffd166"),
    ("#1d2227", "#e7e9eb"),
)
"""On light and on dark ground; the first two are the paper's strategies'. Source: after Okabe and Ito."""
_DASHES = ("none", "6 3", "2 3", "9 3 2 3", "12 4", "1 2")
_MUTED = ("#b6bcc2", "#535b63")
_MAX_TOGGLED = 32
"""Strategies that the page can switch on and off."""
MAX_HIGHLIGHTED = 6
"""Where there are more strategies, three stand out and the others are thin and grey until they are chosen."""
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 340, 230, 48, 14, 14, 40
_MAX_TICKS = 7
_ARM_STYLE = (
    ".arm .line{fill:none;stroke:var(--colour);stroke-width:var(--width);stroke-dasharray:var(--dash)}"
    ".arm .band{fill:var(--colour);opacity:var(--fill)}.arm .dot{fill:var(--colour);stroke:var(--panel);opacity:var(--dot)}"
    ".arm{--width:2.2;--fill:.15;--dot:1}"
)
_MUTED_STYLE = "--colour:var(--muted);--dash:none;--width:1;--fill:0;--dot:0"


def _style_number(number: int) -> str:
    """Classes of the strategy at a place in the order: 2 colours for the paper's, 7 colours x 6 dashes for the others."""
    colour = number if number < 2 else 2 + (number - 2) % (len(CURVE_COLOURS) - 2)
    return f"c{colour} d{number % len(_DASHES)}"


def curve_styles() -> str:
    """Styles of curves for the page: colours of both schemes, dashes, and what an unchecked strategy looks like."""
    schemes = [
        f"--muted:{_MUTED[scheme]};" + ";".join(f"--c{n}:{pair[scheme]}" for n, pair in enumerate(CURVE_COLOURS))
        for scheme in (0, 1)
    ]
    classes = "".join(f".c{n}{{--colour:var(--c{n})}}" for n in range(len(CURVE_COLOURS)))
    classes += "".join(f".d{n}{{--dash:{dash}}}" for n, dash in enumerate(_DASHES))
    off = ",".join(f".curves:not(:has(input.k{n}:checked)) .arm.k{n}" for n in range(_MAX_TOGGLED))
    return (
        f":root{{{schemes[0]}}}@media (prefers-color-scheme:dark){{:root{{{schemes[1]}}}}}"
        f"{classes}{_ARM_STYLE}{off}{{{_MUTED_STYLE}}}"
    )


def highlighted(strategies: Sequence[str], comparison: pl.DataFrame) -> list[str]:
    """Strategies that stand out: all of a few; of many the paper's two and the one with the largest area.

    Args:
        strategies: those of one setting.
        comparison: rows of `comparison_frame` of that setting, the largest area first.
    """
    if len(strategies) <= MAX_HIGHLIGHTED:
        return list(strategies)
    best = comparison.drop_nulls("area")["strategy"].head(1).to_list()
    return [name for name in strategies if name in (*BASELINES, *best)]


def key_lines(order: Sequence[str], shown: Collection[str], chosen: Collection[str]) -> str:
    """Key of the curves, a checkbox a strategy.

    Args:
        order: all strategies of the simulation; the place gives colour and dash.
        shown: those of this setting.
        chosen: those checked at first.
    """
    items = "".join(
        f'<label><input type="checkbox" class="k{n}" autocomplete="off"{" checked" if name in chosen else ""}>'
        f'<svg class="{_style_number(n)}" viewBox="0 0 28 10" aria-hidden="true"><line class="swatch" x1="0" x2="28" y1="5" y2="5"/>'
        f"</svg>{escape(name)}</label>"
        for n, name in enumerate(order)
        if name in shown
    )
    return f'<fieldset class="key"><legend>Strategies in colour</legend>{items}</fieldset>'


def f1_panel(frame: pl.DataFrame, title: str, strategies: Sequence[str], chosen: Collection[str] | None = None) -> str:
    """Draw mean F1 and its sd band against the loop, one line a strategy, as an SVG that follows the page's colours.

    Args:
        frame: rows of one cluster and setting: strategy, loop, num_train, mean_f1, sd_f1, num_runs.
        title: the panel's title.
        strategies: order, and so colour and dash, of the lines.
        chosen: those drawn last, above the others; None: all alike.

    Source: paper, Figure 3 (mean and standard deviation over five runs).
    """
    names = ", ".join(strategies)
    label = f"{title}: test F1 by labelling loop, mean and standard deviation for {names}"
    marks = _marks(frame, strategies, strategies if chosen is None else chosen, muted="")
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">{marks}</svg>'


def _marks(frame: pl.DataFrame, strategies: Sequence[str], chosen: Collection[str], *, muted: str) -> str:
    """Axes and lines of a panel; `muted` is a class for the lines that are not chosen."""
    ticks = frame.group_by("loop").agg(least=pl.col("num_train").min(), most=pl.col("num_train").max()).sort("loop")
    loops = ticks["loop"].to_list() or [0]
    low, high = _f1_range(frame)

    def x(loop: float) -> float:
        return float(_LEFT + (_WIDTH - _LEFT - _RIGHT) * (loop - loops[0]) / max(loops[-1] - loops[0], 1))

    def y(value: float) -> float:
        return float(_TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - value) / (high - low))

    parts = [
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(v):.1f}" y2="{y(v):.1f}"/>'
        f'<text class="tick" x="{_LEFT - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{v:.1f}</text>'
        for v in np.arange(low, high + 0.05, 0.2 if high - low > 0.45 else 0.1)
    ]
    parts.append(f'<text class="tick faint" x="0" y="{_HEIGHT - 22}">loop</text>')
    parts.append(f'<text class="tick faint" x="0" y="{_HEIGHT - 7}">labels</text>')
    for loop, least, most in ticks.gather_every(-(-len(loops) // _MAX_TICKS)).iter_rows():
        name = "init" if loop == 0 else f"{loop}"
        labels = f"{least:.0f}" if least == most else f"{least:.0f}–{most:.0f}"
        anchor = "end" if loop == loops[-1] and least != most else "middle"
        right = x(loop) if anchor == "middle" else _WIDTH - 2
        parts.append(
            f'<text class="tick" x="{x(loop):.1f}" y="{_HEIGHT - 22}" text-anchor="middle">{name}</text>'
            f'<text class="tick faint" x="{right:.1f}" y="{_HEIGHT - 7}" text-anchor="{anchor}">{labels}</text>'
        )
    for number, strategy in sorted(enumerate(strategies), key=lambda item: item[1] in chosen):
        line = frame.filter((pl.col("strategy") == strategy) & pl.col("mean_f1").is_not_null()).sort("loop")
        extra = "" if strategy in chosen else muted
        parts.append(_strategy_line(line, f"arm k{number} {_style_number(number)}{extra}", strategy, x, y))
    return "".join(parts)


def _f1_range(frame: pl.DataFrame) -> tuple[float, float]:
    spread = frame.drop_nulls("mean_f1").with_columns(pl.col("sd_f1").fill_null(0.0))
    if spread.is_empty():
        return 0.0, 1.0
    lowest = float(np.min(spread["mean_f1"].to_numpy() - spread["sd_f1"].to_numpy()))
    return max(0.0, min(0.8, float(np.floor(lowest * 5) / 5))), 1.0


def _strategy_line(
    line: pl.DataFrame, classes: str, strategy: str, x: Callable[[float], float], y: Callable[[float], float]
) -> str:
    if line.is_empty():
        return ""
    rows = list(line.select("loop", "mean_f1", pl.col("sd_f1").fill_null(0.0), "num_runs").iter_rows())
    over = [f"{x(loop):.1f},{y(min(mean + sd, 1.0)):.1f}" for loop, mean, sd, _ in rows]
    under = [f"{x(loop):.1f},{y(max(mean - sd, 0.0)):.1f}" for loop, mean, sd, _ in reversed(rows)]
    path = " ".join(f"{x(loop):.1f},{y(mean):.1f}" for loop, mean, _, _ in rows)
    dots = "".join(
        f'<circle class="dot" cx="{x(loop):.1f}" cy="{y(mean):.1f}" r="3">'
        f"<title>{escape(strategy)}, loop {loop}: {mean:.3f} ± {sd:.3f} ({runs} runs)</title></circle>"
        for loop, mean, sd, runs in rows
    )
    return (
        f'<g class="{classes}"><polygon class="band" points="{" ".join(over + under)}"/>'
        f'<polyline class="line" points="{path}"/>{dots}</g>'
    )


def panels_of(curves: pl.DataFrame) -> list[tuple[str, pl.DataFrame]]:
    """Name and rows of each panel of a setting: all cells, background, then the clusters."""
    own = [curves.filter(pl.col("cluster").eq_missing(c)) for c in curves["cluster"].unique().sort(nulls_last=False)]
    return [(cluster_name(rows["cluster"][0]), rows) for rows in own]


_COLUMNS, _GAP, _HEAD = 4, 16, 24


def figure3_svg(curves: pl.DataFrame, comparison: pl.DataFrame) -> str:
    """Draw all panels of all settings as one SVG file with colours of its own, on white.

    Args:
        curves: test rows of `summarise`.
        comparison: `comparison_frame`; says which strategies stand out.

    Source: paper, Figure 3.
    """
    order = paper_order(curves["strategy"].unique())
    parts, top = [], _GAP
    for setting, rows in settings_of(curves):
        drawn, top = _setting_block(rows, setting, one_setting(comparison, setting), order, top)
        parts.append(drawn)
    width = _COLUMNS * (_WIDTH + _GAP) + _GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{top}" viewBox="0 0 {width} {top}" role="img" '
        f'aria-label="Test F1 by labelling loop, mean and standard deviation over runs"><style>{_file_styles()}</style>'
        f'<rect width="{width}" height="{top}" fill="#ffffff"/>{"".join(parts)}</svg>\n'
    )


def _file_styles() -> str:
    """Styles of the file in plain colours: not every program that edits SVG knows variables."""
    rules = [
        f".c{n} .line,.c{n}.swatch{{stroke:{light}}}.c{n} .band,.c{n} .dot{{fill:{light}}}"
        for n, (light, _) in enumerate(CURVE_COLOURS)
    ]
    rules += [f".d{n} .line,.d{n}.swatch{{stroke-dasharray:{dash}}}" for n, dash in enumerate(_DASHES)]
    return (
        ".line{fill:none;stroke-width:2.2}.swatch{stroke-width:2.2}.band{opacity:.15}.dot{stroke:#ffffff}"
        f"{''.join(rules)}.muted .line{{stroke:{_MUTED[0]};stroke-width:1;stroke-dasharray:none}}"
        ".muted .band,.muted .dot{display:none}text{font-family:Helvetica,Arial,sans-serif;fill:#1d2227;font-size:12px}"
        ".tick{font-size:11px}.faint{fill:#59626b;font-size:10px}.head{font-size:15px;font-weight:600}.name{font-weight:600}"
        ".grid{stroke:#dfe2e5}"
    )


def _setting_block(
    rows: pl.DataFrame, setting: Setting, comparison: pl.DataFrame, order: Sequence[str], top: int
) -> tuple[str, int]:
    """Heading, key and panels of a setting, from `top` downwards; and where they end."""
    shown = [name for name in order if name in set(rows["strategy"])]
    chosen = highlighted(shown, comparison)
    runs = count(rows["num_runs"].max())
    heading = f"{setting_name(setting)}: test F1, mean ± standard deviation of {runs} runs"
    parts = [f'<text class="head" x="{_GAP}" y="{top + 16}">{escape(heading)}</text>']
    left, line = float(_GAP), top + 38
    for name in chosen:
        style = _style_number(order.index(name))
        parts.append(
            f'<line class="swatch {style}" x1="{left:.0f}" x2="{left + 28:.0f}" y1="{line - 4}" y2="{line - 4}"/>'
            f'<text x="{left + 34:.0f}" y="{line}">{escape(name)}</text>'
        )
        left += 34 + 7.5 * len(name) + 18
    others = [name for name in shown if name not in chosen]
    if others:
        line += 18
        parts.append(f'<text class="faint" x="{_GAP}" y="{line}">grey: {escape(", ".join(others))}</text>')
    below = line + 12
    panels = panels_of(rows)
    for place, (name, own) in enumerate(panels):
        x = _GAP + (place % _COLUMNS) * (_WIDTH + _GAP)
        y = below + (place // _COLUMNS) * (_HEIGHT + _HEAD + _GAP)
        parts.append(
            f'<text class="name" x="{x}" y="{y + 14}">{escape(name)}</text><svg x="{x}" y="{y + _HEAD - 4}" width="{_WIDTH}" '
            f'height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}">{_marks(own, order, chosen, muted=" muted")}</svg>'
        )
    num_rows = -(-len(panels) // _COLUMNS)
    return "".join(parts), below + num_rows * (_HEIGHT + _HEAD + _GAP) + _GAP
