from __future__ import annotations

import base64
import io
import json

import numpy as np
import polars as pl
import pytest
from PIL import Image

from ctc_ray.errors import SchemaError
from ctc_ray.report.curves import f1_panel
from ctc_ray.report.figures import (
    cell_strip,
    cluster_colour,
    map_payload,
    png_uri,
    real_field_png,
    script_json,
    stretch,
)
from ctc_ray.report.markup import Column, card, cell_figure, missing, note, table
from ctc_ray.report.real_field import RealField

LIMITS = {"dapi": (0, 100), "ck": (0, 200), "cd45": (0, 255)}
HOSTILE = '<script>alert("x")</script> & Müller'


def _points(**changes: object) -> pl.DataFrame:
    values: dict[str, object] = {
        "cell_id": ["a", "b"],
        "patient": ["007", HOSTILE],
        "role": ["test", None],
        "umap_x": pl.Series([0.12345, 2.0], dtype=pl.Float32),
        "umap_y": pl.Series([1.0, -2.0], dtype=pl.Float32),
        "cluster": pl.Series([0, -1], dtype=pl.Int16),
        "label": ["ctc", None],
        "probability": pl.Series([0.25, None], dtype=pl.Float32),
        "error": ["false_negative", None],
    }
    return pl.DataFrame({**values, **changes})


def _outlines() -> pl.DataFrame:
    return pl.DataFrame(
        {"cluster": [0, 0, 0], "part": [0, 0, 0], "position": [0, 1, 2], "x": [0.0, 1.0, 0.0], "y": [0.0, 0.0, 1.0]}
    )


def test_stretch_limits_become_black_and_white() -> None:
    assert stretch(np.array([0, 10, 60, 110, 400]), 10, 110).tolist() == [0, 0, 128, 255, 255]


def test_cell_strip_panels_are_magenta_dapi_green_ck_then_grey_channels() -> None:
    crop = np.zeros((3, 48, 48), np.uint8)
    crop[0, 10, 10], crop[1, 20, 20], crop[2, 30, 30] = 100, 200, 255
    strip = cell_strip(crop, LIMITS)
    assert strip.shape == (48, 201, 4)
    assert strip[10, 10].tolist() == [255, 0, 255, 255]
    assert strip[20, 20].tolist() == [0, 255, 0, 255]
    for panel, (row, col) in enumerate(((10, 10), (20, 20), (30, 30)), start=1):
        assert strip[row, panel * 51 + col].tolist() == [255, 255, 255, 255]
    assert strip[0, 48, 3] == 0


def test_cell_strip_same_counts_look_the_same_whatever_else_is_in_the_crop() -> None:
    dim, bright = np.zeros((3, 48, 48), np.uint8), np.zeros((3, 48, 48), np.uint8)
    dim[1, 5, 5] = bright[1, 5, 5] = 80
    bright[1, 20, 20] = 255
    assert cell_strip(dim, LIMITS)[5, 5].tolist() == cell_strip(bright, LIMITS)[5, 5].tolist()


def test_png_uri_decodes_to_the_same_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    data = base64.b64decode(png_uri(pixels).removeprefix("data:image/png;base64,"))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels)


def test_real_field_png_outlines_lie_on_the_instances() -> None:
    labels = np.zeros((40, 40), np.int32)
    labels[10:20, 10:20] = 1
    image = np.where(labels > 0, 500.0, 100.0)
    picture = np.asarray(Image.open(io.BytesIO(real_field_png(RealField(image, labels, 1.0, 1, 1, "test")))))
    assert picture[10, 15].tolist() == [255, 140, 0]
    assert picture[15, 15].tolist() == [255, 255, 255]
    assert picture[30, 30].tolist() == [0, 0, 0]


def test_real_field_other_shapes_are_refused() -> None:
    with pytest.raises(SchemaError, match=r"\(4, 4\) and \(4, 5\)"):
        RealField(np.zeros((4, 4)), np.zeros((4, 5), int), 0.5, 1, 1, "test")


def test_map_payload_round_trip_keeps_points_and_names() -> None:
    payload = json.loads(map_payload(_points(), _outlines()))
    assert payload["points"]["x"] == [0.123, 2.0]
    assert payload["names"]["cluster"] == ["Background", "Cluster 0"]
    assert [payload["names"]["cluster"][i] for i in payload["points"]["cluster"]] == ["Cluster 0", "Background"]
    assert [payload["names"]["patient"][i] for i in payload["points"]["patient"]] == ["007", HOSTILE]
    assert payload["points"]["probability"] == [0.25, None]
    assert payload["points"]["error"] == [0, None]
    assert payload["outlines"][0]["name"] == "Cluster 0"


def test_script_json_hostile_text_cannot_end_the_script() -> None:
    text = script_json({"a": HOSTILE + "\u2028"})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"a": HOSTILE + "\u2028"}


@pytest.mark.parametrize(
    "html",
    [
        note(HOSTILE),
        missing(HOSTILE, HOSTILE),
        card(HOSTILE, HOSTILE, HOSTILE),
        cell_figure("data:,", HOSTILE, [HOSTILE], tags=[HOSTILE]),
        table(pl.DataFrame({"a": [HOSTILE]}), [Column("a", HOSTILE)], HOSTILE),
        f1_panel(pl.DataFrame(schema={"strategy": pl.String, "loop": pl.Int16, "num_train": pl.Int32, "mean_f1": pl.Float64,
                                      "sd_f1": pl.Float64, "num_runs": pl.Int32}), HOSTILE, [HOSTILE]),
    ],
)  # fmt: skip
def test_markup_hostile_text_is_escaped(html: str) -> None:
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert 'alert("x")' not in html


def test_table_last_row_total_is_marked_and_columns_keep_their_order() -> None:
    frame = pl.DataFrame({"a": ["x", "y"], "b": [1, 2]})
    html = table(frame, [Column("b", "B"), Column("a", "A", is_number=False)], "caption", total_last=True)
    assert html.count('class="total"') == 1
    assert html.index(">B<") < html.index(">A<")
    assert '<th scope="row">2</th><td>y</td>' in html


def test_cluster_colour_neighbouring_clusters_differ() -> None:
    colours = [cluster_colour(n) for n in range(-1, 10)]
    assert len(set(colours)) == len(colours)
