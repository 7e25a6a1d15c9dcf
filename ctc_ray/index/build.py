"""The FAISS index: kinds, vectors as an index holds them, opening from memory-mapped files. Runs without Ray."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ctc_ray.errors import MissingInputError, SchemaError
from ctc_ray.storage import Store

Metric = Literal["cosine", "l2"]
Kind = Literal["flat", "ivf", "hnsw"]
INDEX_FILE = "index.faiss"
CELLS_FILE = "cells.parquet"
LOOKUP_FILE = "cells.arrow"
"""The cells of `cells.parquet` in a form that opens without being read; see `ctc_ray.index.cell_table`."""
DESCRIPTION_FILE = "index.json"
"""Kind, width, lists and probes, and what was measured; an index without it is flat and of version 1."""
HNSW_NEIGHBORS = 32
HNSW_CONSTRUCTION_DEPTH = 80


def load_faiss() -> Any:
    """Import FAISS, after torch where torch is there.

    Both bring an OpenMP runtime; torch's has to come first, and with one thread each they do not meet.
    """
    import sys

    if "torch" not in sys.modules:
        with contextlib.suppress(ImportError):
            import torch  # noqa: F401 - imported for its order alone
    import faiss

    return faiss


@contextlib.contextmanager
def faiss_threads(num_threads: int) -> Iterator[Any]:
    """FAISS with that many threads while the block runs."""
    faiss = load_faiss()
    former = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(num_threads)
    try:
        yield faiss
    finally:
        faiss.omp_set_num_threads(former)


def prepared(vectors_ND: npt.NDArray[np.floating], metric: Metric, where: str) -> npt.NDArray[np.float32]:
    """Vectors as the index holds them: float32, of length 1 for `cosine`.

    Raises:
        SchemaError: a value is not finite, or a vector is zero and has no direction.
    """
    vectors = np.ascontiguousarray(vectors_ND, np.float32)
    if not np.isfinite(vectors).all():
        raise SchemaError(f"{where}: embeddings hold values that are not finite: embed again")
    if metric == "l2":
        return vectors
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    if len(vectors) and lengths.min() <= 0:
        raise SchemaError(
            f"{where}: embedding {int(lengths.argmin())} is zero and has no direction: set index.metric=l2"
        )
    normalised: npt.NDArray[np.float32] = (vectors / lengths).astype(np.float32)
    return normalised


def new_index(width: int, metric: Metric, kind: Literal["flat", "hnsw"] = "flat") -> Any:
    """Empty index of vectors (., width): exact, or a navigable graph."""
    faiss = load_faiss()
    if kind == "flat":
        return faiss.IndexFlatIP(width) if metric == "cosine" else faiss.IndexFlatL2(width)
    index = faiss.IndexHNSWFlat(width, HNSW_NEIGHBORS, faiss_metric(metric))
    index.hnsw.efConstruction = HNSW_CONSTRUCTION_DEPTH
    return index


def faiss_metric(metric: Metric) -> int:
    """FAISS's number of a metric."""
    faiss = load_faiss()
    number: int = faiss.METRIC_INNER_PRODUCT if metric == "cosine" else faiss.METRIC_L2
    return number


def serialise(index: Any) -> bytes:
    """Index as the bytes of a FAISS file."""
    data: bytes = load_faiss().serialize_index(index).tobytes()
    return data


def open_index(store: Store, path: str) -> Any:
    """Open an index: memory-mapped where the file is local, else read whole.

    Raises:
        MissingInputError: there is no such file.
        SchemaError: it is no FAISS index.
    """
    faiss = load_faiss()
    if not store.exists(path):
        raise MissingInputError(f"{store.describe(path)} does not exist: run `ctc-ray index` first")
    try:
        if not store.is_local:
            return faiss.deserialize_index(np.frombuffer(store.read_bytes(path), np.uint8))
        return open_mapped(str(store.local_path(path)))
    except RuntimeError as error:
        raise SchemaError(
            f"{store.describe(path)} is no FAISS index: run `ctc-ray index` with --force ({error})"
        ) from error


def open_mapped(path: str) -> Any:
    """Open a local FAISS file without reading its vectors: the system brings in the pages that a search touches."""
    faiss = load_faiss()
    with open(path, "rb") as stream:
        has_lists = stream.read(4) == b"IwFl"
    flag = faiss.IO_FLAG_MMAP if has_lists else faiss.IO_FLAG_MMAP_IFC
    index = faiss.read_index(path, flag | faiss.IO_FLAG_READ_ONLY)
    if has_lists:
        # Mapped lists start 32 threads a search to read ahead, which costs more than a search of lists in memory.
        faiss.downcast_InvertedLists(index.invlists).prefetch_nthread = 0
    return index


def stored_vectors(index: Any) -> npt.NDArray[np.float32]:
    """All vectors (N, D) of an index in the order of their positions, as they were added."""
    vectors: npt.NDArray[np.float32] = index.reconstruct_n(0, index.ntotal)
    return vectors


def vectors_at(index: Any, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Vectors (len(positions), D) of some positions."""
    if not len(positions):
        return np.empty((0, index.d), np.float32)
    vectors: npt.NDArray[np.float32] = index.reconstruct_batch(np.ascontiguousarray(positions, np.int64))
    return vectors


def read_description(store: Store, folder: str) -> dict[str, Any]:
    """What `index.json` says of an index; one without it is flat and of version 1."""
    path = f"{folder}/{DESCRIPTION_FILE}"
    if not store.exists(path):
        return {"version": 1, "kind": "flat", "depth": None}
    description: dict[str, Any] = store.read_json(path)
    return description
