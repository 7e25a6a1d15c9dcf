"""Find the cells that look most like given ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from ctc_ray.cohort import Cohort
from ctc_ray.config import RunConfig
from ctc_ray.errors import ConfigError, MissingInputError, SchemaError
from ctc_ray.index.build import CELLS_FILE, INDEX_FILE, Metric, faiss_threads, open_index, prepared

NEIGHBOURS_SCHEMA = {
    "query": pl.String,
    "rank": pl.Int32,
    "cell_id": pl.String,
    "patient": pl.String,
    "field": pl.Int16,
    "row": pl.Float32,
    "col": pl.Float32,
    "similarity": pl.Float32,
}


class CellIndex:
    """An open index and the cells behind its positions.

    Args:
        index: FAISS index.
        cells: columns cell_id, patient, physical_id, field, row, col; row i is position i.
        metric: `cosine` or `l2`.
        num_threads: threads of a search.
    """

    def __init__(self, index: Any, cells: pl.DataFrame, metric: Metric, *, num_threads: int = 2) -> None:
        if index.ntotal != cells.height:
            raise SchemaError(
                f"the index holds {index.ntotal} vectors and its table {cells.height} cells: run `ctc-ray index` with --force"
            )
        self._index = index
        self._cells = cells
        self._metric: Metric = metric
        self._num_threads = num_threads
        physical = cells.select(pl.concat_str("patient", "physical_id", separator="/"))["patient"]
        self._physical = physical.rank("dense").to_numpy().astype(np.int64)
        sizes = np.bincount(self._physical) if cells.height else np.ones(1, np.int64)
        self._largest_group = int(sizes.max())

    @classmethod
    def open(cls, cohort: Cohort, encoder: str, *, num_threads: int = 2) -> CellIndex:
        """Open the index of an encoder.

        Raises:
            MissingInputError: there is none; the message names the command.
        """
        folder = cohort.index(encoder)
        record = cohort.require(folder, "index")
        cells = pl.DataFrame(pl.from_arrow(cohort.store.read_table(f"{folder}/{CELLS_FILE}")))
        index = open_index(cohort.store, f"{folder}/{INDEX_FILE}")
        return cls(index, cells.sort("position"), record.config["metric"], num_threads=num_threads)

    def __len__(self) -> int:
        return self._cells.height

    def similar_to_cells(
        self, cell_ids: Sequence[str], *, k: int, patients: Sequence[str] | None = None, exclude_same_cell: bool = True
    ) -> pl.DataFrame:
        """Nearest cells of each given cell; see `similar`."""
        wanted = pl.DataFrame({"cell_id": list(cell_ids)}, schema={"cell_id": pl.String})
        found = wanted.join(self._cells.select("cell_id", "position"), on="cell_id", how="left", maintain_order="left")
        lost = found.filter(pl.col("position").is_null())["cell_id"].to_list()
        if lost:
            raise MissingInputError(
                f"{len(lost)} cells are not in the index, the first {lost[0]!r}: check the id, or run `ctc-ray index` after embedding"
            )
        positions = found["position"].to_numpy().astype(np.int64)
        vectors = np.stack([self._index.reconstruct(int(p)) for p in positions]) if len(positions) else np.empty((0, 1))
        own = self._physical[positions] if exclude_same_cell else np.full(len(positions), -1)
        hide = positions if not exclude_same_cell else np.full(len(positions), -1)
        return self._search(list(cell_ids), vectors, own, hide, k, patients)

    def similar_to_vectors(
        self, vectors_ND: npt.NDArray[np.floating], *, k: int, patients: Sequence[str] | None = None
    ) -> pl.DataFrame:
        """Nearest cells of embeddings (N, D); `query` is the row number as text."""
        vectors = prepared(vectors_ND, self._metric, "the query")
        none = np.full(len(vectors), -1)
        return self._search([str(i) for i in range(len(vectors))], vectors, none, none, k, patients)

    def _search(
        self,
        queries: list[str],
        vectors: npt.NDArray[np.floating],
        own: npt.NDArray[np.int64],
        hide: npt.NDArray[np.int64],
        k: int,
        patients: Sequence[str] | None,
    ) -> pl.DataFrame:
        """Ask for k and as many more as one physical cell has detections, then drop what is excluded."""
        allowed = self._allowed(patients)
        available = len(self) if allowed is None else len(allowed)
        fetch = min(k + self._largest_group, available)
        if not queries or not fetch:
            return pl.DataFrame(schema=NEIGHBOURS_SCHEMA)
        with faiss_threads(self._num_threads) as faiss:
            parameters = None
            if allowed is not None:
                parameters = faiss.SearchParameters(sel=faiss.IDSelectorBatch(allowed))
            scores, positions = self._index.search(np.ascontiguousarray(vectors, np.float32), fetch, params=parameters)
        rows_query, rows_rank, rows_position, rows_score = [], [], [], []
        for number, query in enumerate(queries):
            near = positions[number]
            keep = (near >= 0) & (self._physical[near] != own[number]) & (near != hide[number])
            chosen = np.flatnonzero(keep)[:k]
            rows_query += [query] * len(chosen)
            rows_rank += list(range(1, len(chosen) + 1))
            rows_position.append(near[chosen])
            rows_score.append(scores[number][chosen])
        position = np.concatenate(rows_position)
        score = np.concatenate(rows_score).astype(np.float32)
        similarity = score if self._metric == "cosine" else -np.sqrt(np.maximum(score, 0))
        return (
            self._cells[position]
            .select("cell_id", "patient", "field", "row", "col")
            .with_columns(
                query=pl.Series(rows_query, dtype=pl.String),
                rank=pl.Series(rows_rank, dtype=pl.Int32),
                similarity=pl.Series(similarity, dtype=pl.Float32),
            )
            .select(list(NEIGHBOURS_SCHEMA))
        )

    def _allowed(self, patients: Sequence[str] | None) -> npt.NDArray[np.int64] | None:
        if not patients:
            return None
        unknown = sorted(set(patients) - set(self._cells["patient"]))
        if unknown:
            raise ConfigError(
                f"the index holds no patient {', '.join(map(repr, unknown))}; it has {', '.join(sorted(set(self._cells['patient'])))}"
            )
        return self._cells.filter(pl.col("patient").is_in(list(patients)))["position"].to_numpy().astype(np.int64)


def similar(
    config: RunConfig,
    cohort: Cohort,
    cell_ids: Sequence[str],
    *,
    k: int = 50,
    patients: Sequence[str] | None = None,
    exclude_same_cell: bool = True,
) -> pl.DataFrame:
    """Find the cells that look most like given ones.

    Args:
        config: section `index` (which encoder, how many threads).
        cohort: indexed.
        cell_ids: cells to start from.
        k: neighbours a cell, at least 1; fewer come back where there are fewer.
        patients: search among the cells of these alone; None: all.
        exclude_same_cell: leave out other detections of the same physical cell, not only the cell itself.

    Returns:
        Columns query, rank (from 1), cell_id, patient, field, row, col, similarity (cosine; for `l2` the negative distance);
        in the order of the queries, nearest first.

    Raises:
        MissingInputError: there is no index, or a cell is not in it.
        ConfigError: k is below 1, or a patient is not in the index.
    """
    if k < 1:
        raise ConfigError(f"k = {k}: ask for at least one neighbour")
    index = CellIndex.open(cohort, config.index.encoder, num_threads=config.index.num_threads)
    return index.similar_to_cells(cell_ids, k=k, patients=patients, exclude_same_cell=exclude_same_cell)
