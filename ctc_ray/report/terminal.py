"""The results of a run on one screen of a terminal."""

from __future__ import annotations

import polars as pl
from rich.console import Console
from rich.table import Table

from ctc_ray.cohort import Cohort
from ctc_ray.config import RunConfig
from ctc_ray.hil.stage import RESULTS
from ctc_ray.hil.statistics import FLIP_RATE, first_and_last
from ctc_ray.labels.consensus import read_labels
from ctc_ray.report import frames
from ctc_ray.report.figures import cluster_name
from ctc_ray.report.latent_points import latent_points
from ctc_ray.report.markup import count, fraction, plural
from ctc_ray.report.simulation_frames import setting_name, settings_of


def print_summary(cohort: Cohort, config: RunConfig, *, console: Console | None = None) -> None:
    """Print headline numbers, F1 per cluster, what the labelling strategies gained, and the comparison with CellSearch.

    Args:
        cohort: whatever has been computed is shown; the rest is left out.
        config: which classifier, map, simulation and detection run.
        console: where to print; standard output by default.
    """
    target = console or Console(highlight=False)
    patients = frames.patients_frame(cohort, config)
    target.print(f"\n{count(patients['num_cells'].sum())} cells of {plural(patients.height, 'patient')}", markup=False)
    for table in (_clusters(cohort, config), _strategies(cohort, config), _cellsearch(cohort, config)):
        if table is not None:
            target.print()
            target.print(table)


def _new_table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for position, heading in enumerate(headings):
        table.add_column(heading, justify="left" if position == 0 else "right")
    return table


def _clusters(cohort: Cohort, config: RunConfig) -> Table | None:
    _, sizes = latent_points(cohort, config, read_labels(cohort).select("cell_id", "label"))
    frame = frames.cluster_frame(sizes, frames.metrics_frame(cohort, config))
    if frame is None:
        return None
    table = _new_table("Test patients: F1 of the class CTC", "", "cells", "labelled", "F1", "F1 of raw pixels")
    for row in frame.iter_rows(named=True):
        numbers = (
            count(row["num_cells"]),
            count(row["num_labelled"]),
            fraction(row["f1"]),
            fraction(row["raw_pixels_f1"]),
        )
        table.add_row(cluster_name(row["cluster"]), *numbers)
    return table


def _strategies(cohort: Cohort, config: RunConfig) -> Table | None:
    results = frames.read_output(cohort, cohort.simulation(config.hil.name), RESULTS)
    if results is None or results.is_empty():
        return None
    total = first_and_last(results).filter(pl.col("cluster").is_null())
    if FLIP_RATE in total.columns:  # the least, to stay on one screen; the report has all
        total = total.filter(pl.col(FLIP_RATE) == pl.col(FLIP_RATE).min())
    last = count(total["loop"].max())
    table = _new_table(
        f"Labelling: test F1 before and after {last} loops (mean of runs)", "", "before", "after", "labels"
    )
    for setting, rows in settings_of(total):
        for (strategy,), ends in rows.sort("strategy", "loop").group_by(["strategy"], maintain_order=True):
            means = (fraction(ends["mean_f1"][0]), fraction(ends["mean_f1"][-1]))
            table.add_row(f"{setting_name(setting)}: {strategy!s}", *means, count(ends["num_train"][-1]))
    return table


def _cellsearch(cohort: Cohort, config: RunConfig) -> Table | None:
    ppv = frames.read_output(cohort, cohort.detection(config.compare.name), "ppv.parquet")
    if ppv is None:
        return None
    names = ("cand.", "CTCs", "PPV", "events", "CTCs", "PPV", "both", "model", "CS")
    title = "Candidates, CellSearch's events; CTCs found by both, by the model only, by CellSearch (CS) only"
    table = _new_table(title, "", *names)
    for row in ppv.iter_rows(named=True):
        table.add_row(
            "all" if row["patient"] is None else row["patient"].replace("[", "\\["),
            count(row["num_candidates"]),
            count(row["num_model_ctc"]),
            fraction(row["model_ppv"]),
            count(row["num_events"]),
            count(row["num_cellsearch_ctc"]),
            fraction(row["cellsearch_ppv"]),
            count(row["num_both"]),
            count(row["num_model_only"]),
            count(row["num_cellsearch_only"]),
        )
    return table
