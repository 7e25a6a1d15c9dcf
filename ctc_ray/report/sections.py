"""Sections of numbers: headline, flow of the run, latent map, clusters, table 2, the real field."""

from __future__ import annotations

import base64
from html import escape
from typing import Any

import polars as pl

from ctc_ray.report.data import ReportData
from ctc_ray.report.figures import cluster_name
from ctc_ray.report.markup import Column, Section, card, count, fraction, missing, moment, note, plural, table, words
from ctc_ray.schema import ROLES

_MAX_FAILURES_SHOWN = 20


def headline(data: ReportData) -> Section:
    """How much was looked at, what was found, how well."""
    cards = [_cells_card(data), *_f1_cards(data), *_candidate_cards(data)]
    return Section("summary", "Summary", f'<dl class="cards">{"".join(cards)}</dl>')


def _cells_card(data: ReportData) -> str:
    roles = {role: data.patients.filter(pl.col("role") == role).height for role in ROLES}
    shown = [f"{number} {role}" for role, number in roles.items() if number]
    without = data.patients["role"].null_count()
    shown += [f"{without} without a role"] if without else []
    patients = f"{plural(data.patients.height, 'patient')}: {', '.join(shown)}" if shown else "no patients"
    return card(count(data.patients["num_cells"].sum()), "Cells", patients)


def _f1_cards(data: ReportData) -> list[str]:
    if data.clusters is None:
        return []
    total = data.clusters.filter(pl.col("cluster").is_null()).row(0, named=True)
    num_test = data.patients.filter(pl.col("role") == "test").height
    cells = plural(total["num_labelled"], "labelled cell")
    measured = f"CTC against the rest, {cells} of {plural(num_test, 'test patient')}"
    cards = [card(fraction(total["f1"]), "F1", measured)]
    scored = data.clusters.filter((pl.col("cluster") >= 0) & pl.col("f1").is_not_null()).sort("f1")
    if scored.height:
        weakest = scored.row(0, named=True)
        detail = f"{cluster_name(weakest['cluster'])}, {count(weakest['num_labelled'])} labelled test cells"
        cards.append(card(fraction(weakest["f1"]), "F1 of the weakest cluster", detail))
    return cards


def _candidate_cards(data: ReportData) -> list[str]:
    if data.candidates is None:
        return []
    searched = data.patients.filter(pl.col("num_candidates").is_not_null())
    detail = f"of {count(searched['num_cells'].sum())} cells of {plural(searched.height, 'patient')}"
    cards = [card(count(data.candidates.height), "Candidates to review", detail)]
    if data.ppv is not None and data.ppv.height:
        total = data.ppv.row(-1, named=True)
        ppv = f"against {fraction(total['cellsearch_ppv'])} of CellSearch's {count(total['num_events'])} events"
        cards.append(card(fraction(total["model_ppv"]), "Candidates that are CTCs", ppv))
        only = f"only the model {count(total['num_model_only'])}, only CellSearch {count(total['num_cellsearch_only'])}"
        cards.append(card(count(total["num_both"]), "CTCs found by both", only))
    return cards


def flow(data: ReportData) -> Section:
    """What each stage did, and what was set aside."""
    columns = [
        Column("stage", "Stage", words, is_number=False),
        Column("outputs", "Outputs", count),
        Column("units_computed", "Units computed", count),
        Column("units_reused", "Units reused", count),
        Column("seconds", "Seconds", lambda value: f"{value:,.1f}"),
        Column("workers", "Worker processes", count),
        Column("set_aside", "Set aside", count),
        Column("finished_at", "Finished (UTC)", moment, is_number=False),
    ]
    caption = "Stages in order. Seconds add up the units, which run side by side."
    html = table(data.flow, columns, caption) + _failures(data)
    absent = data.flow.filter(pl.col("outputs") == 0)["stage"].to_list()
    if absent:
        html += note(f"Not run: {', '.join(absent)}.")
    return Section("flow", "Flow of the run", html)


def _failures(data: ReportData) -> str:
    if data.failures.is_empty():
        return note("Nothing was set aside.")
    columns = [
        Column("stage", "Stage", words, is_number=False),
        Column("unit", "Unit", words, is_number=False),
        Column("source", "Source", words, is_number=False),
        Column("message", "Reason", words, is_number=False),
    ]
    shown = data.failures.head(_MAX_FAILURES_SHOWN)
    rest = data.failures.height - shown.height
    more = note(f"{rest} more are listed in frames/failures.csv.") if rest else ""
    caption = f"Set aside: {data.failures.height}. Everything else went on."
    return table(shown, columns, caption) + more


def latent_map(data: ReportData) -> Section:
    """The interactive latent map; the page's script draws it."""
    title = "Latent map"
    if data.points is None or data.points.is_empty():
        return Section("map", title, missing("Latent map", f"ctc-ray map {data.cohort_uri}"))
    errors = data.points["error"].drop_nulls()
    false_negative, false_positive = errors.eq("false_negative").sum(), errors.eq("false_positive").sum()
    choices = "".join(
        f'<label><input type="radio" name="colour" value="{value}"{" checked" if value == "cluster" else ""}> {text}</label>'
        for value, text in (
            ("cluster", "cluster"),
            ("label", "label"),
            ("role", "role"),
            ("probability", "probability"),
        )
    )
    text = (
        f"{data.points.height:,} cells placed by UMAP. Contours hold nine tenths of a cluster. Crosses are misclassified "
        f"labelled test cells: {false_negative} CTCs called non-CTC, {false_positive} others called CTC. "
        "Point at a cell for its id, patient and probability; drag to zoom, double-click to return."
    )
    html = (
        f'{note(text)}<form class="controls" id="map-controls"><fieldset><legend>Colour by</legend>{choices}</fieldset>'
        '<label><input type="checkbox" name="errors" checked> misclassified test cells</label></form>'
        f'<div id="map-plot" role="img" aria-label="{escape(text)}"></div>'
        "<noscript><p>The map needs scripts; its points are in frames/latent_map.csv.</p></noscript>"
    )
    return Section("map", title, html)


