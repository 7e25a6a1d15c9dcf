"""Sections that show cells: examples of each cluster, candidates, and what only one of the two systems found."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import polars as pl

from ctc_ray.report.data import ReportData
from ctc_ray.report.figures import cell_strip, cluster_colour, cluster_name, png_uri
from ctc_ray.report.markup import Section, cell_figure, missing, note
from ctc_ray.report.survey import limits_of

MAX_COMPARED_CELLS = 12
"""Cells shown of those that only one system found."""
_LABEL_WORDS = {"ctc": "CTC", "non_ctc": "non-CTC", "unsure": "unsure", "artefact": "artefact"}
_PANELS = (
    '<div class="heads" aria-hidden="true"><span>DAPI/CK</span><span>DAPI</span><span>CK</span><span>CD45</span></div>'
)


def cell_picture(data: ReportData, cell_id: str | None) -> str | None:
    """`data:` URI of a cell's strip; None where its crop is not at hand."""
    crop = data.crops.get(cell_id) if cell_id is not None else None
    if crop is None:
        return None
    limits: Mapping[str, tuple[int, int]] = limits_of(data.contrast, str(crop.dtype))
    return png_uri(cell_strip(crop, limits, data.config.report.gamma)) if limits else None


def cluster_gallery(data: ReportData) -> Section:
    """Example cells of every cluster (right side of the paper's Figure 2)."""
    title = "Cells of each cluster"
    if data.examples is None or data.examples.is_empty():
        return Section("cells", title, missing("Latent map", f"ctc-ray map {data.cohort_uri}"))
    parts = []
    for cluster in data.examples["cluster"].unique().sort().to_list():
        rows = data.examples.filter(pl.col("cluster") == cluster).sort("rank")
        figures = "".join(_example(data, row) for row in rows.iter_rows(named=True))
        parts.append(
            f'<section class="cluster" style="--cluster:{cluster_colour(cluster)}"><h3>{escape(cluster_name(cluster))}</h3>'
            f"{_PANELS}{figures}</section>"
        )
    return Section("cells", title, note(_contrast_words(data)) + f'<div class="clusters">{"".join(parts)}</div>')


def _contrast_words(data: ReportData) -> str:
    low, high = data.config.report.contrast_percentiles
    return (
        "Each panel is 48 pixels (30.7 µm) wide: DAPI in magenta with CK in green, then DAPI, CK and CD45. "
        f"One contrast per channel for all cells ({low:g} to {high:g} % of the cohort's pixels, grey curve of power "
        f"{data.config.report.gamma:g}), so brightness can be compared."
    )


def _example(data: ReportData, row: dict[str, Any]) -> str:
    picture = cell_picture(data, row["cell_id"])
    if picture is None:
        return ""
    label = _LABEL_WORDS.get(row["label"], "not labelled")
    chance = "" if row["probability"] is None else f", probability {row['probability']:.2f}"
    lines = [f"{label}{chance}", f"patient {row['patient']} ({row['role'] or 'no role'})"]
    alt = f"Cell of {cluster_name(row['cluster']).lower()}, {lines[0]}: DAPI and CK together, DAPI, CK, CD45"
    return cell_figure(picture, alt, lines)


def candidates(data: ReportData) -> Section:
    """Candidates by probability, for the expert's review."""
    title = "Candidates"
    if data.candidates is None:
        return Section("candidates", title, missing("Detection", f"ctc-ray detect {data.cohort_uri}"))
    threshold = data.config.detect.threshold
    shown = data.candidates.head(data.config.report.gallery_cells)
    text = (
        f"{data.candidates.height:,} physical cells have a probability of at least {threshold:g}; "
        f"the first {shown.height:,} are shown, the most probable first. All are in frames/candidates.csv."
    )
    figures = "".join(_candidate(data, row) for row in shown.iter_rows(named=True))
    empty = "" if figures else note("No cell reaches the threshold.")
    return Section("candidates", title, note(text) + empty + f'<div class="gallery">{figures}</div>')


def _measures(row: dict[str, Any]) -> list[str]:
    """Field and diameter, each where it is known: imported crops may come without."""
    field = [] if row["field"] is None else [f"field {row['field']}"]
    return field if row["diameter_um"] is None else [*field, f"{row['diameter_um']:.1f} µm"]


def _candidate(data: ReportData, row: dict[str, Any]) -> str:
    picture = cell_picture(data, row["cell_id"])
    if picture is None:
        return ""
    lines = [
        f"probability {row['probability']:.3f}",
        ", ".join([f"patient {row['patient']}", *_measures(row), cluster_name(row["cluster"]).lower()]),
    ]
    tags = []
    if row["is_ctc"] is not None:
        tags.append(f"{'CTC' if row['is_ctc'] else 'not a CTC'} ({row['judged_by']})")
    if row["found_by"] == "model":
        tags.append("not listed by CellSearch")
    elif row["found_by"] == "both":
        tags.append("CTC of CellSearch" if row["event_is_ctc"] else "listed by CellSearch, not called a CTC")
    if row["num_detections"] > 1:
        tags.append(f"{row['num_detections']} detections")
    alt = f"Candidate of patient {row['patient']}, field {row['field']}: DAPI and CK together, DAPI, CK, CD45"
    return cell_figure(picture, alt, lines, tags=tags)


def only_one_system(data: ReportData) -> Section:
    """CTCs found by the model but not by CellSearch, and the reverse (the paper's Figure 4)."""
    title = "Found by one system only"
    if data.missed is None or data.candidates is None:
        command = f"ctc-ray compare {data.cohort_uri} --cellsearch DIR"
        return Section("one-system", title, missing("Comparison", command))
    model = model_only(data.candidates)
    left = "".join(_candidate(data, row) for row in model.head(MAX_COMPARED_CELLS).iter_rows(named=True))
    right = "".join(_missed(data, row) for row in data.missed.head(MAX_COMPARED_CELLS).iter_rows(named=True))
    unseen = data.missed["nearest_cell_id"].null_count()
    html = (
        f'<div class="two"><section><h3>By the model, not by CellSearch</h3>{note(f"{model.height} CTCs.")}'
        f'<div class="gallery">{left}</div></section><section><h3>By CellSearch, not by the model</h3>'
        f"{note(f'{data.missed.height} CTCs; at {unseen} of them no cell was segmented. Shown is the nearest cell.')}"
        f'<div class="gallery">{right}</div></section></div>'
    )
    return Section("one-system", title, html)


def model_only(candidates: pl.DataFrame) -> pl.DataFrame:
    """Candidates judged to be CTCs that match no event which CellSearch's operator called a CTC."""
    return candidates.filter(pl.col("is_ctc") & ~pl.col("event_is_ctc").fill_null(value=False))


def _missed(data: ReportData, row: dict[str, Any]) -> str:
    picture = cell_picture(data, row["nearest_cell_id"])
    where = f"patient {row['patient']}, field {row['field']}"
    if picture is None:
        return f'<figure class="cell"><p class="missing">No cell segmented here</p><figcaption>{escape(where)}</figcaption></figure>'
    chance = row["nearest_probability"]
    lines = ["probability unknown" if chance is None else f"probability {chance:.3f}", where]
    return cell_figure(picture, f"CTC of CellSearch, {where}: DAPI and CK together, DAPI, CK, CD45", lines)
