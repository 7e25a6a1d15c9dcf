"""Learning curves and interval plots: marks lie where the numbers say, and strategies can be told apart."""

from __future__ import annotations

import itertools
import re
from typing import Any
from xml.etree import ElementTree

import polars as pl
import pytest

from ctc_ray.hil.statistics import paper_order
from ctc_ray.report.curves import curve_styles, f1_panel, figure3_svg, highlighted, key_lines, panels_of
from ctc_ray.report.forest import forest_plot, interval, signed
from ctc_ray.report.simulation_frames import simulation_frames

SVG = "{http://www.w3.org/2000/svg}"


def test_f1_panel_known_values_lie_at_their_heights() -> None:
    frame = pl.DataFrame(
        {
            "strategy": ["random"] * 2,
            "loop": [0, 1],
            "num_train": [100, 200],
            "mean_f1": [0.6, 1.0],
            "sd_f1": [None, 0.1],
            "num_runs": [1, 5],
        },
        schema_overrides={"sd_f1": pl.Float64},
    )
    svg = f1_panel(frame, "Cluster 0", ["random"])
    points = re.search(r'<polyline class="line" points="([^"]+)"', svg)
    assert points is not None
    (x0, y0), (x1, y1) = (map(float, pair.split(",")) for pair in points.group(1).split())
    assert x0 < x1
    assert y1 == 14.0  # the top of the panel is 1.0
    assert y0 == pytest.approx(14 + (230 - 14 - 40) * (1 if "0.6</text>" in svg else 0.4), abs=0.1)
    assert "random, loop 1: 1.000 ± 0.100 (5 runs)" in svg


def test_f1_panel_undefined_values_are_left_out() -> None:
    frame = pl.DataFrame(
        {"strategy": ["random"], "loop": [0], "num_train": [9], "mean_f1": [None], "sd_f1": [None], "num_runs": [0]},
        schema_overrides={"mean_f1": pl.Float64, "sd_f1": pl.Float64},
    )
    assert "polyline" not in f1_panel(frame, "Cluster 0", ["random"])


def test_f1_panel_of_arms_with_other_numbers_of_labels_says_the_range() -> None:
    frame = pl.DataFrame(
        {
            "strategy": ["random", "random", "margin", "margin"],
            "loop": [0, 1, 0, 1],
            "num_train": [100, 112, 100, 120],
            "mean_f1": [0.5, 0.6, 0.5, 0.7],
            "sd_f1": [0.1] * 4,
            "num_runs": [5] * 4,
        }
    )
    svg = f1_panel(frame, "All cells", ["random", "margin"])
    assert ">112–120</text>" in svg
    assert ">100</text>" in svg


def test_f1_panel_of_many_loops_keeps_its_ticks_apart() -> None:
    loops = list(range(31))
    frame = pl.DataFrame(
        {"strategy": "random", "loop": loops, "num_train": [100 + 10 * n for n in loops], "mean_f1": 0.5, "sd_f1": 0.1}
    ).with_columns(num_runs=pl.lit(5))
    places = [
        float(x) for x in re.findall(r'<text class="tick" x="([\d.]+)" y="208"', f1_panel(frame, "A", ["random"]))
    ]
    assert 2 <= len(places) <= 7
    assert min(b - a for a, b in itertools.pairwise(places)) > 30


def test_f1_panel_draws_the_chosen_strategies_above_the_others() -> None:
    frame = pl.DataFrame(
        {"strategy": ["a", "b", "c"], "loop": 0, "num_train": 100, "mean_f1": 0.5, "sd_f1": 0.1, "num_runs": 5}
    )
    svg = f1_panel(frame, "A", ["a", "b", "c"], chosen=["a"])
    assert re.findall(r'<g class="arm k(\d)', svg) == ["1", "2", "0"]


def test_highlighted_all_of_a_few_and_of_many_the_papers_two_and_the_best() -> None:
    many = ["cluster-f1", "random", "a", "b", "c", "d", "e"]
    comparison = pl.DataFrame({"strategy": ["e", "d", "random"], "area": [None, 0.9, 0.8]})
    assert highlighted(many, comparison) == ["cluster-f1", "random", "d"]
    assert highlighted(many[:6], comparison) == many[:6]
    assert highlighted(many, comparison.head(0)) == ["cluster-f1", "random"]


