"""The page of a simulation says what the functions of the statistics say, and refuses what is no simulation."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal
from rich.console import Console

from ctc_ray.cohort import Cohort
from ctc_ray.config import RunConfig
from ctc_ray.hil.comparison import areas, areas_over_minutes, compare, final_scores, labels_to_reach, worst_clusters
from ctc_ray.hil.statistics import first_and_last, table1
from ctc_ray.progress import Progress
from ctc_ray.records import Record, publish
from ctc_ray.report.simulation_frames import comparison_frame, one_setting, setting_name, settings_of, simulation_frames
from ctc_ray.report.simulation_page import run_simulation_report
from ctc_ray.report.stage import run_report
from ctc_ray.report.terminal import print_summary
from ctc_ray.storage import Store

Write = Callable[..., Any]


class _Page(HTMLParser):
    """Headings, rows of tables, references and elements of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.rows: list[list[str]] = []
        self.sources: list[str] = []
        self.tags: list[str] = []
        self._into: list[str] | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [str(value) for name, value in attrs if name in ("src", "href", "xlink:href") and value]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._into = self.rows[-1]
        if tag == "h2":
            self.headings.append("")
            self._into = self.headings

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th", "h2"):
            self._into = None

    def handle_data(self, data: str) -> None:
        if self._into is not None:
            self._into[-1] += data

    def row(self, *start: str) -> list[str]:
        """The first row that begins so."""
        return next(row for row in self.rows if tuple(row[: len(start)]) == start)


def mean_and_sd(values: pl.Series) -> str:
    numbers = values.to_numpy()
    return f"{np.mean(numbers):.3f} ± {np.std(numbers, ddof=1):.3f}"


def page_of(place: Path) -> str:
    return (place / "report.html").read_text(encoding="utf-8")


def test_page_has_every_section_names_every_strategy_and_asks_for_nothing(simulated: Any) -> None:
    result = run_simulation_report(str(simulated.place))
    names = ["report.html", "table1.csv", "comparison.csv", "figure3.svg"]
    assert [path.rsplit("/", 1)[-1] for path in result.paths] == names
    html = page_of(simulated.place)
    page = _Page(html)
    assert page.headings == [
        "Summary",
        "What was run",
        "Labelling strategies",
        "First and last loop",
        "Comparison of strategies",
    ]
    strategies = simulated.results["strategy"].unique().to_list()
    heads = {row[0] for row in page.rows}
    assert set(strategies) <= heads
    assert all(html.count(f"{strategy}, loop 3: ") == 2 * 4 for strategy in strategies)
    assert all(source.startswith(("data:", "#")) for source in page.sources)
    assert not {"script", "img", "iframe", "object"} & set(page.tags)
    assert "limited-global" in html
    assert "rare-positive" in html
    assert "2,638 for training, 2,773 for the test" in html
    assert "0.987" in html  # a check of the release
    assert "or more are needed" not in html  # twenty seeds are enough


def test_page_shows_the_figures_of_the_functions(simulated: Any) -> None:
    run_simulation_report(str(simulated.place))
    page = _Page(page_of(simulated.place))
    own = simulated.results.filter(pl.col("scenario") == "limited-global")
    shown = page.row("margin", next(r[1] for r in page.rows if r[0] == "margin" and len(r) == 10))
    area = areas(own).filter(pl.col("strategy") == "margin")["value"]
    assert shown[1] == mean_and_sd(area)
    for place, baseline in ((2, "random"), (4, "cluster-f1")):
        found = compare(areas(own), baseline).filter(pl.col("strategy") == "margin").row(0, named=True)
        text = f"{found['mean_difference']:+.4f} [{found['low']:.4f}, {found['high']:.4f}]".replace("-", "−")
        assert shown[place] == text
        assert shown[place + 1] == ("< 0.001" if found["p_holm"] < 0.001 else f"{found['p_holm']:.3f}")
    ends = final_scores(own)
    end = ends.filter(pl.col("strategy") == "margin")["value"]
    assert shown[6] == mean_and_sd(end)
    worst = worst_clusters(own).filter(pl.col("strategy") == "margin")["value"]
    assert shown[7] == mean_and_sd(worst)
    target = float(ends.filter(pl.col("strategy") == "random")["value"].to_numpy().mean())
    reached = labels_to_reach(own, target).filter(pl.col("strategy") == "margin")["value"]
    assert shown[8] == f"{reached.count()} of 20"
    assert shown[9] == f"{np.median(reached.fill_null(float('inf')).to_numpy()):,.0f}"
    first = page.row("init, all strategies")
    assert first[1] == table1(own)["margin"][0]
    assert page.row("margin", table1(own)["margin"][1])[1:] == table1(own)["margin"].gather_every(2, 1).to_list()


