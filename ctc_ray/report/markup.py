"""HTML pieces; every value that comes from data is escaped here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import polars as pl

Formatter = Callable[[Any], str]
STRIP_WIDTH_PX, STRIP_HEIGHT_PX = 201, 48
"""Size of a cell's picture: four panels of 48 px and three gaps; the page may scale it."""


@dataclass(frozen=True)
class Section:
    """One part of the page: anchor, heading, and HTML that is already escaped."""

    anchor: str
    title: str
    html: str


@dataclass(frozen=True)
class Column:
    """One column of a table: its name in the frame, its heading, how values read; numbers stand to the right."""

    name: str
    heading: str
    text: Formatter = str
    is_number: bool = True


def count(value: Any) -> str:
    """Whole number with thousands separated; a dash where unknown."""
    return "–" if value is None else f"{int(value):,}"


def plural(number: Any, word: str) -> str:
    """`1 patient`, `2 patients`."""
    return f"{count(number)} {word}" if number == 1 else f"{count(number)} {word}s"


def moment(value: str | None) -> str:
    """An ISO time to the minute; a dash where there is none."""
    return "–" if value is None else value[:16].replace("T", " ")


def fraction(value: float | None) -> str:
    """Number with three decimals; a dash where undefined."""
    return "–" if value is None else f"{value:.3f}"


def words(value: str | None) -> str:
    """Text, or a dash."""
    return "–" if value is None else str(value)


def table(
    frame: pl.DataFrame, columns: Sequence[Column], caption: str, *, total_last: bool = False, dense: bool = False
) -> str:
    """Lay a frame out as a table; the first column heads its rows.

    Args:
        frame: tidy frame.
        columns: which of its columns, in order.
        caption: what the table shows.
        total_last: whether the last row is a sum.
        dense: whether many columns stand close together, and the first stays in sight when the others scroll.
    """
    heads = "".join(f'<th scope="col"{_number(c)}>{escape(c.heading)}</th>' for c in columns)
    rows = []
    for position, row in enumerate(frame.iter_rows(named=True)):
        is_total = total_last and position == frame.height - 1
        cells = [
            f'<th scope="row">{escape(column.text(row[column.name]))}</th>'
            if place == 0
            else f"<td{_number(column)}>{escape(column.text(row[column.name]))}</td>"
            for place, column in enumerate(columns)
        ]
        opening = '<tr class="total">' if is_total else "<tr>"
        rows.append(f"{opening}{''.join(cells)}</tr>")
    return (
        f'<div class="scroll{" dense" if dense else ""}" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _number(column: Column) -> str:
    return ' class="number"' if column.is_number else ""


def missing(what: str, command: str) -> str:
    """Say that a stage has not run, and which command runs it."""
    return f'<p class="missing">{escape(what)}: not run. <code>{escape(command)}</code></p>'


def note(text: str) -> str:
    """A line of explanation below a heading."""
    return f'<p class="note">{escape(text)}</p>'


def cell_figure(picture: str, alt: str, lines: Sequence[str], *, tags: Sequence[str] = ()) -> str:
    """One cell of a gallery: picture (a `data:` URI), alternative text, lines of caption, short tags."""
    marks = "".join(f"<li>{escape(tag)}</li>" for tag in tags)
    listed = f'<ul class="tags">{marks}</ul>' if marks else ""
    text = "<br>".join(escape(line) for line in lines)
    return (
        f'<figure class="cell"><img src="{picture}" alt="{escape(alt)}" width="{STRIP_WIDTH_PX}" height="{STRIP_HEIGHT_PX}">'
        f"<figcaption>{text}{listed}</figcaption></figure>"
    )


def card(value: str, label: str, detail: str) -> str:
    """A headline number with what it counts and what it was measured on."""
    return (
        f'<div class="card"><dt>{escape(label)}</dt><dd><strong>{escape(value)}</strong>'
        f"<span>{escape(detail)}</span></dd></div>"
    )
