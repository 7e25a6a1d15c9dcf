"""What workers do for an index: train the lists, turn a shard into a part, put the parts together. None returns vectors."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from ctc_ray.cohort import Cohort
from ctc_ray.config import IndexConfig
from ctc_ray.errors import CtcRayError, SchemaError
from ctc_ray.index.build import (
    INDEX_FILE,
    Kind,
    faiss_threads,
    load_faiss,
    new_index,
    open_mapped,
    prepared,
    serialise,
    stored_vectors,
)
from ctc_ray.index.cell_table import CELLS_SCHEMA
from ctc_ray.index.lists import (
    TRAINING_VECTORS_PER_LIST,
    FormerLists,
    ListSource,
    MappedPart,
    Part,
    centroids_of,
    lists_around,
    num_lists_for,
    sort_into_lists,
    train_lists,
    write_lists,
)
from ctc_ray.index.tune import tune
from ctc_ray.latent.embeddings import read_shard
from ctc_ray.records import digest_of
from ctc_ray.storage import Store

LISTS_FILE = "lists.faiss"
_MAX_TRAINING_SHARDS = 256
_FOOTERS_AT_ONCE = 16
"""Each costs an object store's answer, and next to no work."""
_MAX_COMPARED_SHARE = 0.1
"""Where lists have to compare a query with more of the vectors than this, a graph is tried as well."""
_COST_IN_GRAPH = 4
"""A vector of a graph is read from anywhere in memory, one of a list behind its neighbour."""


@dataclass(frozen=True)
class Shard:
    """One shard of embeddings that goes into the index."""

    patient: str
    name: str
    identity: str
    """Identity of the patient's embeddings."""
    rows: int
    width: int

    def part(self, folder: str) -> str:
        """Path of its part without suffix; the same embeddings have the same path, so that a resumed build finds it."""
        return f"{folder}/{digest_of([self.patient, self.name, self.identity])}"


@dataclass(frozen=True)
class Refusal:
    """A shard that cannot be indexed, and why."""

    source: str
    kind: str
    message: str


def shards_of(cohort: Cohort, encoder: str, patients: dict[str, str]) -> tuple[list[Shard], dict[str, Refusal]]:
    """Shards of some patients (patient -> identity of its embeddings) with their size, from the footers alone.

    Returns:
        Shards in the order of the patients; and patient -> why one of its shards cannot be read.
    """
    folders = {patient: cohort.embeddings(encoder, patient) for patient in patients}
    paths = [(patient, path) for patient, folder in folders.items() for path in cohort.shards(folder)]
    with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
        extents = list(pool.map(lambda one: _extent(cohort.store, one[1]), paths))
    refused: dict[str, Refusal] = {}
    for (patient, path), extent in zip(paths, extents, strict=True):
        if isinstance(extent, CtcRayError):
            refused[patient] = Refusal(path, type(extent).__name__, str(extent))
    found = [
        Shard(patient, path[len(folders[patient]) + 1 :], patients[patient], *extent)
        for (patient, path), extent in zip(paths, extents, strict=True)
        if not isinstance(extent, CtcRayError) and patient not in refused and extent[0]
    ]
    return found, refused


def _extent(store: Store, path: str) -> tuple[int, int] | CtcRayError:
    """Rows and width of one shard of embeddings, or why they cannot be known."""
    try:
        schema = store.read_schema(path)
        kind = schema.field("embedding").type if "embedding" in schema.names else None
        if kind is None or not pa.types.is_fixed_size_list(kind):
            return SchemaError(f"{store.describe(path)}: column 'embedding' is {kind}, expected vectors: embed again")
        return store.num_rows(path), int(kind.list_size)
    except CtcRayError as error:
        return error


def refuse_other_widths(shards: Sequence[Shard], width: int | None) -> tuple[list[Shard], dict[str, Refusal]]:
    """Set patients aside whose embeddings are not as wide as the index.

    Args:
        shards: of all patients.
        width: of the index that is extended; None: the width that most cells have.
    """
    cells: dict[int, int] = {}
    for shard in shards:
        cells[shard.width] = cells.get(shard.width, 0) + shard.rows
    common = width if width is not None else max(cells, key=lambda one: cells[one], default=0)
    refused = {
        shard.patient: Refusal(
            shard.name,
            "SchemaError",
            f"{shard.patient}/{shard.name}: embeddings are {shard.width} wide, the index {common}: embed again",
        )
        for shard in shards
        if shard.width != common
    }
    return [shard for shard in shards if shard.patient not in refused], refused


