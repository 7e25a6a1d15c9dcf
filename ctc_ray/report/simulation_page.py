"""The page of one simulation: what was run, Figure 3, Table 1 and the comparison of strategies, with tables and figure beside it."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from html import escape
from typing import Any

import polars as pl

from ctc_ray.config import HilConfig
from ctc_ray.detect.stage import table_frame
from ctc_ray.errors import ConfigError, MissingInputError, SchemaError
from ctc_ray.hil.release_checks import ReleaseChecks
from ctc_ray.hil.stage import CHECKS, EFFORT, RESULTS
from ctc_ray.hil.statistics import FLIP_RATE, paper_order
from ctc_ray.records import Record, StageResult, damaged_files, read_record
from ctc_ray.report import simulation_sections
from ctc_ray.report.curves import figure3_svg
from ctc_ray.report.markup import Column, Section, card, count, fraction, moment, note, table, words
from ctc_ray.report.page import document
from ctc_ray.report.simulation_frames import (
    SimulationFrames,
    percent,
    setting_name,
    settings_of,
    simulation_frames,
)
from ctc_ray.schema import EFFORT_SCHEMA, RESULTS_SCHEMA, check_columns
from ctc_ray.storage import Store, split_uri

STAGE = "simulation-report"
PAGE = "report.html"
_MAX_SEEDS_NAMED = 8


@dataclass(frozen=True)
class Simulation:
    """What a finished simulation left.

    Attributes:
        place: as messages and the page name it.
        record: its record.
        results: rows of `results.parquet`.
        effort: rows of `effort.parquet`; None where it has none.
        checks: `release_checks.json`; None where it has none.
    """

    place: str
    record: Record
    results: pl.DataFrame
    effort: pl.DataFrame | None
    checks: ReleaseChecks | None


def run_simulation_report(place: str, out: str | None = None) -> StageResult:
    """Write the page of a simulation, and beside it `table1.csv`, `comparison.csv` and `figure3.svg`.

    Args:
        place: folder of a simulation, a path or a URI: `simulations/<name>` of a cohort, or the `--out` of a release.
        out: HTML file to write, a path or a URI; None: `report.html` in that folder.

    Returns:
        One unit: the page; paths of all four files.

    Raises:
        MissingInputError: there is no finished simulation.
        SchemaError: its tables lack a column.
        ConfigError: `out` is no HTML file, or `place` names no folder.
    """
    started = time.monotonic()
    target, folder, name = _target(place, out)
    simulation = read_simulation(place)
    frames = simulation_frames(simulation.results, simulation.effort)
    files = {
        name: render_simulation(simulation, frames).encode("utf-8"),
        "table1.csv": frames.table1.write_csv().encode("utf-8"),
        "comparison.csv": frames.comparison.write_csv().encode("utf-8"),
        "figure3.svg": figure3_svg(frames.curves, frames.comparison).encode("utf-8"),
    }
    paths = [f"{folder}/{file}" if folder else file for file in files]
    for path, data in zip(paths, files.values(), strict=True):
        target.write_bytes(path, data)
    counts = {"arms": frames.comparison.height, "page_bytes": len(files[name])}
    shown = tuple(target.describe(path) for path in paths)
    return StageResult(STAGE, 1, 0, counts=counts, paths=shown, seconds=time.monotonic() - started)


def _folder(place: str) -> tuple[Store, str]:
    """Store and name of a folder that is not a root."""
    parent, name = split_uri(place.rstrip("/") or "/")
    if not name or parent.partition("?")[0].endswith(":/"):
        raise ConfigError(f"{place!r} must name the folder of a simulation, not a root")
    return Store(parent), name


def _target(place: str, out: str | None) -> tuple[Store, str, str]:
    """Where the page goes: store, folder in it, file name."""
    if out is None:
        store, folder = _folder(place)
        return store, folder, PAGE
    parent, name = split_uri(out)
    if not name.lower().endswith((".html", ".htm")):
        raise ConfigError(f"--out {out!r} must name an HTML file, for example {out.rstrip('/')}/{PAGE}")
    return Store(parent), "", name


def read_simulation(place: str) -> Simulation:
    """Read what a finished simulation left; raises as `run_simulation_report` does."""
    store, folder = _folder(place)
    shown = store.describe(folder)
    record = read_record(store, folder)
    if record is None or record.stage != "simulate" or RESULTS not in record.files:
        raise MissingInputError(
            f"{shown} holds no finished simulation (no record of {RESULTS}): give the folder of one, such as COHORT/simulations/paper or "
            "the --out of `ctc-ray simulate --release DIR --out OUT`, or run `ctc-ray simulate` first"
        )
    damaged = damaged_files(store, folder, record)
    if damaged:
        raise MissingInputError(
            f"{shown}: {', '.join(damaged)} is gone or not as recorded: run `ctc-ray simulate` with the same settings again"
        )
    results = _table(store, f"{folder}/{RESULTS}", RESULTS_SCHEMA)
    if results.is_empty():
        raise SchemaError(f"{shown}/{RESULTS} has no rows: run `ctc-ray simulate` again")
    effort = _table(store, f"{folder}/{EFFORT}", EFFORT_SCHEMA) if EFFORT in record.files else None
    checks = _checks(store, f"{folder}/{CHECKS}") if CHECKS in record.files else None
    return Simulation(shown, record, results, effort, checks)


def _table(store: Store, path: str, schema: Any) -> pl.DataFrame:
    """A table with the columns of its schema, and the optional `flip_rate`."""
    found = store.read_table(path)
    if FLIP_RATE in found.column_names:
        schema = schema.append(found.schema.field(FLIP_RATE))
    return table_frame(check_columns(found, schema, store.describe(path)))


def _checks(store: Store, path: str) -> ReleaseChecks:
    values = json.loads(store.read_bytes(path))
    names = {field.name for field in dataclasses.fields(ReleaseChecks)}
    if not isinstance(values, dict) or not names <= values.keys():
        raise SchemaError(f"{store.describe(path)} lacks {', '.join(sorted(names))}: run `ctc-ray simulate` again")
    return ReleaseChecks(**{name: values[name] for name in names})


def render_simulation(simulation: Simulation, frames: SimulationFrames) -> str:
    """Write the page: one HTML document without requests."""
    command = "ctc-ray simulate"
    sections = [
        summary(frames),
        what_was_run(simulation),
        simulation_sections.learning_curves(frames, command),
        simulation_sections.table1(frames, command),
        simulation_sections.comparison(frames, command),
    ]
    return document("Human-in-the-loop simulation", simulation.place, sections)


def summary(frames: SimulationFrames) -> Section:
    """The strategy with the largest area in each setting, and its gain over random."""
    cards = []
    for setting, rows in settings_of(frames.comparison):
        defined = rows.drop_nulls("area")
        if defined.is_empty():
            continue
        best = defined.row(0, named=True)
        gain = simulation_sections.difference(best, "area_vs_random")
        versus = "" if best["area_vs_random"] is None else f", {gain} over random"
        detail = f"{best['strategy']}: largest of {defined.height} mean areas under F1 over labels{versus}"
        cards.append(card(fraction(best["area"]), setting_name(setting), detail))
    text = "The best of many is flattered by chance: judge it by its interval, and by seeds or data that did not choose it."
    return Section("summary", "Summary", f'<dl class="cards">{"".join(cards)}</dl>{note(text)}')


def what_was_run(simulation: Simulation) -> Section:
    """Scenarios, strategies, seeds and numbers of the experiment; checks of the release where there are any."""
    entries = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in _entries(simulation))
    html = f'<dl class="glossary">{entries}</dl>' + _release(simulation.checks)
    settings = escape(json.dumps(simulation.record.config, indent=1, sort_keys=True))
    html += f"<details><summary>All settings</summary><pre>{settings}</pre></details>"
    return Section("run", "What was run", html)


def _entries(simulation: Simulation) -> list[tuple[str, str]]:
    results, record = simulation.results, simulation.record

    def setting(name: str) -> Any:
        return record.config.get(name, HilConfig.model_fields[name].default)

    scenarios = results["scenario"].unique().sort().to_list()
    entries = [
        ("Scenarios", ", ".join(scenarios)),
        ("Strategies", ", ".join(paper_order(results["strategy"].unique()))),
        ("Seeds", _seeds(results["seed"].unique().sort().to_list())),
        ("Mode", str(setting("mode"))),
        ("Loops", count(results["loop"].max())),
    ]
    if "limited-global" in scenarios:
        entries.append(("Labels", f"{setting('initial')} at the start, {setting('per_loop')} a loop (limited-global)"))
    mains = results["main_cluster"].unique().drop_nulls().sort().to_list()
    if mains:
        entries.append(("Main clusters", ", ".join(map(str, mains))))
    if "rare-positive" in scenarios:
        hidden = f"{percent(setting('held_back'))} of the training cells hidden"
        entries.append(("Search", f"{hidden}, {setting('budget_s'):g} s of the expert a loop (rare-positive)"))
    entries.append(("Wrong answers", ", ".join(percent(rate) for rate in _flip_rates(simulation))))
    entries.append(("A look at a cell", f"{setting('seconds_per_cell'):g} s"))
    counts = record.counts
    entries.append(
        ("Cells", f"{count(counts.get('train_cells'))} for training, {count(counts.get('test_cells'))} for the test")
    )
    entries.append(("Trials", f"{count(counts.get('trials'))}, finished {moment(record.created_at or None)} (UTC)"))
    return entries


def _flip_rates(simulation: Simulation) -> list[float]:
    """Shares of wrong answers: of the rows, or of the settings where all rows have one."""
    if FLIP_RATE in simulation.results.columns:
        return [float(rate) for rate in simulation.results[FLIP_RATE].unique().sort()]
    config = simulation.record.config
    return list(config.get("flip_rates") or [config.get("flip_rate", 0.0)])


def _seeds(seeds: list[int]) -> str:
    """`20: 0 to 19`, or the first of those that do not follow each other."""
    if len(seeds) > _MAX_SEEDS_NAMED and seeds[-1] - seeds[0] == len(seeds) - 1:
        return f"{len(seeds)}: {seeds[0]} to {seeds[-1]}"
    named = ", ".join(map(str, seeds[:_MAX_SEEDS_NAMED]))
    return f"{len(seeds)}: {named}{', …' if len(seeds) > _MAX_SEEDS_NAMED else ''}"


def _release(checks: ReleaseChecks | None) -> str:
    if checks is None:
        return ""
    weakest = "–" if checks.weakest_cluster is None else str(checks.weakest_cluster)
    rows = [
        ("Clusters stored, found again by HDBSCAN", f"{checks.num_clusters_stored}, {checks.num_clusters_found}", "–"),
        ("Adjusted Rand index of the two", fraction(checks.adjusted_rand), "–"),
        ("Test F1 with all training labels", fraction(checks.full_train_f1), "0.923"),
        (f"Test F1 of the weakest cluster ({weakest} here, 2 in the paper)", fraction(checks.weakest_f1), "0.524"),
    ]
    frame = pl.DataFrame(rows, schema=["what", "here", "paper"], orient="row")
    columns = [
        Column("what", "Check of the release", words, is_number=False),
        Column("here", "Here", words),
        Column("paper", "Paper", words),
    ]
    return table(frame, columns, "Does the release hang together?")
