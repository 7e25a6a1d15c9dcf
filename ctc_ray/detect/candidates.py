"""From the probability of every cell to the list of candidates that an expert reviews: one row a physical cell."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from ctc_ray.errors import SchemaError
from ctc_ray.schema import CANDIDATES_SCHEMA, check_columns

SCORES_SCHEMA = pa.schema([("cell_id", pa.string()), ("probability", pa.float32())])
"""Probability of every cell of a patient, also of those below the threshold: a missed CTC can be looked up."""


class ScoresEmbeddings(Protocol):
    """What detection asks of a classifier."""

    def probability(self, embeddings: npt.NDArray[np.float32]) -> npt.NDArray[np.floating[Any]]:
        """Calibrated probability (N,) of being a CTC, for embeddings (N, D)."""
        ...


def embedding_matrix(table: pa.Table, where: str) -> npt.NDArray[np.float32]:
    """Read the `embedding` column as a matrix.

    Args:
        table: rows of `embeddings_schema`, N of them.
        where: file that a message names.

    Returns:
        (N, D) float32.

    Raises:
        SchemaError: the column is missing, is no fixed-size list, or holds nulls or values that are not finite.
    """
    if "embedding" not in table.column_names or not pa.types.is_fixed_size_list(table.schema.field("embedding").type):
        raise SchemaError(f"{where} has no fixed-size list column 'embedding': run `ctc-ray embed` again with --force")
    column = table["embedding"].combine_chunks()
    width = column.type.list_size
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    values = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    if column.null_count or len(values) != len(column) * width or not np.isfinite(values).all():
        raise SchemaError(
            f"{where} holds embeddings that are null or not finite: run `ctc-ray embed` again with --force"
        )
    return np.asarray(values.reshape(len(column), width), dtype=np.float32)


def score_shards(classifier: ScoresEmbeddings, shards: Iterable[tuple[str, pa.Table]]) -> pl.DataFrame:
    """Score embeddings shard by shard, so that no more than one shard is in memory.

    Args:
        classifier: anything with `.probability`.
        shards: pairs of file name and table of `embeddings_schema`.

    Returns:
        Columns cell_id, probability (float32, 0 to 1); one row an embedding.

    Raises:
        SchemaError: a probability lies outside 0 to 1, or a cell occurs twice.
    """
    frames = [pl.DataFrame(schema={"cell_id": pl.String, "probability": pl.Float32})]
    for name, table in shards:
        if table.num_rows == 0:
            continue
        probability = np.asarray(classifier.probability(embedding_matrix(table, name)), dtype=np.float32)
        if probability.shape != (table.num_rows,) or not ((probability >= 0) & (probability <= 1)).all():
            raise SchemaError(
                f"{name}: the classifier gave values outside 0 to 1 or of shape {probability.shape} "
                f"for {table.num_rows} cells; train it again with `ctc-ray train --force`"
            )
        frames.append(pl.DataFrame({"cell_id": table["cell_id"].to_pylist(), "probability": probability}))
    scores = pl.concat(frames)
    if scores["cell_id"].n_unique() != scores.height:
        raise SchemaError("the embeddings hold a cell twice: run `ctc-ray embed` again with --force")
    return scores


def select_candidates(cells: pl.DataFrame, threshold: float) -> pl.DataFrame:
    """Keep one row for each physical cell whose best detection reaches the threshold.

    Adjacent fields can show one cell twice; the detection with the highest probability stands for it (the smaller `cell_id`
    where two are equal), and `num_detections` counts all detections of the cell, whatever their probability.

    Args:
        cells: one row a detection: the columns of CANDIDATES_SCHEMA but `num_detections`.
        threshold: probability, inclusive: the rule by which the classifier calls a cell a CTC.

    Returns:
        Columns of CANDIDATES_SCHEMA, highest probability first.

    Source: paper, Methods (probability threshold 0.5; duplicates removed, without a stated rule).
    """
    counts = cells.group_by("physical_id").agg(pl.len().cast(pl.Int16).alias("num_detections"))
    best = (
        cells.filter(pl.col("probability") >= threshold)
        .sort(["probability", "cell_id"], descending=[True, False])
        .unique("physical_id", keep="first", maintain_order=True)
        .join(counts, on="physical_id", how="left", maintain_order="left")
    )
    return best.select(CANDIDATES_SCHEMA.names)


def join_cells(
    positions: pl.DataFrame, scores: pl.DataFrame, clusters: pl.DataFrame, duplicates: pl.DataFrame, patient: str
) -> pl.DataFrame:
    """Bring together on `cell_id` what the stages know of a patient's cells.

    Args:
        positions: columns of `cells/` (without pixels).
        scores: cell_id, probability.
        clusters: cell_id, cluster.
        duplicates: cell_id, physical_id.
        patient: patient that a message names.

    Returns:
        One row a cell of `positions`, with probability, cluster and physical_id.

    Raises:
        SchemaError: one of the tables lacks a cell of `positions`.
    """
    joined = positions
    for frame, column, stage in (
        (scores, "probability", "embed"),
        (clusters, "cluster", "map"),
        (duplicates, "physical_id", "segment"),
    ):
        joined = joined.join(frame.select("cell_id", column), on="cell_id", how="left", maintain_order="left")
        missing = joined[column].null_count()
        if missing or joined.height != positions.height:
            raise SchemaError(
                f"patient {patient!r}: {missing} of {positions.height} cells have no {column}; "
                f"run `ctc-ray {stage}` again with --force, so that it covers the cells of now"
            )
    return joined


def candidates_table(candidates: pl.DataFrame, where: str) -> pa.Table:
    """Turn candidates into the Arrow table of the contract; raises SchemaError where columns do not fit."""
    return check_columns(candidates.to_arrow(), CANDIDATES_SCHEMA, where)
