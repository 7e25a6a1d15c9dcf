"""One self-contained HTML page: styles, script, pictures and data inside, no request to anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from html import escape
from importlib.resources import files

from ctc_ray.records import digest_of
from ctc_ray.report import agreement, galleries, methods, sections, simulation_sections
from ctc_ray.report.curves import curve_styles
from ctc_ray.report.data import ReportData
from ctc_ray.report.figures import map_payload
from ctc_ray.report.markup import Section

_POLICY = (
    "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline' 'unsafe-eval'; "
    "base-uri 'none'; form-action 'none'"
)
"""The browser itself refuses requests; the WebGL library compiles its drawing code, hence 'unsafe-eval'."""


def build_sections(data: ReportData) -> list[Section]:
    """All sections in the order in which an expert reads."""
    simulate = f"ctc-ray simulate {data.cohort_uri}"
    return [
        sections.headline(data),
        sections.flow(data),
        sections.latent_map(data),
        *([] if data.agreement is None else [agreement.map_agreement(data.agreement)]),
        galleries.cluster_gallery(data),
        sections.clusters(data),
        simulation_sections.learning_curves(data.simulation, simulate),
        simulation_sections.table1(data.simulation, simulate),
        simulation_sections.comparison(data.simulation, simulate),
        sections.table2(data),
        galleries.candidates(data),
        galleries.only_one_system(data),
        sections.real_field(data),
        methods.methods(data),
        methods.glossary(),
    ]


def render_page(data: ReportData) -> str:
    """Write the page."""
    return document(data.config.report.title, data.cohort_uri, build_sections(data), _scripts(data))


def document(title: str, source: str, parts: Sequence[Section], scripts: str = "") -> str:
    """One HTML document in the style of all pages.

    Args:
        title: heading and title of the page.
        source: what it is about: a path or URI.
        parts: sections in order.
        scripts: script elements, already escaped.
    """
    links = "".join(f'<li><a href="#{part.anchor}">{escape(part.title)}</a></li>' for part in parts)
    body = "".join(
        f'<section id="{part.anchor}" aria-labelledby="{part.anchor}-title"><h2 id="{part.anchor}-title">{escape(part.title)}</h2>'
        f"{part.html}</section>"
        for part in parts
    )
    name = escape(title)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f'<title>{name}</title><link rel="icon" href="data:,"><style>{_resource("page.css")}{curve_styles()}</style></head><body>'
        f'<a class="skip" href="#content">Skip to the report</a><header><h1>{name}</h1>'
        f"<p>{escape(source)}</p>"
        f'<nav aria-label="Sections"><ol>{links}</ol></nav></header><main id="content">{body}</main>{scripts}</body></html>\n'
    )


def _scripts(data: ReportData) -> str:
    """The map's data, the drawing library and the script that draws; nothing where there is no map."""
    if data.points is None or data.points.is_empty() or data.outlines is None:
        return ""
    payload = map_payload(data.points, data.outlines)
    return (
        f'<script type="application/json" id="map-data">{payload}</script>'
        f"<script>{_plotly_script()}</script><script>{_resource('map.js')}</script>"
    )


def page_resources_digest() -> str:
    """Digest of the page's style and script: a new version of them writes reports again."""
    return digest_of([_resource("page.css"), curve_styles(), _resource("map.js")])


@cache
def _resource(name: str) -> str:
    return files("ctc_ray.report").joinpath(name).read_text(encoding="utf-8")


@cache
def _plotly_script() -> str:
    """Plotly's own bundle, as its Python package ships it."""
    return files("plotly").joinpath("package_data", "plotly.min.js").read_text(encoding="utf-8")