def train(store: Store, config: IndexConfig, shards: Sequence[Shard], num_cells: int, parts: str) -> int:
    """Train the lists on a sample of the shards and write `lists.faiss`; returns the number of vectors used."""
    cohort = Cohort(store)
    num_lists = num_lists_for(num_cells)
    wanted = num_lists * TRAINING_VECTORS_PER_LIST
    rng = np.random.default_rng(0)
    drawn = [shards[i] for i in np.sort(rng.permutation(len(shards))[:_MAX_TRAINING_SHARDS])]
    share = min(1.0, wanted / sum(shard.rows for shard in drawn))
    sample = []
    for shard in drawn:
        path = f"{cohort.embeddings(config.encoder, shard.patient)}/{shard.name}"
        try:
            _, vectors = read_shard(store, path)
        except CtcRayError:  # the task of this shard meets the same error and reports it
            continue
        chosen = np.sort(rng.permutation(len(vectors))[: max(1, round(share * len(vectors)))])
        with contextlib.suppress(SchemaError):  # as above
            sample.append(prepared(vectors[chosen], config.metric, path))
    together = np.concatenate(sample or [np.empty((0, 1), np.float32)])
    with faiss_threads(config.num_threads):
        index = train_lists(together, num_lists, config.metric)
    store.write_bytes(f"{parts}/{LISTS_FILE}", serialise(index))
    return len(together)


def place(store: Store, config: IndexConfig, shard: Shard, parts: str, kind: Kind) -> Refusal | None:
    """Write the part of one shard: vectors by list, and its cells. Returns why that is not possible, where it is not."""
    cohort = Cohort(store)
    source = f"{cohort.embeddings(config.encoder, shard.patient)}/{shard.name}"
    try:
        ids, vectors = read_shard(store, source)
        vectors = prepared(vectors, config.metric, source)
        lists = read_lists(store, parts) if kind == "ivf" else None
        if lists is None:
            part = Part(vectors, np.arange(len(vectors)), np.array([len(vectors)]))
        else:
            with faiss_threads(1):
                part = sort_into_lists(lists, vectors)
        cells = cells_of(cohort, shard, ids)
    except CtcRayError as error:
        return Refusal(source, type(error).__name__, str(error))
    from safetensors.numpy import save

    store.write_table(f"{shard.part(parts)}.parquet", cells, row_group_size=65_536)
    store.write_bytes(f"{shard.part(parts)}.safetensors", save(part.arrays()))
    return None


def read_lists(store: Store, parts: str) -> Any:
    """The trained lists of a build, without vectors."""
    return load_faiss().deserialize_index(np.frombuffer(store.read_bytes(f"{parts}/{LISTS_FILE}"), np.uint8))


def cells_of(cohort: Cohort, shard: Shard, ids: list[str]) -> pa.Table:
    """Rows of `CELLS_SCHEMA` for one shard; positions count from 0.

    Raises:
        MissingInputError: the patient is not segmented.
    """
    folder = cohort.cells(shard.patient)
    cohort.require(folder, "segment")
    mirrored = f"{folder}/{shard.name}"
    columns = ["cell_id", "field", "row", "col"]
    named = mirrored in cohort.shards(folder)
    table = cohort.store.read_table(mirrored, columns) if named else cohort.read_columns(folder, columns)
    wanted = pl.DataFrame({"cell_id": ids}, schema={"cell_id": pl.String})
    joined = wanted.join(pl.DataFrame(pl.from_arrow(table)), on="cell_id", how="left", maintain_order="left").join(
        cohort.physical_ids(shard.patient), on="cell_id", how="left", maintain_order="left"
    )
    frame = joined.with_columns(
        position=pl.Series(np.arange(len(ids))),
        patient=pl.lit(shard.patient),
        physical_id=pl.coalesce("physical_id", "cell_id"),
        cluster=pl.lit(None, pl.Int16),
    )
    return frame.select(CELLS_SCHEMA.names).to_arrow().cast(CELLS_SCHEMA)


@dataclass(frozen=True)
class Assembled:
    """A finished index on the local disk."""

    file: Path
    description: dict[str, Any]


@dataclass(frozen=True)
class Material:
    """What an index is put together from: shards in the order of their positions, after those of a former index."""

    store: Store
    config: IndexConfig
    parts: str
    shards: Sequence[Shard]
    spans: Sequence[tuple[int, int]] = ()
    """Positions first <= position < stop of each patient, for measuring; see `spans_of`."""
    former: Any = None
    former_description: dict[str, Any] | None = None

    @property
    def first_position(self) -> int:
        """Position of the first new cell."""
        return int(self.former.ntotal) if self.former is not None else 0

    def sources(self, folder: Path) -> Iterator[MappedPart]:
        """The parts, memory-mapped; those of an object store are copied to a local folder first."""
        first = self.first_position
        for shard in self.shards:
            path = f"{shard.part(self.parts)}.safetensors"
            local = self.store.local_path(path) if self.store.is_local else folder / path.rsplit("/", 1)[-1]
            if not self.store.is_local:
                local.write_bytes(self.store.read_bytes(path))
            yield MappedPart(local, first)
            first += shard.rows

    def cells(self, former: Sequence[pa.Table]) -> pa.Table:
        """Rows of `CELLS_SCHEMA` of all positions."""
        tables, first = [table.select(CELLS_SCHEMA.names) for table in former], self.first_position
        for shard in self.shards:
            table = self.store.read_table(f"{shard.part(self.parts)}.parquet")
            tables.append(table.set_column(0, "position", pa.array(np.arange(first, first + table.num_rows))))
            first += shard.rows
        return pa.concat_tables(tables)


