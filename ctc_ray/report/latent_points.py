"""Points of the latent map that are drawn: a stable sample of all cells, with every labelled test cell."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from scipy import ndimage
from skimage import measure

from ctc_ray.cohort import Cohort
from ctc_ray.config import RunConfig
from ctc_ray.detect.stage import table_frame
from ctc_ray.records import read_record

POINTS_FRAME: dict[str, Any] = {
    "cell_id": pl.String,
    "patient": pl.String,
    "role": pl.String,
    "umap_x": pl.Float32,
    "umap_y": pl.Float32,
    "cluster": pl.Int16,
    "label": pl.String,
}
_GRID = 160
_MASS_INSIDE = 0.9
_LABELLED_SHARE = 0.5
_LEAST_PART = 0.1
"""Pieces of a contour smaller than this share of the largest are strays, and are not drawn."""


def sample_fraction(cell_ids: pl.Expr) -> pl.Expr:
    """A number from 0 to 1 that belongs to each cell: its id is a digest, so its first digits are uniform."""
    return cell_ids.str.slice(0, 8).str.to_integer(base=16, dtype=pl.Int64) / 2**32


def latent_points(
    cohort: Cohort, config: RunConfig, labels: pl.DataFrame
) -> tuple[pl.DataFrame, pl.DataFrame] | tuple[None, None]:
    """Choose the points to draw.

    Labelled test cells come first (half of the points at most); the rest is a sample of all other cells that depends on the
    cell ids alone, so that it is the same on every run and grows with the cohort.

    Args:
        cohort: with a latent map.
        config: sections `map` and `report` are used.
        labels: cell_id, label: the consensus.

    Returns:
        Columns of POINTS_FRAME, and the size of each cluster over all cells (cluster, num_cells); None twice without a map.
    """
    encoder, name = config.map.encoder, config.map.name
    if read_record(cohort.store, cohort.latent(encoder, name)) is None:
        return None, None
    roles = cohort.patients().select("patient", "role")
    folders = {p: cohort.latent_cells(encoder, name, p) for p in cohort.patient_ids()}
    placed = {p: folder for p, folder in folders.items() if cohort.shards(folder)}
    total = sum(cohort.store.num_rows(path) for folder in placed.values() for path in cohort.shards(folder))
    limit = config.report.max_map_points
    fraction = min(1.0, limit / max(total, 1))
    chosen, sizes = [], []
    for folder in placed.values():
        table = cohort.read_columns(folder, ["cell_id", "patient", "umap_x", "umap_y", "cluster"])
        frame = table_frame(table).join(roles, on="patient", how="left")
        frame = frame.join(labels.select("cell_id", "label"), on="cell_id", how="left")
        sizes.append(frame.group_by("cluster").agg(num_cells=pl.len().cast(pl.Int64)))
        examined = pl.col("label").is_not_null() & (pl.col("role") == "test")
        chosen.append(frame.filter(examined | (sample_fraction(pl.col("cell_id")) < fraction)))
    if not chosen:
        return pl.DataFrame(schema=POINTS_FRAME), pl.DataFrame(schema={"cluster": pl.Int16, "num_cells": pl.Int64})
    points = pl.concat(chosen).select(pl.col(n).cast(kind) for n, kind in POINTS_FRAME.items())
    cluster_sizes = pl.concat(sizes).group_by("cluster").agg(pl.col("num_cells").sum()).sort("cluster")
    return _bounded(points, limit), cluster_sizes


def _bounded(points: pl.DataFrame, limit: int) -> pl.DataFrame:
    """At most `limit` points, labelled test cells before others."""
    examined = pl.col("label").is_not_null() & (pl.col("role") == "test")
    ordered = points.with_columns(order=sample_fraction(pl.col("cell_id"))).sort("order", "cell_id")
    first = ordered.filter(examined)
    rest = ordered.filter(~examined.fill_null(value=False))
    room = max(int(limit * _LABELLED_SHARE), limit - rest.height)
    first = first.head(room)
    return pl.concat([rest.head(limit - first.height), first]).drop("order")


def add_predictions(points: pl.DataFrame, probability: dict[str, float], threshold: float) -> pl.DataFrame:
    """Add the classifier's probability and, for labelled test cells, whether it errs.

    Returns:
        The points with `probability` (null where unknown) and `error`: null, `false_negative` (labelled CTC, called non-CTC) or
        `false_positive`; cells labelled unsure have none.
    """
    known = pl.DataFrame(
        {"cell_id": list(probability), "probability": list(probability.values())},
        schema={"cell_id": pl.String, "probability": pl.Float32},
    )
    called = pl.col("probability") >= threshold
    examined = (pl.col("role") == "test") & pl.col("label").is_in(["ctc", "non_ctc", "artefact"])
    is_ctc = pl.col("label") == "ctc"
    return points.join(known, on="cell_id", how="left", maintain_order="left").with_columns(
        error=pl.when(examined & is_ctc & ~called)
        .then(pl.lit("false_negative"))
        .when(examined & ~is_ctc & called)
        .then(pl.lit("false_positive"))
        .otherwise(None)
    )


def cluster_outlines(points: pl.DataFrame) -> pl.DataFrame:
    """Closed contours around the clusters.

    Args:
        points: POINTS_FRAME.

    Returns:
        Columns cluster, part (pieces of one cluster), position, x, y: the line inside which nine tenths of a cluster's smoothed
        density lie. Background (-1) has none.
    """
    rows: list[tuple[int, int, int, float, float]] = []
    if points.height:
        x, y = points["umap_x"].to_numpy(), points["umap_y"].to_numpy()
        low = np.array([y.min(), x.min()], dtype=float)
        span = np.maximum(np.array([y.max(), x.max()]) - low, 1e-6)
        for cluster in sorted(set(points["cluster"].to_list()) - {-1, None}):
            own = points.filter(pl.col("cluster") == cluster).select("umap_y", "umap_x").to_numpy().astype(float)
            for part, line in enumerate(_contours((own - low) / span)):
                scaled = line * span + low
                rows += [(cluster, part, i, float(col), float(row)) for i, (row, col) in enumerate(scaled)]
    schema = {"cluster": pl.Int16, "part": pl.Int16, "position": pl.Int32, "x": pl.Float32, "y": pl.Float32}
    return pl.DataFrame(rows, schema=schema, orient="row")


def _contours(unit: npt.NDArray[np.float64]) -> list[npt.NDArray[np.float64]]:
    """Contours, in the unit square (row, column), around points given in it."""
    margin = 0.1
    edges = [(-margin, 1 + margin)] * 2
    counts, _, _ = np.histogram2d(unit[:, 0], unit[:, 1], bins=_GRID, range=edges)
    density = ndimage.gaussian_filter(counts, sigma=_GRID / 60)
    ordered = np.sort(density.ravel())[::-1]
    level = ordered[np.searchsorted(np.cumsum(ordered), _MASS_INSIDE * ordered.sum())]
    lines = measure.find_contours(density, level)  # type: ignore[no-untyped-call]
    areas = [abs(_signed_area(line)) for line in lines]
    large = [line for line, area in zip(lines, areas, strict=True) if area >= _LEAST_PART * max(areas)]
    return [((line + 0.5) / _GRID) * (1 + 2 * margin) - margin for line in large]


def _signed_area(line: npt.NDArray[np.float64]) -> float:
    """Area inside a closed line (N, 2); the sign tells its direction."""
    row, col = line[:, 0], line[:, 1]
    return 0.5 * float(np.dot(row, np.roll(col, 1)) - np.dot(col, np.roll(row, 1)))