def test_page_shows_minutes_only_where_they_say_something_else(simulated: Any) -> None:
    run_simulation_report(str(simulated.place))
    html = page_of(simulated.place)
    assert html.count("the same runs over the expert&#x27;s minutes") == 2  # caption and label of one table
    assert html.count("Every label costs the same time") == 2
    own = simulated.results.filter(pl.col("scenario") == "rare-positive")
    effort = simulated.effort.filter(pl.col("scenario") == "rare-positive")
    minutes = areas_over_minutes(own, effort).filter(pl.col("strategy") == "margin")["value"]
    row = next(row for row in _Page(html).rows if row[0] == "margin" and len(row) == 4)
    assert row[1] == mean_and_sd(minutes)


def test_tables_beside_the_page_hold_the_numbers(simulated: Any) -> None:
    run_simulation_report(str(simulated.place))
    frames = simulation_frames(simulated.results, simulated.effort)
    for name, frame in (("table1", first_and_last(simulated.results)), ("comparison", frames.comparison)):
        saved = pl.read_csv(simulated.place / f"{name}.csv", schema_overrides=frame.schema)
        assert_frame_equal(saved, frame)
    ElementTree.parse(simulated.place / "figure3.svg")


def test_page_goes_where_it_is_asked_to_with_its_tables(simulated: Any, tmp_path: Path) -> None:
    before = sorted(path.name for path in simulated.place.iterdir())
    run_simulation_report(str(simulated.place) + "/", str(tmp_path / "pages" / "page.html"))
    assert sorted(path.name for path in (tmp_path / "pages").iterdir()) == [
        "comparison.csv",
        "figure3.svg",
        "page.html",
        "table1.csv",
    ]
    assert sorted(path.name for path in simulated.place.iterdir()) == before


def test_page_of_two_runs_is_the_same(simulated: Any, tmp_path: Path) -> None:
    pages = []
    for name in ("a.html", "b.html"):
        run_simulation_report(str(simulated.place), str(tmp_path / name))
        pages.append((tmp_path / name).read_bytes())
    assert pages[0] == pages[1]


def test_page_of_a_sweep_over_flip_rates_compares_each_and_shows_what_they_cost(
    write_simulation: Write, tmp_path: Path
) -> None:
    made = write_simulation(tmp_path / "sweep", num_seeds=4, rates=(0.0, 0.05, 0.1), strategies=("random", "margin"))
    run_simulation_report(str(made.place))
    html = page_of(made.place)
    page = _Page(html)
    assert "Intervals and tests are from 4 seeds; 20 or more are needed" in html
    assert "no p value can be below 0.125" in html
    assert "0 %, 5 %, 10 %" in html
    assert html.count("<summary>limited-global, 10 % wrong answers</summary>") == 3
    at = {
        rate: areas(made.results.filter(pl.col("flip_rate") == rate)).filter(pl.col("strategy") == "margin")["value"]
        for rate in (0.0, 0.05, 0.1)
    }
    lost = float(at[0.1].to_numpy().mean() - at[0.0].to_numpy().mean())
    texts = [mean_and_sd(values) for values in at.values()]
    assert ["margin", *texts, f"{lost:+.4f}".replace("-", "−")] in page.rows
    saved = pl.read_csv(made.place / "comparison.csv")
    assert saved.select("flip_rate", "strategy").unique().height == 6


def test_page_of_hostile_names_shows_them_as_text(write_simulation: Write, tmp_path: Path) -> None:
    hostile = '<script>alert("x")</script>'
    names = ("random", hostile, *(f"<i>{n}</i>" for n in range(6)))
    made = write_simulation(tmp_path / "a & <b>", num_seeds=2, strategies=names)
    run_simulation_report(str(made.place))
    html = page_of(made.place)
    assert not {"script", "i", "b"} & set(_Page(html).tags)
    assert "&lt;script&gt;" in html
    ElementTree.parse(made.place / "figure3.svg")


def test_page_without_effort_or_baselines_shows_what_is_known(tmp_path: Path, write_simulation: Write) -> None:
    made = write_simulation(tmp_path / "full", num_seeds=1, strategies=("margin",))
    results = made.results.to_arrow()
    record = Record("simulate", "paper", "sim-2", {}, {})
    publish(Store(tmp_path), "bare", {"results.parquet": results}, record)
    run_simulation_report(str(tmp_path / "bare"))
    html = page_of(tmp_path / "bare")
    row = next(row for row in _Page(html).rows if row[0] == "margin" and len(row) == 10)
    assert row[2:6] == ["–"] * 4
    assert row[8:] == ["–", "–"]
    assert "minutes" not in html.split("Comparison of strategies</h2>")[1].split("</p>", 1)[1]
    assert "from 1 seed;" in html
    saved = pl.read_csv(tmp_path / "bare" / "comparison.csv")
    assert saved["minutes_area"].null_count() == saved.height == 1


@pytest.mark.parametrize(
    ("num_seeds", "said", "unsaid"),
    [
        (5, "20 or more are needed for a comparison. With 5 pairs no p value can be below 0.0625.", "from 5 seed;"),
        (9, "are from 9 seeds; 20 or more are needed for a comparison. <code>", "no p value"),
        (20, "20: 101 to 120", "or more are needed"),
    ],
)
def test_page_says_how_many_seeds_there_are_and_what_few_of_them_cannot_show(
    write_simulation: Write, tmp_path: Path, num_seeds: int, said: str, unsaid: str
) -> None:
    made = write_simulation(tmp_path / "run", num_seeds=num_seeds, strategies=("random", "margin"))
    run_simulation_report(str(made.place))
    html = page_of(made.place)
    assert said in html
    assert unsaid not in html


