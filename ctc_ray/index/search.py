"""Find the cells that look most like given ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from ctc_ray.cohort import Cohort
from ctc_ray.config import RunConfig
from ctc_ray.errors import ConfigError, MissingInputError, SchemaError
from ctc_ray.index.build import (
    INDEX_FILE,
    Metric,
    faiss_threads,
    load_faiss,
    open_index,
    prepared,
    read_description,
    vectors_at,
)
from ctc_ray.index.cell_table import CellTable, lookup_table
from ctc_ray.index.gpu import GpuFlat, num_gpus
from ctc_ray.index.tune import NEAREST, search_parameters

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
Mask = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
_GPU_QUERIES = 32
"""Fewer queries than this are answered sooner on the processor than after a copy of all vectors."""
_GPU_MAX_K = 1024
_QUERIES_A_THREAD = 16
"""FAISS gives threads whole queries, and threads without one wait for the others by spinning."""
_ALL_LISTS_BELOW = 0.1
"""Where a filter leaves a smaller share of the cells, all lists are read: their ids cost little, and the answer is exact."""


class CellIndex:
    """An open index and the cells behind its positions.

    Args:
        index: FAISS index.
        cells: columns cell_id, patient, physical_id, field, row, col; row i is position i. Or the table made of them.
        metric: `cosine` or `l2`.
        num_threads: threads of a search.
        depths: length of an answer -> lists (ivf) or candidates (hnsw) that its search takes; None for a flat index.
        use_gpu: whether batches without a filter go to a GPU where FAISS sees one.
    """

    def __init__(
        self,
        index: Any,
        cells: pl.DataFrame | CellTable,
        metric: Metric,
        *,
        num_threads: int = 2,
        depths: Mapping[int, int] | None = None,
        use_gpu: bool = False,
    ) -> None:
        num_cells = len(cells)
        if index.ntotal != num_cells:
            raise SchemaError(
                f"the index holds {index.ntotal} vectors and its table {num_cells} cells: run `ctc-ray index` with --force"
            )
        self._index = index
        self.cells = cells if isinstance(cells, CellTable) else CellTable(lookup_table(cells))
        self.metric: Metric = metric
        self._num_threads = num_threads
        self._depths = dict(depths) if depths else None
        self._use_gpu = use_gpu

    @classmethod
    def open(cls, cohort: Cohort, encoder: str, *, num_threads: int = 2, use_gpu: bool = True) -> CellIndex:
        """Open the index of an encoder; on a local disk vectors and cells stay in their memory-mapped files.

        Raises:
            MissingInputError: there is none; the message names the command.
        """
        folder = cohort.index(encoder)
        record = cohort.require(folder, "index")
        description = read_description(cohort.store, folder)
        known = description.get("depths") or ({NEAREST: description["depth"]} if description["depth"] else {})
        depths = {int(length): int(depth) for length, depth in known.items()}
        index = open_index(cohort.store, f"{folder}/{INDEX_FILE}")
        cells = CellTable.open(cohort.store, folder)
        metric = record.config["metric"]
        return cls(index, cells, metric, num_threads=num_threads, depths=depths, use_gpu=use_gpu)

    def __len__(self) -> int:
        return len(self.cells)

    def positions_of(self, cell_ids: Sequence[str]) -> Int64:
        """Positions of cells.

        Raises:
            MissingInputError: a cell is not in the index.
        """
        positions = self.cells.positions_of(cell_ids)
        lost = [name for name, position in zip(cell_ids, positions, strict=True) if position < 0]
        if lost:
            raise MissingInputError(
                f"{len(lost)} cells are not in the index, the first {lost[0]!r}: check the id, or run `ctc-ray index` after embedding"
            )
        return positions

    def vectors(self, positions: Int64) -> Float32:
        """Vectors (len(positions), D) as the index holds them: of length 1 for `cosine`."""
        return vectors_at(self._index, positions)

    def allowed(self, patients: Sequence[str] | None = None, among: Sequence[str] | None = None) -> Mask | None:
        """Which positions (N,) a search may return: cells of some patients, and of some cells by id; None: all.

        Raises:
            ConfigError: a patient is not in the index.
        """
        mask = None
        if patients:
            unknown = sorted(set(patients) - set(self.cells.patients))
            if unknown:
                raise ConfigError(
                    f"the index holds no patient {', '.join(map(repr, unknown))}; it has {', '.join(self.cells.patients)}"
                )
            mask = self.cells.of_patients(patients)
        if among is not None:
            chosen = self.cells.ids().is_in(pl.Series(list(among), dtype=pl.String).implode()).to_numpy()
            mask = chosen if mask is None else mask & chosen
        return mask

    def similar_to_cells(
        self,
        cell_ids: Sequence[str],
        *,
        k: int,
        patients: Sequence[str] | None = None,
        exclude_same_cell: bool = True,
        allowed: Mask | None = None,
    ) -> pl.DataFrame:
        """Nearest cells of each given cell; see `similar`. `allowed` (N,) narrows the search further."""
        positions = self.positions_of(cell_ids)
        none = np.full(len(positions), -1)
        own = self.cells.physical[positions] if exclude_same_cell else none
        hide = none if exclude_same_cell else positions
        mask = _both(self.allowed(patients), allowed)
        found, scores = self.nearest(self.vectors(positions), k, allowed=mask, own=own, hide=hide)
        return self._rows(list(cell_ids), found, scores)

    def similar_to_vectors(
        self,
        vectors_ND: npt.NDArray[np.floating],
        *,
        k: int,
        patients: Sequence[str] | None = None,
        allowed: Mask | None = None,
    ) -> pl.DataFrame:
        """Nearest cells of embeddings (N, D); `query` is the row number as text."""
        vectors = prepared(vectors_ND, self.metric, "the query")
        found, scores = self.nearest(vectors, k, allowed=_both(self.allowed(patients), allowed))
        return self._rows([str(i) for i in range(len(vectors))], found, scores)

    def nearest(
        self,
        vectors_QD: npt.NDArray[np.floating],
        k: int,
        *,
        allowed: Mask | None = None,
        own: npt.NDArray[np.integer] | None = None,
        hide: npt.NDArray[np.integer] | None = None,
    ) -> tuple[Int64, Float32]:
        """Positions and similarities (Q, k) of the nearest cells, nearest first.

        Args:
            vectors_QD: prepared vectors.
            k: neighbours a query.
            allowed: positions (N,) that may be found; None: all.
            own: physical cell (Q,) to leave out; -1: none.
            hide: position (Q,) to leave out; -1: none.

        Returns:
            Position -1 and similarity -inf where there are fewer. Similarity is the cosine, or the negative distance.
        """
        queries = np.ascontiguousarray(vectors_QD, np.float32)
        available = len(self) if allowed is None else int(allowed.sum())
        drop = self.cells.largest_group if own is not None and (own >= 0).any() else 0
        drop = max(drop, int(hide is not None and bool((hide >= 0).any())))
        fetch = min(k + drop, available)
        if not len(queries) or not fetch:
            return np.full((len(queries), 0), -1, np.int64), np.zeros((len(queries), 0), np.float32)
        with faiss_threads(min(self._num_threads, max(1, len(queries) // _QUERIES_A_THREAD))):
            scores, near = self._search(queries, fetch, allowed, self._depth_for(fetch, available))
            short = np.flatnonzero((near < 0).any(axis=1))
            if len(short):  # the lists read held too few: read them all
                scores[short], near[short] = self._search(queries[short], fetch, allowed, None)
        keep = near >= 0
        if own is not None:
            keep &= (self.cells.physical[near] != own[:, None]) | (own[:, None] < 0)
        if hide is not None:
            keep &= near != hide[:, None]
        similarity = scores if self.metric == "cosine" else -np.sqrt(np.maximum(scores, 0))
        order = np.argsort(~keep, axis=1, kind="stable")[:, :k]
        kept = np.take_along_axis(keep, order, axis=1)
        positions = np.where(kept, np.take_along_axis(near, order, axis=1), -1)
        return positions, np.where(kept, np.take_along_axis(similarity, order, axis=1), -np.inf).astype(np.float32)

    def _depth_for(self, fetch: int, available: int) -> int | None:
        """How much of the index to read: more for longer answers and under a filter; None: all of it."""
        if self._depths is None:
            return None
        share = available / len(self)
        if share < _ALL_LISTS_BELOW:
            return None
        group = self.cells.largest_group
        longest = max(self._depths)
        length = min((known for known in self._depths if fetch <= known + group), default=longest)
        longer = max(1.0, fetch / (length + group)) ** 0.5  # beyond what was measured: a guess
        depth = int(np.ceil(self._depths[length] * longer / share))
        return max(depth, fetch if hasattr(self._index, "hnsw") else 1)

    def _search(self, queries: Float32, fetch: int, allowed: Mask | None, depth: int | None) -> tuple[Float32, Int64]:
        """Scores and positions (Q, fetch) of FAISS."""
        if allowed is None and len(queries) >= _GPU_QUERIES and fetch <= _GPU_MAX_K and self._gpu is not None:
            return self._gpu.search(queries, fetch)
        faiss, index, selector = load_faiss(), self._index, None
        if allowed is not None:
            bits = np.packbits(allowed, bitorder="little")
            selector = faiss.IDSelectorBitmap(bits)
        if depth is None and hasattr(index, "hnsw"):
            index = faiss.downcast_index(index.storage)
        parameters = search_parameters(index, depth if depth is not None else len(self), selector)
        scores, positions = index.search(queries, fetch, params=parameters)
        return scores, positions

    @cached_property
    def _gpu(self) -> GpuFlat | None:
        return GpuFlat(self._index, self.metric) if self._use_gpu and num_gpus() else None

    def _rows(self, queries: list[str], found: Int64, similarity: Float32) -> pl.DataFrame:
        """Rows of `NEIGHBOURS_SCHEMA`."""
        there = found >= 0
        numbers, ranks = np.nonzero(there)
        names = np.array(queries, object)[numbers].tolist()
        return (
            self.cells.at(found[there])
            .with_columns(
                query=pl.Series(names, dtype=pl.String),
                rank=pl.Series((ranks + 1).astype(np.int32), dtype=pl.Int32),
                similarity=pl.Series(similarity[there], dtype=pl.Float32),
            )
            .select(list(NEIGHBOURS_SCHEMA))
        )


def _both(first: Mask | None, second: Mask | None) -> Mask | None:
    if first is None or second is None:
        return first if second is None else second
    return first & second


def cells_in_clusters(cohort: Cohort, encoder: str, map_name: str, clusters: Sequence[int]) -> list[str]:
    """Ids of the cells that a latent map puts into some clusters.

    Raises:
        MissingInputError: there is no such map.
        ConfigError: it has no cell in one of the clusters.
    """
    cohort.require(cohort.latent(encoder, map_name), "map")
    folders = [cohort.latent_cells(encoder, map_name, patient) for patient in cohort.patient_ids()]
    shards = [path for folder in folders for path in cohort.shards(folder)]
    frames = [pl.DataFrame(pl.from_arrow(cohort.store.read_table(path, ["cell_id", "cluster"]))) for path in shards]
    cells = pl.concat(frames) if frames else pl.DataFrame(schema={"cell_id": pl.String, "cluster": pl.Int16})
    found = set(cells["cluster"].unique().to_list())
    lost = sorted(set(clusters) - found)
    if lost:
        raise ConfigError(
            f"map {map_name!r} has no cells in cluster {', '.join(map(str, lost))}; it has {', '.join(map(str, sorted(found)))}"
        )
    return cells.filter(pl.col("cluster").is_in(list(clusters)))["cell_id"].to_list()


def open_for_search(
    config: RunConfig, cohort: Cohort, *, patients: Sequence[str] | None, clusters: Sequence[int] | None
) -> tuple[CellIndex, Mask | None]:
    """The index that the settings name, and which positions the filters leave; raises as `similar`."""
    settings = config.index
    index = CellIndex.open(
        cohort, settings.encoder, num_threads=settings.num_threads, use_gpu=settings.device == "auto"
    )
    among = cells_in_clusters(cohort, settings.encoder, config.map.name, clusters) if clusters else None
    return index, index.allowed(patients, among)


def similar(
    config: RunConfig,
    cohort: Cohort,
    cell_ids: Sequence[str],
    *,
    k: int = 50,
    patients: Sequence[str] | None = None,
    clusters: Sequence[int] | None = None,
    exclude_same_cell: bool = True,
) -> pl.DataFrame:
    """Find the cells that look most like given ones.

    Args:
        config: section `index` (which encoder, how many threads); `map.name` where clusters are given.
        cohort: indexed.
        cell_ids: cells to start from.
        k: neighbours a cell, at least 1; fewer come back where there are fewer.
        patients: search among the cells of these alone; None: all.
        clusters: search among the cells of these clusters of the latent map alone; None: all.
        exclude_same_cell: leave out other detections of the same physical cell, not only the cell itself.

    Returns:
        Columns query, rank (from 1), cell_id, patient, field, row, col, similarity (cosine; for `l2` the negative distance);
        in the order of the queries, nearest first.

    Raises:
        MissingInputError: there is no index, or a cell is not in it; or no map where clusters are given.
        ConfigError: k is below 1, or a patient or cluster is not there.
    """
    if k < 1:
        raise ConfigError(f"k = {k}: ask for at least one neighbour")
    index, allowed = open_for_search(config, cohort, patients=patients, clusters=clusters)
    return index.similar_to_cells(cell_ids, k=k, allowed=allowed, exclude_same_cell=exclude_same_cell)