def clusters(data: ReportData) -> Section:
    """F1 per cluster, and what the encoder adds over raw pixels."""
    title = "Classification per cluster"
    if data.clusters is None:
        return Section("clusters", title, missing("Classifier", f"ctc-ray train {data.cohort_uri}"))
    columns = [
        Column("cluster", "Cluster", cluster_name, is_number=False),
        Column("num_cells", "Cells", count),
        Column("num_labelled", "Labelled test cells", count),
        Column("num_ctc", "CTCs among them", count),
        Column("f1", "F1", fraction),
        Column("recall", "Recall", fraction),
        Column("precision", "Precision", fraction),
        Column("raw_pixels_f1", "F1 of raw pixels", fraction),
        Column("reason", "Why undefined", words, is_number=False),
    ]
    caption = (
        "Class CTC on the labelled cells of the test patients. Raw pixels: the same classifier on PCA of the pixels."
    )
    html = table(data.clusters, columns, caption)
    if data.clusters["raw_pixels_f1"].null_count() == data.clusters.height:
        html += note("The raw-pixel baseline has not been trained.")
    return Section("clusters", title, html)


def table2(data: ReportData) -> Section:
    """Predictive values against CellSearch (the paper's Table 2)."""
    title = "Comparison with CellSearch"
    if data.ppv is None or data.ppv.is_empty():
        command = f"ctc-ray compare {data.cohort_uri} --cellsearch DIR"
        return Section("cellsearch", title, missing("Comparison", command))
    columns = [
        Column("patient", "Patient", lambda value: "All patients" if value is None else str(value), is_number=False),
        Column("num_candidates", "Candidates", count),
        Column("num_model_ctc", "CTCs", count),
        Column("model_ppv", "PPV", fraction),
        Column("num_events", "CellSearch events", count),
        Column("num_cellsearch_ctc", "CTCs of CellSearch", count),
        Column("cellsearch_ppv", "PPV of CellSearch", fraction),
        Column("num_both", "Found by both", count),
        Column("num_model_only", "Only the model", count),
        Column("num_cellsearch_only", "Only CellSearch", count),
        Column("num_cellsearch_ctc_segmented", "CellSearch CTCs with a cell", count),
    ]
    total = data.ppv.row(-1, named=True)
    html = table(
        data.ppv,
        columns,
        "Positive predictive value: the share of what is shown that is a CTC (the paper's Table 2).",
        total_last=True,
    )
    if total["num_candidates"]:
        html += note(
            f"The expert looks at {count(total['num_candidates'])} candidates instead of {count(total['num_events'])} events "
            f"(a factor of {total['num_events'] / total['num_candidates']:.1f}). {_judgement(data)}"
        )
    return Section("cellsearch", title, html + _sensitivity(data))


def _judgement(data: ReportData) -> str:
    if data.candidates is None:
        return ""
    sources = data.candidates["judged_by"].drop_nulls().unique().sort().to_list()
    unknown = data.candidates["judged_by"].null_count()
    names = {"truth": "the ground truth of the cartridges", "labels": "the readers' consensus"}
    text = f"Candidates are judged by {' and '.join(names.get(s, s) for s in sources)}." if sources else ""
    return text + (f" {unknown} candidates are not judged." if unknown else "")


def _sensitivity(data: ReportData) -> str:
    if data.sensitivity is None or data.sensitivity.is_empty():
        return ""
    compare = data.config.compare
    summed = data.sensitivity.group_by("tolerance_px").agg(pl.col("num_matches", "num_both").sum()).sort("tolerance_px")
    columns = [
        Column("tolerance_px", "Tolerance (px)", lambda value: f"{value:g}"),
        Column("num_matches", "Matches", count),
        Column("num_both", "CTCs found by both", count),
    ]
    caption = (
        f"How the overlap depends on the tolerance. The report uses {compare.tolerance_px:g} px per axis and an overlap above "
        f"{compare.min_overlap:g} of either box."
    )
    return f"<details><summary>Sensitivity to the tolerance</summary>{table(summed, columns, caption)}</details>"


def real_field(data: ReportData) -> Section:
    """A real fluorescence field with the instances that the same segmentation found."""
    title = "A real fluorescence field"
    if data.real_field is None or data.real_field_png is None or data.real_field.is_empty():
        return Section("real-field", title, missing("Real field", "ctc-ray demo"))
    row: dict[str, Any] = data.real_field.row(0, named=True)
    ap50 = f"{row['average_precision_50']:.3f}"
    alt = f"Fluorescence field in grey with the outlines of {row['num_found']} found instances"
    picture = base64.b64encode(data.real_field_png).decode()
    caption = (
        f"{row['num_found']:,} instances found, {row['num_true']:,} in the reference mask; AP@0.5 = {ap50} "
        f"(true positives over the sum of true positives, false ones and misses). Source: {row['source']}"
    )
    html = (
        f'<figure class="field"><img src="data:image/png;base64,{picture}" alt="{escape(alt)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
    return Section("real-field", title, html)