def test_key_gives_each_of_thirty_strategies_a_look_of_its_own() -> None:
    order = [f"strategy {n}" for n in range(30)]
    looks = re.findall(r'<svg class="(c\d d\d)"', key_lines(order, order, order[:2]))
    assert len(looks) == len(set(looks)) == 30
    assert key_lines(order, order, order[:2]).count(" checked>") == 2
    styles = curve_styles()
    assert all(f".{part}{{" in styles for look in looks for part in look.split())


def test_figure3_is_one_svg_file_with_every_panel_and_strategy(simulated: Any) -> None:
    frames = simulation_frames(simulated.results, simulated.effort)
    text = figure3_svg(frames.curves, frames.comparison)
    root = ElementTree.fromstring(text)
    assert root.tag == f"{SVG}svg"
    assert "var(" not in text  # some programs that edit SVG know no variables
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    panels = root.findall(f"{SVG}svg")
    assert len(panels) == 2 * 4
    order = paper_order(frames.curves["strategy"].unique())
    for panel in panels:
        arms = [group for group in panel.findall(f"{SVG}g") if "arm" in str(group.get("class"))]
        assert len(arms) == len(order)
        assert sum("muted" in str(arm.get("class")) for arm in arms) == len(order) - 3
    words = " ".join(element.text or "" for element in root.iter(f"{SVG}text"))
    assert all(name in words for name in (*order, "limited-global", "rare-positive", "All cells", "Background"))
    bottom = max(float(p.get("y", 0)) + float(p.get("height", 0)) for p in panels)
    assert bottom <= float(root.get("height", 0))


def test_panels_start_with_all_cells_then_background_then_the_clusters(simulated: Any) -> None:
    curves = simulation_frames(simulated.results, None).curves
    assert [name for name, _ in panels_of(curves)] == ["All cells", "Background", "Cluster 0", "Cluster 1"]


def _differences(**changes: Any) -> pl.DataFrame:
    values: dict[str, Any] = {
        "strategy": ["<b>good</b>", "bad", "unsure", "random", "single"],
        "gain": [0.02, -0.03, 0.001, None, 0.01],
        "gain_low": [0.01, -0.04, -0.01, None, None],
        "gain_high": [0.03, -0.02, 0.012, None, None],
        "gain_p_holm": [0.001, 0.04, 0.9, None, None],
    }
    return pl.DataFrame({**values, **changes})


def test_forest_plot_marks_lie_in_the_order_of_the_numbers() -> None:
    svg = forest_plot(_differences(), "gain", "title & more")
    assert "title &amp; more" in svg
    assert "<b>" not in svg
    zero = float(re.findall(r'<line class="zero" x1="([\d.]+)"', svg)[0])
    points = [float(x) for x in re.findall(r'<circle class="point[^"]*" cx="([\d.]+)"', svg)]
    bars = [(float(a), float(b)) for a, b in re.findall(r'<line class="interval" x1="([\d.]+)" x2="([\d.]+)"', svg)]
    assert len(points) == 4
    assert len(bars) == 3
    assert points[1] < zero < points[2] < points[3] < points[0]
    assert all(low < point < high for (low, high), point in zip(bars, points, strict=False))
    assert bars[0][0] > zero > bars[1][1]
    assert bars[2][0] < zero < bars[2][1]
    assert points[0] - zero == pytest.approx(2 * (points[3] - zero), abs=0.2)


def test_forest_plot_fills_the_points_whose_corrected_p_is_small() -> None:
    svg = forest_plot(_differences(), "gain", "title")
    assert [c == " filled" for c in re.findall(r'<circle class="point([^"]*)"', svg)] == [True, True, False, False]


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 20.0])
def test_forest_plot_has_few_ticks_and_stays_inside_at_any_scale(scale: float) -> None:
    names = ("gain", "gain_low", "gain_high")
    svg = forest_plot(_differences().with_columns(pl.col(name) * scale for name in names), "gain", "title")
    width = float(re.findall(r'viewBox="0 0 (\d+)', svg)[0])
    ticks = re.findall(r'<line class="(?:zero|grid)" x1="([\d.]+)"', svg)
    assert 3 <= len(ticks) <= 7
    assert all(0 < float(x) < width for x in re.findall(r'(?:cx|x1|x2)="([-\d.]+)"', svg))


def test_forest_plot_without_differences_is_an_empty_plot() -> None:
    assert "circle" not in forest_plot(_differences().head(0), "gain", "title")


def test_differences_are_written_with_a_true_minus() -> None:
    assert signed(-0.0123) == "−0.0123"
    assert signed(0.0123, 2) == "+0.01"
    assert signed(None) == "–"
    assert interval(-0.1, 0.2, 2) == " [−0.10, 0.20]"
    assert interval(None, None) == ""
