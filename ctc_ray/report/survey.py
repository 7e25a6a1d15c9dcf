"""One pass over a patient's cells on a worker: how bright the cohort is, the few crops to show, the probabilities to plot.

Only histograms, tens of crops and one number a plotted cell come back; no table of cells does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from ctc_ray.cohort import Cohort
from ctc_ray.detect.candidates import ScoresEmbeddings, embedding_matrix
from ctc_ray.schema import CHANNEL_NAMES, unpack_pixels
from ctc_ray.storage import Store

_MAX_SAMPLED_CELLS = 1000
"""Cells of a patient whose pixels enter the histograms: the first of its first shard."""


@dataclass(frozen=True)
class SurveyRequest:
    """What to fetch of one patient.

    Attributes:
        patient: patient id.
        crop_ids: cells to show.
        point_ids: cells whose probability is drawn.
        encoder: whose embeddings the classifier reads.
        classifier: name below `classifiers/`; None where there is none.
    """

    patient: str
    crop_ids: tuple[str, ...]
    point_ids: tuple[str, ...]
    encoder: str
    classifier: str | None


@dataclass(frozen=True)
class Survey:
    """What a worker sends back of one patient.

    Attributes:
        histograms: dtype -> (C, number of grey values) int64 counts of pixels.
        crops: cell_id -> (C, 48, 48).
        probability: cell_id -> 0 to 1.
    """

    histograms: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict)
    crops: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    probability: dict[str, float] = field(default_factory=dict)


def survey_patient(store: Store, request: SurveyRequest) -> Survey:
    """Survey one patient; runs on a worker."""
    cohort = Cohort(store)
    paths = cohort.shards(cohort.cells(request.patient))
    histograms = _histograms(store, paths[0]) if paths else {}
    crops = read_crops(store, paths, request.crop_ids)
    probability: dict[str, float] = {}
    if request.classifier is not None and request.point_ids:
        from ctc_ray.classify import load_classifier

        shards = cohort.shards(cohort.embeddings(request.encoder, request.patient))
        probability = score_cells(store, shards, request.point_ids, load_classifier(cohort, request.classifier))
    return Survey(histograms, crops, probability)


def read_crops(store: Store, paths: Iterable[str], cell_ids: Iterable[str]) -> dict[str, npt.NDArray[Any]]:
    """Read single crops, opening only the row groups that hold them.

    Args:
        store: of the cohort.
        paths: shards of `cells/<patient>`.
        cell_ids: cells to find; those in no shard are left out.

    Returns:
        cell_id -> (C, 48, 48).
    """
    wanted = set(cell_ids)
    crops: dict[str, npt.NDArray[Any]] = {}
    for path in paths:
        if not wanted:
            break
        with store.open_input(path) as stream:
            file = pq.ParquetFile(stream)
            for group in range(file.num_row_groups):
                ids = file.read_row_group(group, columns=["cell_id"])["cell_id"].to_pylist()
                rows = [row for row, name in enumerate(ids) if name in wanted]
                if not rows:
                    continue
                table = file.read_row_group(group, columns=["pixels"]).take(pa.array(rows))
                pixels = unpack_pixels(table["pixels"], table.schema.field("pixels"))
                crops |= {ids[row]: pixels[i].copy() for i, row in enumerate(rows)}
                wanted -= crops.keys()
    return crops


def _histograms(store: Store, path: str) -> dict[str, npt.NDArray[np.int64]]:
    with store.open_input(path) as stream:
        file = pq.ParquetFile(stream)
        if file.num_row_groups == 0 or file.metadata.num_rows == 0:
            return {}
        table = file.read_row_group(0, columns=["pixels"]).slice(0, _MAX_SAMPLED_CELLS)
    return grey_histogram(unpack_pixels(table["pixels"], table.schema.field("pixels")))


def grey_histogram(crops: npt.NDArray[Any]) -> dict[str, npt.NDArray[np.int64]]:
    """Histogram of each channel of crops (N, C, 48, 48): dtype -> (C, grey values)."""
    num_values = int(np.iinfo(crops.dtype).max) + 1
    channels = [np.bincount(crops[:, c].ravel(), minlength=num_values) for c in range(crops.shape[1])]
    return {str(crops.dtype): np.stack(channels).astype(np.int64)}


def score_cells(
    store: Store, paths: Iterable[str], cell_ids: Iterable[str], classifier: ScoresEmbeddings
) -> dict[str, float]:
    """Probability of some cells of a patient, reading its embeddings shard by shard."""
    wanted = pl.DataFrame({"cell_id": list(cell_ids)}, schema={"cell_id": pl.String})
    found: dict[str, float] = {}
    for path in paths:
        table = store.read_table(path, ["cell_id", "embedding"])
        place = pl.DataFrame({"cell_id": table["cell_id"].to_pylist(), "row": range(table.num_rows)}, strict=False)
        rows = wanted.join(place, on="cell_id", how="inner")
        if rows.is_empty():
            continue
        chosen = table.take(pa.array(rows["row"].to_list(), pa.int64()))
        probability = classifier.probability(embedding_matrix(chosen, store.describe(path)))
        found |= dict(zip(rows["cell_id"].to_list(), map(float, probability), strict=True))
    return found


def contrast_frame(surveys: Iterable[Survey], percentiles: tuple[float, float]) -> pl.DataFrame:
    """One contrast for each channel of the whole cohort, so that brightness can be compared between cells.

    Args:
        surveys: of all patients.
        percentiles: of the sampled pixels, which become black and white.

    Returns:
        Columns dtype, channel (`ctc_ray.schema.CHANNEL_NAMES`), low, high (counts), num_pixels.
    """
    totals: dict[str, npt.NDArray[np.int64]] = {}
    for survey in surveys:
        for dtype, counts in survey.histograms.items():
            totals[dtype] = totals[dtype] + counts if dtype in totals else counts
    rows = []
    for dtype, counts in sorted(totals.items()):
        for channel, values in zip(CHANNEL_NAMES, counts, strict=False):
            low, high = (_percentile(values, p) for p in percentiles)
            rows.append((dtype, channel, low, max(high, low + 1), int(values.sum())))
    schema = {"dtype": pl.String, "channel": pl.String, "low": pl.Int64, "high": pl.Int64, "num_pixels": pl.Int64}
    return pl.DataFrame(rows, schema=schema, orient="row")


def _percentile(histogram: npt.NDArray[np.int64], percent: float) -> int:
    """Smallest grey value at or below which that percentage of the pixels lie."""
    cumulative = np.cumsum(histogram)
    return int(np.searchsorted(cumulative, percent / 100 * cumulative[-1]))


def limits_of(contrast: pl.DataFrame, dtype: str) -> Mapping[str, tuple[int, int]]:
    """Channel -> (black, white) in counts, for crops of one dtype."""
    rows = contrast.filter(pl.col("dtype") == dtype).select("channel", "low", "high").iter_rows()
    return {channel: (low, high) for channel, low, high in rows}
