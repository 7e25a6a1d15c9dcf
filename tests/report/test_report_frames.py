from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from ctc_ray.report.frames import cluster_frame
from ctc_ray.report.latent_points import POINTS_FRAME, _bounded, add_predictions, cluster_outlines, sample_fraction
from ctc_ray.report.stage import cluster_examples
from ctc_ray.report.survey import Survey, contrast_frame, grey_histogram, limits_of


def _points(n: int, role: str = "pretrain", label: str | None = None, cluster: int = 0, start: int = 0) -> pl.DataFrame:
    rng = np.random.default_rng(start + n)
    ids = [f"{value:08x}{'0' * 16}" for value in rng.integers(0, 2**32, n)]
    xy = rng.normal(cluster * 20, 1, (n, 2)).astype(np.float32)
    values = {
        "cell_id": ids,
        "patient": ["p"] * n,
        "role": [role] * n,
        "umap_x": xy[:, 0],
        "umap_y": xy[:, 1],
        "cluster": [cluster] * n,
        "label": [label] * n,
    }
    return pl.DataFrame(values, schema=POINTS_FRAME)


def test_sample_fraction_many_ids_are_uniform() -> None:
    values = _points(4000).select(sample_fraction(pl.col("cell_id")))["cell_id"].to_numpy()
    assert values.min() >= 0
    assert values.max() < 1
    np.testing.assert_allclose(np.quantile(values, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.03)


def test_bounded_points_keeps_labelled_test_cells_before_others() -> None:
    points = pl.concat([_points(300), _points(40, "test", "ctc", start=1)])
    kept = _bounded(points, 100)
    assert kept.height == 100
    assert kept.filter(pl.col("role") == "test").height == 40
    shuffled = _bounded(points.sample(fraction=1, shuffle=True, seed=1), 100)
    assert shuffled.equals(kept)


def test_bounded_points_too_many_labelled_cells_leave_half_to_the_rest() -> None:
    kept = _bounded(pl.concat([_points(300), _points(300, "test", "non_ctc", start=1)]), 100)
    assert kept.filter(pl.col("role") == "test").height == 50
    assert kept.height == 100


def test_add_predictions_errors_only_on_labelled_test_cells() -> None:
    points = pl.concat(
        [
            _points(1, "test", "ctc", start=1),
            _points(1, "test", "non_ctc", start=2),
            _points(1, "test", "unsure", start=3),
            _points(1, "train", "ctc", start=4),
            _points(1, "test", "ctc", start=5),
        ]
    )
    ids = points["cell_id"].to_list()
    found = add_predictions(points, {ids[0]: 0.2, ids[1]: 0.5, ids[2]: 0.9, ids[3]: 0.1}, 0.5)
    assert found["error"].to_list() == ["false_negative", "false_positive", None, None, None]
    assert found["probability"].to_list()[4] is None


def test_cluster_outlines_blob_lies_inside_its_contour() -> None:
    points = pl.concat([_points(400, cluster=0), _points(400, cluster=1, start=1), _points(50, cluster=-1, start=2)])
    lines = cluster_outlines(points)
    assert set(lines["cluster"]) == {0, 1}
    line = lines.filter((pl.col("cluster") == 1) & (pl.col("part") == 0))
    assert line["x"].min() < 20 < line["x"].max()  # type: ignore[operator]
    assert line["x"].min() > 10  # type: ignore[operator]
    first, last = line.sort("position").row(0, named=True), line.sort("position").row(-1, named=True)
    assert abs(first["x"] - last["x"]) < 0.5  # closed


def test_cluster_outlines_no_points_gives_no_lines() -> None:
    assert cluster_outlines(_points(0)).height == 0


def test_cluster_examples_two_thirds_labelled_test_cells() -> None:
    points = pl.concat([_points(50), _points(50, "test", "ctc", start=1), _points(3, cluster=1, start=2)])
    chosen = cluster_examples(points, 6)
    first = chosen.filter(pl.col("cluster") == 0)
    assert first["role"].to_list() == ["test"] * 4 + ["pretrain"] * 2
    assert first["rank"].to_list() == list(range(6))
    assert chosen.filter(pl.col("cluster") == 1).height == 3
    assert cluster_examples(points.reverse(), 6).equals(chosen)


def test_contrast_frame_percentiles_agree_with_numpy() -> None:
    crops = np.random.default_rng(0).integers(0, 200, (10, 3, 48, 48)).astype(np.uint8)
    frame = contrast_frame([Survey(grey_histogram(crops[:4])), Survey(grey_histogram(crops[4:]))], (5.0, 99.8))
    for channel, (low, high) in limits_of(frame, "uint8").items():
        pixels = crops[:, ("dapi", "ck", "cd45").index(channel)]
        expected = np.percentile(pixels, [5.0, 99.8], method="inverted_cdf")
        assert (low, high) == pytest.approx(tuple(expected), abs=1)
    assert frame["num_pixels"].to_list() == [10 * 48 * 48] * 3


def test_contrast_frame_flat_image_still_has_a_range() -> None:
    frame = contrast_frame([Survey(grey_histogram(np.full((1, 3, 48, 48), 7, np.uint8)))], (5.0, 99.8))
    assert (frame["high"] > frame["low"]).all()


def test_cluster_frame_cluster_without_labels_keeps_its_size() -> None:
    sizes = pl.DataFrame(
        {"cluster": [-1, 0], "num_cells": [30, 70]}, schema={"cluster": pl.Int16, "num_cells": pl.Int64}
    )
    metrics = pl.DataFrame(
        {
            "features": ["encoder", "encoder", "raw pixels"],
            "split": ["test"] * 3,
            "cluster": [None, 0, None],
            "num_cells": [20, 20, 20],
            "num_ctc": [5, 5, 5],
            "f1": [0.9, 0.9, 0.6],
            "recall": [0.9] * 3,
            "precision": [0.9] * 3,
            "reason": [None] * 3,
        },
        schema_overrides={"reason": pl.String},
    )
    frame = cluster_frame(sizes, metrics)
    assert frame is not None
    assert frame.select("cluster", "num_cells", "f1", "raw_pixels_f1").rows() == [
        (None, 100, 0.9, 0.6),
        (-1, 30, None, None),
        (0, 70, 0.9, None),
    ]
