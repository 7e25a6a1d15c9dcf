"""Small tables on the terminal: what a stage did, what it would do, what the doctor found."""

from __future__ import annotations

import polars as pl
from rich.console import Console
from rich.table import Table

from ctc_ray.node_report import Finding
from ctc_ray.records import PlanRow, StageResult

_LOG_COLUMNS = 240
"""Width of a table in a job's log, which no terminal bounds."""


def _console() -> Console:
    return Console(highlight=False, soft_wrap=False)


def print_result(result: StageResult) -> None:
    """Print one stage's counts and paths."""
    console = _console()
    parts = [f"{result.units_computed} computed", f"{result.units_reused} reused"]
    if result.set_aside:
        parts.append(f"{result.set_aside} set aside")
    console.print(f"{result.stage}: {', '.join(parts)} in {result.seconds:.1f} s", markup=False)
    for name, value in result.counts.items():
        console.print(f"  {name.replace('_', ' ')}: {value:,}", markup=False)
    for note in result.notes:
        console.print(f"  {note}", markup=False, soft_wrap=True)
    for path in result.paths[:8]:
        console.print(f"  {path}", markup=False, soft_wrap=True)
    if len(result.paths) > 8:
        console.print(f"  and {len(result.paths) - 8} more", markup=False)
    if result.set_aside:
        folder = f"failures/{result.failures_of or result.stage}/"
        console.print(f"  reasons: {folder} (try again with --retry-failed where the stage has it)", markup=False)


def print_plan(rows: list[PlanRow]) -> None:
    """Print what a stage would do, a unit a line."""
    table = Table("unit", "state", "why", box=None, pad_edge=False)
    for row in rows:
        table.add_row(row.unit, str(row.state), row.why)
    _console().print(table)


def print_findings(findings: list[Finding]) -> None:
    """Print the doctor's findings, each with its remedy where something is wrong."""
    table = Table("", "what", "found", "remedy", box=None, pad_edge=False)
    table.columns[1].no_wrap = True  # a machine's name stays whole
    for finding in findings:
        table.add_row("ok" if finding.ok else "!!", finding.what, finding.value, "" if finding.ok else finding.remedy)
    console = _console()
    (console if console.is_terminal else Console(highlight=False, width=_LOG_COLUMNS)).print(table)


def print_neighbours(found: pl.DataFrame, *, as_json: bool) -> None:
    """Print neighbours as a table, or as JSON rows for other programs."""
    if as_json:
        print(found.write_json())  # noqa: T201 - the output of the command
        return
    table = Table(*found.columns, box=None, pad_edge=False)
    for row in found.iter_rows():
        table.add_row(*(f"{value:.4f}" if isinstance(value, float) else str(value) for value in row))
    _console().print(table)
