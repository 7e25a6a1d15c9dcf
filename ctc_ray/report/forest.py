"""Interval plot: what each strategy gains over another, with 95 % intervals, as an SVG that follows the page's colours."""

from __future__ import annotations

from html import escape

import numpy as np
import polars as pl

_LEFT, _RIGHT, _PLOT, _ROW, _TOP, _BOTTOM = 140, 30, 250, 22, 8, 40
SIGNIFICANT = 0.05
"""Corrected p below which a point is filled."""


def forest_plot(frame: pl.DataFrame, name: str, title: str) -> str:
    """Draw one row a strategy: the mean difference as a point, its interval as a line, zero as the upright line.

    Args:
        frame: rows of `comparison_frame` of one setting, in the order of the rows.
        name: column of the mean difference; `_low`, `_high` and `_p_holm` are read too. Rows without a difference are left out.
        title: what the plot shows, for readers that do not see it.

    Returns:
        An SVG; points are filled where `_p_holm` is below 0.05, and hollow elsewhere or where there is no test.
    """
    rows = frame.filter(pl.col(name).is_not_null()).select(
        "strategy", mean=name, low=f"{name}_low", high=f"{name}_high", p=f"{name}_p_holm"
    )
    step, first, last = _scale(rows)
    height = _TOP + _ROW * rows.height + _BOTTOM

    def x(value: float) -> float:
        return float(_LEFT + _PLOT * (value - first * step) / ((last - first) * step))

    base = height - _BOTTOM
    parts = [
        f'<line class="{"zero" if k == 0 else "grid"}" x1="{x(k * step):.1f}" x2="{x(k * step):.1f}" y1="{_TOP}" y2="{base}"/>'
        f'<text class="tick" x="{x(k * step):.1f}" y="{base + 14}" text-anchor="middle">{_tick(k * step, step)}</text>'
        for k in range(first, last + 1)
    ]
    parts.append(f'<text class="tick faint" x="{x(0) - 6:.1f}" y="{base + 30}" text-anchor="end">← worse</text>')
    parts.append(f'<text class="tick faint" x="{x(0) + 6:.1f}" y="{base + 30}">better →</text>')
    for place, row in enumerate(rows.iter_rows(named=True)):
        y = _TOP + _ROW * (place + 0.5)
        parts.append(
            f'<text class="tick" x="{_LEFT - 10}" y="{y + 4:.1f}" text-anchor="end">{escape(row["strategy"])}</text>'
        )
        if row["low"] is not None:
            parts.append(
                f'<line class="interval" x1="{x(row["low"]):.1f}" x2="{x(row["high"]):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
        filled = row["p"] is not None and row["p"] < SIGNIFICANT
        parts.append(
            f'<circle class="point{" filled" if filled else ""}" cx="{x(row["mean"]):.1f}" cy="{y:.1f}" r="4.5">'
            f"<title>{escape(row['strategy'])}: {signed(row['mean'])}{interval(row['low'], row['high'])}</title></circle>"
        )
    width = _LEFT + _PLOT + _RIGHT
    return f'<svg class="forest" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def signed(value: float | None, decimals: int = 4) -> str:
    """Difference of F1 with its sign; a dash where undefined."""
    return "–" if value is None else f"{value:+.{decimals}f}".replace("-", "−")


def interval(low: float | None, high: float | None, decimals: int = 4) -> str:
    """` [low, high]`, or nothing."""
    if low is None or high is None:
        return ""
    return f" [{low:.{decimals}f}, {high:.{decimals}f}]".replace("-", "−")


def _scale(rows: pl.DataFrame) -> tuple[float, int, int]:
    """Distance of ticks, and the first and the last tick as multiples of it; zero is always in between."""
    values = np.array([value for name in ("mean", "low", "high") for value in rows[name].drop_nulls()] + [0.0])
    spread = max(float(np.ptp(values)), 1e-6)
    magnitude = 10.0 ** np.floor(np.log10(spread / 4))
    step = float(next(s for s in (magnitude, 2 * magnitude, 5 * magnitude, 10 * magnitude) if spread / s <= 4))
    first, last = int(np.floor(values.min() / step)), int(np.ceil(values.max() / step))
    return step, min(first, -1), max(last, 1)


def _tick(value: float, step: float) -> str:
    decimals = max(0, -int(np.floor(np.log10(step) + 1e-9)))
    return "0" if abs(value) < step / 2 else signed(value, decimals)