def test_page_of_arms_with_fewer_runs_says_so_and_counts_their_pairs(simulated: Any, tmp_path: Path) -> None:
    given_up = (pl.col("strategy") != "margin") | (pl.col("run") <= 12)
    store = Store(tmp_path)
    tables = {
        "results.parquet": simulated.results.filter(given_up).to_arrow(),
        "effort.parquet": simulated.effort.filter(given_up).to_arrow(),
    }
    publish(store, "run", tables, Record("simulate", "paper", "sim-3", {"flip_rates": [0.05]}, {}))
    run_simulation_report(str(tmp_path / "run"))
    html = page_of(tmp_path / "run")
    page = _Page(html)
    assert "Some strategies have fewer runs" in html
    assert "from 12 to 20 seeds; 20 or more are needed" in html
    assert "<dd>5 %</dd>" in html
    assert "of up to 20 runs" in html
    runs = {row[0]: row[1] for row in page.rows if len(row) == 11}
    assert (runs["margin"], runs["entropy"]) == ("12", "20")
    entropy = next(row for row in page.rows if row[0] == "entropy" and len(row) == 11)
    assert "pairs" not in "".join(entropy)


def test_comparison_frame_of_a_strategy_run_with_fewer_seeds_says_how_many_pairs(simulated: Any) -> None:
    own = simulated.results.filter(pl.col("scenario") == "limited-global")
    fewer = own.filter((pl.col("strategy") != "margin") | (pl.col("run") <= 12))
    frame = comparison_frame(fewer, None)
    row = frame.filter(pl.col("strategy") == "margin").row(0, named=True)
    assert (row["num_runs"], row["area_vs_random_num_pairs"]) == (12, 12)
    assert frame["area"].to_list() == sorted(frame["area"], reverse=True)


def test_settings_come_in_order_and_are_named() -> None:
    frame = pl.DataFrame(
        {
            "scenario": ["limited-local", "limited-local", "limited-global"],
            "main_cluster": pl.Series([3, 2, None], dtype=pl.Int16),
            "flip_rate": [0.05, 0.1, 0.0],
        }
    )
    found = [setting for setting, _ in settings_of(frame)]
    assert [setting_name(setting) for setting in found] == [
        "limited-global, 0 % wrong answers",
        "limited-local, main cluster 2, 10 % wrong answers",
        "limited-local, main cluster 3, 5 % wrong answers",
    ]
    assert one_setting(frame, found[0]).height == 1


def test_report_of_a_cohort_shows_the_same_sections(write_simulation: Write, tmp_path: Path) -> None:
    cohort = Cohort.open(str(tmp_path / "cohort"), create=True)
    cohort.add_patients({"007": "y"})
    place = tmp_path / "cohort" / cohort.simulation(RunConfig().hil.name)
    made = write_simulation(place, num_seeds=5)
    run_report(RunConfig(), cohort, progress=Progress(quiet=True))
    run_simulation_report(str(place), str(tmp_path / "page.html"))
    of_cohort = cohort.store.read_bytes(f"{cohort.report('report')}/report.html").decode()
    of_simulation = (tmp_path / "page.html").read_text(encoding="utf-8")
    for anchor in ("strategies", "table1", "comparison"):
        pattern = rf'<section id="{anchor}".*?</section>'
        sections = [re.search(pattern, html, re.S) for html in (of_cohort, of_simulation)]
        assert sections[0] is not None
        assert sections[1] is not None
        assert sections[0].group() == sections[1].group()
    saved = cohort.store.read_bytes(f"{cohort.report('report')}/frames/comparison.csv")
    expected = comparison_frame(made.results, made.effort)
    assert_frame_equal(pl.read_csv(io.BytesIO(saved), schema_overrides=expected.schema), expected)


def test_print_summary_of_a_sweep_over_flip_rates_keeps_to_the_least(write_simulation: Write, tmp_path: Path) -> None:
    cohort = Cohort.open(str(tmp_path / "cohort"), create=True)
    cohort.add_patients({"007": "y"})
    place = tmp_path / "cohort" / cohort.simulation(RunConfig().hil.name)
    made = write_simulation(place, num_seeds=2, rates=(0.0, 0.1), strategies=("random", "margin"))
    sink = io.StringIO()
    print_summary(cohort, RunConfig(), console=Console(file=sink, width=120))
    lines = [line for line in sink.getvalue().splitlines() if "wrong answers" in line]
    ends = first_and_last(made.results).filter(pl.col("cluster").is_null() & (pl.col("flip_rate") == 0.0))
    margin = ends.filter(pl.col("strategy") == "margin").sort("loop")["mean_f1"]
    assert len(lines) == 2
    assert lines[0].startswith("limited-global, 0 % wrong answers: margin")
    assert lines[0].split()[-3:] == [f"{margin[0]:.3f}", f"{margin[-1]:.3f}", "400"]
