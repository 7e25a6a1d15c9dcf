"""Build and search a flat index of random vectors: seconds, queries a second, recall against NumPy.

python -m benchmarks.index --cells 200000 --width 128 --threads 2
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ctc_ray.index.build import faiss_threads, new_index, open_index, prepared, serialise
from ctc_ray.storage import Store

_BLOCK = 50_000


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    result = function()
    return result, time.perf_counter() - started


def build(num_cells: int, width: int) -> Any:
    index = new_index(width, "cosine")
    rng = np.random.default_rng(0)
    for start in range(0, num_cells, _BLOCK):
        block = rng.normal(size=(min(_BLOCK, num_cells - start), width)).astype(np.float32)
        index.add(prepared(block, "cosine", "benchmark"))
    return index


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--queries", type=int, default=512)
    options = parser.parse_args()
    index, build_s = timed(lambda: build(options.cells, options.width))
    vectors = index.reconstruct_n(0, options.cells)
    queries = np.ascontiguousarray(vectors[: options.queries])
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        _, write_s = timed(lambda: store.write_bytes("index.faiss", serialise(index)))
        opened, open_s = timed(lambda: open_index(store, "index.faiss"))
        with faiss_threads(options.threads):
            _, single_s = timed(lambda: opened.search(queries[:1], 10))
            (_, found), batch_s = timed(lambda: opened.search(queries, 10))
    exact = np.argpartition(-(queries[:64] @ vectors.T), 10, axis=1)[:, :10]
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found[:64], exact, strict=True)])
    result = {
        "cells": options.cells,
        "width": options.width,
        "threads": options.threads,
        "build_s": round(build_s, 3),
        "write_s": round(write_s, 3),
        "open_s": round(open_s, 3),
        "first_query_ms": round(1000 * single_s, 2),
        "queries_per_s": round(options.queries / batch_s, 1),
        "recall_at_10": round(float(recall), 4),
        "machine": platform.processor() or platform.machine(),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
