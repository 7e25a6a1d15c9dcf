"""Inverted lists: trained on a sample, filled shard by shard, and written as one FAISS file without holding the vectors.

A shard becomes a part: its vectors sorted by list. The file of the index is then written list by list from the memory-mapped
parts (and from the lists of a former index that it extends), so that memory stays at a few lists whatever the cohort's size.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import numpy as np
import numpy.typing as npt

from ctc_ray.errors import SchemaError
from ctc_ray.index.build import Metric, faiss_metric, load_faiss, new_index

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
TRAINING_VECTORS_PER_LIST = 40
"""FAISS warns below 39."""
_ITERATIONS = 8
_LISTS_AT_ONCE = 64
_MAX_LISTS = 65_536
_TAIL_OF_EMPTY_LISTS = 32
"""Bytes with which FAISS ends a file whose lists are all empty: `ilar`, number of lists, bytes a vector, `sprs`, 0."""


def num_lists_for(num_cells: int) -> int:
    """Power of two next to twice the square root of the cells: the first comparison costs about what the lists cost."""
    wanted = 2 * max(num_cells, 1) ** 0.5
    return int(min(_MAX_LISTS, 2 ** max(0, round(np.log2(wanted)))))


def train_lists(sample_ND: Float32, num_lists: int, metric: Metric, *, seed: int = 0) -> Any:
    """Empty index with lists trained by k-means.

    Args:
        sample_ND: prepared vectors (N, D), at least one; with fewer than `num_lists` there are fewer lists.
        num_lists: lists.
        metric: `cosine` (spherical k-means) or `l2`.
        seed: same sample and seed, same lists.

    Returns:
        FAISS IndexIVFFlat without vectors. Training runs on a GPU where FAISS sees one.

    Raises:
        SchemaError: there are no vectors.
    """
    if not len(sample_ND):
        raise SchemaError("no vectors to train the lists of the index on: embed first")
    faiss = load_faiss()
    width = sample_ND.shape[1]
    num_lists = min(num_lists, len(sample_ND))
    kmeans = faiss.Kmeans(
        width,
        num_lists,
        niter=_ITERATIONS,
        seed=seed,
        spherical=metric == "cosine",
        min_points_per_centroid=1,
        max_points_per_centroid=2 * TRAINING_VECTORS_PER_LIST,
        gpu=faiss.get_num_gpus() > 0,
    )
    kmeans.train(sample_ND)
    return lists_around(kmeans.centroids, metric)


def lists_around(centroids_LD: Float32, metric: Metric) -> Any:
    """Empty FAISS IndexIVFFlat with the given centres of lists (L, D)."""
    faiss = load_faiss()
    num_lists, width = centroids_LD.shape
    quantizer = new_index(width, metric)
    quantizer.add(np.ascontiguousarray(centroids_LD, np.float32))
    index = faiss.IndexIVFFlat(quantizer, width, num_lists, faiss_metric(metric))
    quantizer.this.disown()
    index.own_fields = True
    index.is_trained = True
    return index


def centroids_of(index: Any) -> Float32:
    """Centres of the lists (L, D)."""
    centroids: Float32 = index.quantizer.reconstruct_n(0, index.nlist)
    return centroids


class ListSource(Protocol):
    """Vectors grouped by list, of which a range of lists can be read."""

    sizes: Int64
    """Vectors of each list (L,)."""

    def vectors(self, first: int, stop: int) -> Float32:
        """Vectors (., D) of lists first <= list < stop, list after list."""

    def positions(self, first: int, stop: int) -> Int64:
        """Their positions in the index."""


@dataclass(frozen=True)
class Part:
    """Vectors of one shard sorted by list; `rows` says where in the shard each stood."""

    vectors: Float32
    rows: Int64
    sizes: Int64

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """What `MappedPart` opens again, as safetensors."""
        return {"vectors": self.vectors, "rows": self.rows, "sizes": self.sizes}


def sort_into_lists(index: Any, vectors_ND: Float32) -> Part:
    """Assign prepared vectors (N, D) to the lists of an index."""
    _, nearest = index.quantizer.search(vectors_ND, 1)
    lists = nearest[:, 0]
    rows = np.argsort(lists, kind="stable")
    sizes = np.bincount(lists, minlength=index.nlist)
    return Part(vectors_ND[rows], rows.astype(np.int64), sizes.astype(np.int64))


class MappedPart:
    """A part in a safetensors file, whose slices are read when they are asked for.

    Args:
        path: local file of `Part.arrays`.
        first: position of the shard's first cell in the index.
    """

    def __init__(self, path: Path, first: int) -> None:
        from safetensors import safe_open

        self._file = cast("Any", safe_open(path, framework="numpy"))  # its methods have no annotations
        self.sizes: Int64 = self._file.get_tensor("sizes")
        self._starts = _starts(self.sizes)
        self._first = first

    def vectors(self, first: int, stop: int) -> Float32:
        """See `ListSource`."""
        vectors: Float32 = self._file.get_slice("vectors")[int(self._starts[first]) : int(self._starts[stop])]
        return vectors

    def positions(self, first: int, stop: int) -> Int64:
        """See `ListSource`."""
        rows: Int64 = self._file.get_slice("rows")[int(self._starts[first]) : int(self._starts[stop])]
        return rows + self._first


class FormerLists:
    """The lists of an index that is being extended; its positions stay."""

    def __init__(self, index: Any) -> None:
        faiss = load_faiss()
        self._index = index
        self._lists = faiss.downcast_InvertedLists(index.invlists)
        self.sizes: Int64 = np.array([self._lists.list_size(number) for number in range(index.nlist)], np.int64)

    def vectors(self, first: int, stop: int) -> Float32:
        """See `ListSource`."""
        width, vectors = self._index.d, [np.empty((0, self._index.d), np.float32)]
        for number in range(first, stop):
            if size := int(self.sizes[number]):
                codes = load_faiss().rev_swig_ptr(self._lists.get_codes(number), size * width * 4)
                vectors.append(codes.view(np.float32).reshape(size, width).copy())
        return np.concatenate(vectors)

    def positions(self, first: int, stop: int) -> Int64:
        """See `ListSource`."""
        ids = [
            load_faiss().rev_swig_ptr(self._lists.get_ids(number), int(self.sizes[number])).copy()
            for number in range(first, stop)
            if self.sizes[number]
        ]
        positions = [np.empty(0, np.int64), *ids]
        return np.concatenate(positions)


def write_lists(empty: Any, sources: Sequence[ListSource], path: Path, *, num_probes: int = 1) -> int:
    """Write an index of inverted lists as one FAISS file; returns the bytes.

    Args:
        empty: trained index without vectors; its `ntotal`, direct map and probes are set here.
        sources: their positions together are 0 ... N - 1, each once.
        path: local file, written from the beginning.
        num_probes: lists that a search reads unless told otherwise.

    Raises:
        SchemaError: this FAISS writes another format than the one known here.
    """
    sizes: Int64 = np.stack([source.sizes for source in sources]).sum(axis=0, dtype=np.int64)
    _set_direct_map(empty, sources, sizes)
    empty.nprobe = num_probes
    head = load_faiss().serialize_index(empty).tobytes()
    width_bytes = empty.d * 4
    tail = b"ilar" + struct.pack("<QQ", empty.nlist, width_bytes) + b"sprs" + struct.pack("<Q", 0)
    if len(tail) != _TAIL_OF_EMPTY_LISTS or not head.endswith(tail):
        raise SchemaError(
            "this version of FAISS writes inverted lists in a format that ctc_ray does not know: set index.kind=flat"
        )
    with path.open("wb") as stream:
        stream.write(head[: -len(tail)])
        stream.write(b"ilar" + struct.pack("<QQ", empty.nlist, width_bytes) + b"full" + struct.pack("<Q", empty.nlist))
        stream.write(sizes.astype("<u8").tobytes())
        for first, stop, order, positions in _blocks(sources, len(sizes)):
            vectors = np.concatenate([source.vectors(first, stop) for source in sources])[order]
            _write_block(stream, sizes[first:stop], vectors, positions)
        return stream.tell()


def _write_block(stream: BinaryIO, sizes: Int64, vectors: Float32, positions: Int64) -> None:
    starts = _starts(sizes)
    for number in range(len(sizes)):
        span = slice(starts[number], starts[number + 1])
        stream.write(vectors[span].tobytes())
        stream.write(positions[span].astype("<i8").tobytes())


def _blocks(sources: Sequence[ListSource], num_lists: int) -> Iterator[tuple[int, int, Int64, Int64]]:
    """A few lists at a time: first, stop, the order that puts all sources' vectors list after list, and the positions so."""
    for first in range(0, num_lists, _LISTS_AT_ONCE):
        stop = min(first + _LISTS_AT_ONCE, num_lists)
        lists = np.concatenate([np.repeat(np.arange(first, stop), source.sizes[first:stop]) for source in sources])
        positions = np.concatenate([source.positions(first, stop) for source in sources])
        order = np.lexsort((positions, lists))
        yield first, stop, order, positions[order]


def _set_direct_map(empty: Any, sources: Sequence[ListSource], sizes: Int64) -> None:
    """Say where each position lies (list << 32 | place in the list), so that a vector is found by its position."""
    faiss = load_faiss()
    total = int(sizes.sum())
    places = np.full(total, -1, np.int64)
    for first, stop, _, positions in _blocks(sources, len(sizes)):
        lists = np.repeat(np.arange(first, stop), sizes[first:stop])
        within = np.arange(len(lists)) - np.repeat(_starts(sizes[first:stop])[:-1], sizes[first:stop])
        places[positions] = (lists << 32) | within
    if (places < 0).any():
        raise SchemaError(f"the parts of the index do not hold the positions 0 to {total - 1}: run again with --force")
    empty.ntotal = total
    faiss.copy_array_to_vector(places, empty.direct_map.array)
    empty.direct_map.type = faiss.DirectMap.Array


def _starts(sizes: Int64) -> Int64:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
