from __future__ import annotations

import re
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import polars as pl
import pytest
from rich.console import Console

from ctc_ray.cohort import Cohort
from ctc_ray.config import ReportConfig, RunConfig
from ctc_ray.progress import Progress
from ctc_ray.records import State, read_record
from ctc_ray.report.stage import gather, plan_report, run_report
from ctc_ray.report.terminal import print_summary

QUIET = Progress(quiet=True)
PATIENT = '<b>x & "co"'


class _Outline(HTMLParser):
    """Headings, images and table count of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.sources: list[str] = []
        self.bold = 0
        self._heading = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self._heading = tag == "h2"
        self.bold += tag == "b"
        if tag == "img":
            self.pictures.append(values)
        self.sources += [str(values[name]) for name in ("src", "href") if values.get(name)]

    def handle_data(self, data: str) -> None:
        if self._heading:
            self.headings.append(data)
            self._heading = False


def _page(cohort: Cohort) -> str:
    return cohort.store.read_bytes(f"{cohort.report('report')}/report.html").decode()


def test_run_report_cohort_with_patients_alone_names_every_command(tmp_path: Path) -> None:
    cohort = Cohort.open(str(tmp_path / "cohort"), create=True)
    cohort.add_patients({PATIENT: "x", "007": "y"})
    result = run_report(RunConfig(), cohort, progress=QUIET)
    assert (result.units_computed, result.set_aside) == (1, 0)
    page = _page(cohort)
    for command in ("map", "train", "simulate", "detect", "compare", "demo"):
        assert f"<code>ctc-ray {command}" in page
    assert "plotly" not in page
    assert "<b>" not in page


def test_run_report_nothing_changed_is_reused_and_a_new_patient_writes_again(tmp_path: Path) -> None:
    cohort = Cohort.open(str(tmp_path / "cohort"), create=True)
    cohort.add_patients({"007": "y"})
    assert plan_report(RunConfig(), cohort)[0].state is State.ABSENT
    run_report(RunConfig(), cohort, progress=QUIET)
    assert run_report(RunConfig(), cohort, progress=QUIET).units_reused == 1
    assert plan_report(RunConfig(), cohort)[0].state is State.COMPLETE
    cohort.add_patients({"008": "z"})
    assert plan_report(RunConfig(), cohort)[0].state is State.STALE
    assert run_report(RunConfig(), cohort, progress=QUIET).units_computed == 1
    assert run_report(RunConfig(), cohort, progress=QUIET, force=True).units_computed == 1


@pytest.mark.ray
def test_run_report_finished_cohort_shows_every_section(finished: Any) -> None:
    page = _page(finished.cohort)
    outline = _Outline()
    outline.feed(re.sub(r"<script>.*?</script>", "", page, flags=re.S))
    assert outline.headings == [
        "Summary",
        "Flow of the run",
        "Latent map",
        "Cells of each cluster",
        "Classification per cluster",
        "Labelling strategies",
        "First and last loop",
        "Comparison of strategies",
        "Comparison with CellSearch",
        "Candidates",
        "Found by one system only",
        "A real fluorescence field",
        "Methods",
        "Glossary",
    ]
    assert "not run" not in re.sub(r"<script>.*?</script>", "", page, flags=re.S)
    assert outline.bold == 0  # the patient's name is text, not markup
    assert len(outline.pictures) > 60
    assert all(picture["alt"] for picture in outline.pictures)
    assert all(source.startswith(("data:", "#")) for source in outline.sources)
    assert len(page) < 15_000_000


@pytest.mark.ray
def test_run_report_finished_cohort_numbers_agree_with_the_tables(finished: Any) -> None:
    cohort = finished.cohort
    folder = f"{cohort.report('report')}/frames"
    saved = {path.rsplit("/", 1)[-1][:-4] for path in cohort.store.list_files(folder, ".csv")}
    assert saved >= {
        "patients",
        "flow",
        "latent_map",
        "clusters",
        "hil_f1",
        "table1",
        "comparison",
        "table2",
        "candidates",
        "contrast",
    }
    table2 = pl.read_csv(cohort.store.read_bytes(f"{folder}/table2.csv"))
    candidates = pl.read_csv(cohort.store.read_bytes(f"{folder}/candidates.csv"))
    assert table2["num_candidates"][-1] == candidates.height
    assert table2["num_model_ctc"][-1] == candidates["is_ctc"].sum()
    page = _page(cohort)
    assert f"<strong>{candidates.height}</strong>" in page
    assert f"<strong>{table2['num_both'][-1]}</strong>" in page
    points = pl.read_csv(cohort.store.read_bytes(f"{folder}/latent_map.csv"))
    assert points.height == 5 * 150
    assert points["probability"].null_count() == 0
    errors = points["error"].drop_nulls()
    test = points.filter(pl.col("role") == "test")
    wrong = (test["label"] == "ctc") != (test["probability"] >= 0.5)
    assert errors.len() == wrong.sum()


@pytest.mark.ray
def test_run_report_without_the_real_field_keeps_the_one_shown(finished: Any) -> None:
    assert run_report(RunConfig(), finished.cohort, progress=QUIET).units_reused == 1
    config = RunConfig(report=ReportConfig(max_map_points=100))
    assert run_report(config, finished.cohort, progress=QUIET).units_computed == 1
    page = _page(finished.cohort)
    assert "AP@0.5 = 0.875" in page
    assert "a test image &lt;of nuclei&gt;" in page
    assert "100 cells placed by UMAP" in page


@pytest.mark.ray
def test_run_report_two_runs_write_the_same_page(finished: Any) -> None:
    config = RunConfig()
    run_report(config, finished.cohort, progress=QUIET, force=True)
    first = _page(finished.cohort)
    run_report(config, finished.cohort, progress=QUIET, force=True)
    assert _page(finished.cohort) == first


@pytest.mark.ray
def test_gather_changed_labels_make_the_report_stale(faked: ModuleType, finished: Any) -> None:
    cohort = finished.cohort
    run_report(RunConfig(), cohort, progress=QUIET)
    faked.write_labels(cohort, {"12": finished.patients["12"]}, batch="second")
    try:
        assert gather(RunConfig(), cohort, None).points is not None
        table = cohort.store.read_table("labels/second.parquet")
        changed = pl.DataFrame(pl.from_arrow(table)).with_columns(label=pl.lit("unsure"), reader=pl.lit("second"))
        cohort.store.write_table("labels/second.parquet", changed.to_arrow().cast(table.schema))
        assert plan_report(RunConfig(), cohort)[0].state is State.STALE
    finally:
        cohort.store.delete("labels/second.parquet")


@pytest.mark.ray
def test_print_summary_finished_cohort_fits_one_screen(finished: Any) -> None:
    sink = StringIO()
    print_summary(finished.cohort, RunConfig(), console=Console(file=sink, width=100))
    text = sink.getvalue()
    assert "750 cells of 5 patients" in text
    for word in ("Cluster 0", "limited-global: cluster-f1", "Müller 3", PATIENT):
        assert word in text
    assert len(text.splitlines()) < 40


def test_print_summary_empty_cohort_prints_what_is_known(tmp_path: Path) -> None:
    cohort = Cohort.open(str(tmp_path / "cohort"), create=True)
    cohort.add_patients({"007": "y"})
    sink = StringIO()
    print_summary(cohort, RunConfig(), console=Console(file=sink, width=100))
    assert "0 cells of 1 patient\n" in sink.getvalue()


def test_run_report_damaged_page_is_written_again(tmp_path: Path) -> None:
    cohort = Cohort.open(str(tmp_path / "cohort"), create=True)
    cohort.add_patients({"007": "y"})
    run_report(RunConfig(), cohort, progress=QUIET)
    folder = cohort.report("report")
    cohort.store.write_bytes(f"{folder}/report.html", b"short")
    assert run_report(RunConfig(), cohort, progress=QUIET).units_computed == 1
    record = read_record(cohort.store, folder)
    assert record is not None
    assert record.files["report.html"] == cohort.store.size(f"{folder}/report.html")
