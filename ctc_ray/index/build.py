"""Build, extend and read a flat FAISS index. Runs without Ray."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ctc_ray.errors import MissingInputError, SchemaError
from ctc_ray.storage import Store

Metric = Literal["cosine", "l2"]
INDEX_FILE = "index.faiss"
CELLS_FILE = "cells.parquet"


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


def new_index(width: int, metric: Metric) -> Any:
    """Empty exact index of vectors (., width)."""
    faiss = load_faiss()
    return faiss.IndexFlatIP(width) if metric == "cosine" else faiss.IndexFlatL2(width)


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
        if store.is_local:
            return faiss.read_index(str(store.local_path(path)), faiss.IO_FLAG_MMAP_IFC | faiss.IO_FLAG_READ_ONLY)
        return faiss.deserialize_index(np.frombuffer(store.read_bytes(path), np.uint8))
    except RuntimeError as error:
        raise SchemaError(
            f"{store.describe(path)} is no FAISS index: run `ctc-ray index` with --force ({error})"
        ) from error


def stored_vectors(index: Any) -> npt.NDArray[np.float32]:
    """All vectors (N, D) of a flat index, as they were added."""
    vectors: npt.NDArray[np.float32] = index.reconstruct_n(0, index.ntotal)
    return vectors
