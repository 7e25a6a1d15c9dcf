"""Two maps of one cohort side by side, for example clustered with and without the test patients (the paper's Figure S1)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import polars as pl

from ctc_ray.cohort import Cohort
from ctc_ray.config import RunConfig
from ctc_ray.detect.stage import table_frame
from ctc_ray.latent.comparison import AGREEMENT_FILE, CELLS_FILE, SHARED_FILE, agreement_folder
from ctc_ray.records import damaged_files, read_record
from ctc_ray.report.figures import BACKGROUND_COLOUR, cluster_colour, cluster_name
from ctc_ray.report.markup import Column, Section, count, fraction, note, table

_SIDE_PX = 320
_MARGIN_PX = 8


@dataclass(frozen=True)
class MapAgreement:
    """How well the shown map agrees with another.

    Attributes:
        summary: as in `agreement.json`.
        shared: cluster, cluster_other, num_cells, matched.
        cells: a sample: cell_id, patient, places and clusters on both maps.
    """

    summary: dict[str, Any]
    shared: pl.DataFrame
    cells: pl.DataFrame


def compared_maps(cohort: Cohort, config: RunConfig) -> list[str]:
    """Maps that the shown one was compared with: `map.compare_with`, or all of them, sorted."""
    settings = config.map
    folder = f"{cohort.latent(settings.encoder, settings.name)}/agreement"
    names = cohort.store.list_folders(folder) if settings.compare_with is None else [settings.compare_with]
    records = {name: read_record(cohort.store, f"{folder}/{name}") for name in names}
    return [
        name
        for name, record in records.items()
        if record is not None and not damaged_files(cohort.store, f"{folder}/{name}", record)
    ]


def agreement_identity(cohort: Cohort, config: RunConfig) -> str:
    """Identities of the comparisons, for the inputs of a report."""
    settings = config.map
    folders = [
        agreement_folder(cohort, settings.encoder, settings.name, name) for name in compared_maps(cohort, config)
    ]
    return ",".join(cohort.require(folder, "map").identity for folder in folders) or "none"


def read_agreement(cohort: Cohort, config: RunConfig) -> MapAgreement | None:
    """The first comparison of the shown map; None where it was compared with none."""
    names = compared_maps(cohort, config)
    if not names:
        return None
    store = cohort.store
    folder = agreement_folder(cohort, config.map.encoder, config.map.name, names[0])
    return MapAgreement(
        json.loads(store.read_bytes(f"{folder}/{AGREEMENT_FILE}")),
        table_frame(store.read_table(f"{folder}/{SHARED_FILE}")),
        table_frame(store.read_table(f"{folder}/{CELLS_FILE}")),
    )


def map_agreement(agreement: MapAgreement) -> Section:
    """Both maps, with matched clusters in one colour, and the cells they share."""
    summary = agreement.summary
    matched = dict(agreement.shared.filter("matched").select("cluster_other", "cluster").iter_rows())
    text = (
        f"{count(summary['num_cells'])} cells lie on both maps. Adjusted Rand index {fraction(summary['adjusted_rand'])} (1: the "
        f"same clusters), {fraction(summary['adjusted_rand_of_clustered'])} of the cells that both cluster; "
        f"{fraction(summary['equal_share'])} of the cells are in clusters matched to each other. Trustworthiness of the planes "
        f"{fraction(summary['trustworthiness'])} and {fraction(summary['trustworthiness_other'])}. Matched clusters have one "
        f"colour, those without a partner are black; {agreement.cells.height:,} cells are drawn."
    )
    panels = "".join(
        f"<figure><figcaption>{escape(name)}</figcaption>{map_panel(agreement.cells, end, colours, name)}</figure>"
        for name, end, colours in ((summary["map"], "", None), (summary["other"], "_other", matched))
    )
    columns = [
        Column("cluster", f"Cluster of {summary['map']}", cluster_name, is_number=False),
        Column("cluster_other", f"Cluster of {summary['other']}", cluster_name, is_number=False),
        Column("num_cells", "Cells", count),
        Column("matched", "Matched", lambda value: "yes" if value else "", is_number=False),
    ]
    html = f'{note(text)}<div class="panels">{panels}</div>' + table(
        agreement.shared, columns, "Cells that each pair of clusters shares."
    )
    return Section("map-agreement", f"Clusters of {summary['map']} and {summary['other']}", html)


def map_panel(cells: pl.DataFrame, end: str, matched: dict[int, int] | None, title: str) -> str:
    """Draw one map as SVG, a dot a cell.

    Args:
        cells: sample of both maps.
        end: suffix of the columns: "" or "_other".
        matched: cluster here -> cluster whose colour it takes; those without a partner are black. None: their own.
        title: for readers that do not see it.
    """
    x, y, name = f"umap_x{end}", f"umap_y{end}", f"cluster{end}"
    inner = _SIDE_PX - 2 * _MARGIN_PX
    places = cells.select(
        *(
            ((pl.col(axis) - pl.col(axis).min()) / _extent(cells, axis) * inner + _MARGIN_PX).alias(axis)
            for axis in (x, y)
        ),
        name,
    )
    parts = []
    for (cluster,), own in places.group_by([name], maintain_order=True):
        number = int(str(cluster))
        partner = number if matched is None else matched.get(number)
        colour = "#000000" if partner is None else cluster_colour(partner)
        dots = "".join(f"M{a:.1f} {_SIDE_PX - b:.1f}h0" for a, b in own.select(x, y).iter_rows())
        opacity = "0.35" if colour == BACKGROUND_COLOUR else "0.8"
        parts.append(
            f'<path d="{dots}" fill="none" stroke="{colour}" stroke-width="3" stroke-linecap="round" opacity="{opacity}">'
            f"<title>{escape(cluster_name(number))}</title></path>"
        )
    label = f"Cells on the map {title}, coloured by cluster"
    return f'<svg viewBox="0 0 {_SIDE_PX} {_SIDE_PX}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _extent(cells: pl.DataFrame, axis: str) -> float:
    values = cells[axis].to_numpy()
    return float(np.ptp(values)) if len(values) and np.ptp(values) > 0 else 1.0