def spans_of(cells: pa.Table) -> list[tuple[int, int]]:
    """Positions first <= position < stop of each patient of a table of `CELLS_SCHEMA`; a patient's cells lie together."""
    patients = cells["patient"].combine_chunks().dictionary_encode().indices.to_numpy()
    starts = [0, *(np.flatnonzero(np.diff(patients)) + 1).tolist(), len(patients)]
    return [(first, stop) for first, stop in pairwise(starts) if stop > first]


@contextlib.contextmanager
def scratch_folder(store: Store, parts: str) -> Iterator[Path]:
    """A folder on the local disk: beside the parts where they are local, for the room that an index needs."""
    beside = store.local_path(parts) if store.is_local else None
    if beside is not None:
        beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=beside, prefix=".tmp-") as folder:
        yield Path(folder)


def assemble(material: Material, kind: Kind, folder: Path) -> Assembled:
    """Put the parts together as an index of one kind, and measure it.

    Args:
        material: parts, and the former index that is extended, if any.
        kind: with `index.kind=auto` lists that have to read too much are compared with a graph.
        folder: local, for the file.
    """
    if kind == "flat":
        return _whole(material, "flat", folder)
    if kind == "hnsw":
        return _whole(material, "hnsw", folder)
    made = _lists(material, folder)
    measured = made.description["measured"]
    few = measured["compared"] <= _MAX_COMPARED_SHARE * made.description["cells"]
    if few or material.config.kind != "auto" or material.former is not None:
        return made  # lists that are extended were compared when they were trained
    graph = _whole(material, "hnsw", folder)
    considered = {"ivf": measured, "hnsw": graph.description["measured"]}
    better = graph if prefer_graph(measured, graph.description["measured"], material.config.target_recall) else made
    return Assembled(better.file, {**better.description, "considered": considered})


def prefer_graph(ivf: dict[str, Any], hnsw: dict[str, Any], target: float) -> bool:
    """Whether a graph answers with less work than lists and misses no more, from what `tune` measured of both.

    Work is counted in vectors compared, not in seconds, so that two builds of one cohort choose the same.
    """
    reaches = hnsw["lower_bound"] >= min(target, ivf["lower_bound"])
    return bool(reaches and _COST_IN_GRAPH * hnsw["compared"] < ivf["compared"])


def _lists(material: Material, folder: Path) -> Assembled:
    config, path = material.config, folder / INDEX_FILE
    former = material.former
    empty = (
        lists_around(centroids_of(former), config.metric)
        if former is not None
        else read_lists(material.store, material.parts)
    )
    sources: list[ListSource] = [FormerLists(former)] if former is not None else []
    write_lists(empty, [*sources, *material.sources(folder)], path)
    index = open_mapped(str(path))
    started = time.monotonic()
    with faiss_threads(config.num_threads):
        measured = tune(index, config.target_recall, spans=material.spans)
    trained_cells = (material.former_description or {}).get("trained_cells", int(index.ntotal))
    description = {
        "lists": int(index.nlist),
        "trained_cells": trained_cells,
        "tune_seconds": round(time.monotonic() - started, 2),
    }
    return Assembled(path, _description("ivf", config, index, measured, description))


def _whole(material: Material, kind: Literal["flat", "hnsw"], folder: Path) -> Assembled:
    """Flat index or graph, in memory."""
    config, path = material.config, folder / f"{kind}.faiss"
    index, measured = _started(material, kind), None
    with faiss_threads(config.num_threads) as faiss:
        if index is None:
            index = new_index(material.shards[0].width, config.metric, kind)
        for vectors in _vectors(material, folder):
            index.add(vectors)
        if kind == "hnsw":
            measured = tune(index, config.target_recall, spans=material.spans)
        faiss.write_index(index, str(path))
    return Assembled(path, _description(kind, config, index, measured, {}))


def _started(material: Material, kind: Literal["flat", "hnsw"]) -> Any:
    """An index of that kind with the vectors of the former one; None where there is none."""
    if material.former is None:
        return None
    if hasattr(material.former, kind):  # a graph grows as it is
        faiss = load_faiss()
        return faiss.deserialize_index(faiss.serialize_index(material.former))
    index = new_index(material.former.d, material.config.metric, kind)
    index.add(stored_vectors(material.former))
    return index


def _vectors(material: Material, folder: Path) -> Iterator[npt.NDArray[np.float32]]:
    """Vectors of the parts in the order of their positions."""
    first = material.first_position
    for source, shard in zip(material.sources(folder), material.shards, strict=True):
        positions = source.positions(0, len(source.sizes)) - first
        vectors = source.vectors(0, len(source.sizes))
        yield vectors[np.argsort(positions)]
        first += shard.rows


def _description(
    kind: Kind, config: IndexConfig, index: Any, measured: dict[str, Any] | None, more: dict[str, Any]
) -> dict[str, Any]:
    return {
        "version": 2,
        "kind": kind,
        "metric": config.metric,
        "cells": int(index.ntotal),
        "width": int(index.d),
        "depth": measured["depth"] if measured else None,
        "depths": measured["depths"] if measured else None,
        "target_recall": config.target_recall if measured else None,
        "measured": measured,
        **more,
    }
