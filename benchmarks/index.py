"""The index at cohort size: build, recall, latency, queries a second, memory, the size where lists pay, and retrieval.

    python -m benchmarks.index --cells 1300000 --threads 2 [--vectors phantom|mixture] [--ray] [--base FILE] [--no-sizes]

Vectors `phantom`: the shipped encoder's embeddings of 22,000 phantom crops (paper profile: 1.6 % are CTCs), brought to any number
by walking from a random one part of the way (uniform 0 to 1) to one of its ten nearest of the same patient (each of the 90 has crops
of its own), plus isotropic noise of a tenth of that step. Queries are embeddings of 2,000 further crops, which are farther from
the vectors of the index than these from each other. `mixture`: 500 Gaussian components of 16 dimensions turned into the space, and
noise in all dimensions; queries are further vectors made the same way. Both are written as a cohort of patients, and the stage
builds the index from there. The truth is a plain product with all vectors. Adds its result to `benchmarks/results/index.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pyarrow as pa

from benchmarks.index_vectors import (
    ENCODER,
    PATIENTS,
    QUERY_CROPS,
    SEED,
    Draw,
    all_vectors,
    draw_from,
    mixture,
    phantom_embeddings,
    write_cohort,
    write_patient,
)
from benchmarks.segment_accuracy import hardware
from ctc_ray.cluster import connect
from ctc_ray.cohort import Cohort
from ctc_ray.config import IndexConfig, RayConfig, RunConfig
from ctc_ray.index.build import new_index, prepared
from ctc_ray.index.cell_table import CELLS_SCHEMA
from ctc_ray.index.retrieval import rank_candidates
from ctc_ray.index.search import CellIndex
from ctc_ray.index.stage import run_index
from ctc_ray.index.tune import recall_of
from ctc_ray.progress import Progress
from ctc_ray.records import library_versions

Float32 = npt.NDArray[np.float32]
RESULTS = Path(__file__).parent / "results" / "index.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=128, help="of the mixture; phantom vectors have the encoder's")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vectors", choices=("phantom", "mixture"), default="phantom")
    parser.add_argument("--kind", choices=("auto", "flat", "ivf", "hnsw"), default="auto")
    parser.add_argument("--base", type=Path, help="file that keeps the phantom embeddings between runs")
    parser.add_argument("--ray", action="store_true", help="build with Ray tasks on as many CPUs as --threads")
    parser.add_argument("--nice", type=int, default=0, help="priority of the queries alone")
    parser.add_argument("--grow", action="store_true", help="add two patients at the end")
    parser.add_argument("--sizes", action="store_true", help="measure flat and listed indices of several sizes instead")
    options = parser.parse_args()
    key = f"{options.vectors}_{options.cells}_{options.kind}"
    if options.sizes:
        key, result = (
            f"{options.vectors}_sizes",
            {"threads": options.threads, "rows": sizes(options, *vectors_of(options))},
        )
    else:
        with tempfile.TemporaryDirectory() as folder:
            result = measure(options, *vectors_of(options), Path(folder))
        if options.vectors == "phantom":
            result["retrieval"] = retrieval(*phantom_embeddings(options.base)[:2], options.threads)
    result["command"] = command_of(sys.argv[1:])
    result["hardware"], result["versions"] = hardware(), library_versions()
    print(json.dumps(result, indent=1))
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps({**known, key: result}, indent=1, sort_keys=True) + "\n")


def command_of(arguments: list[str]) -> str:
    """The command without the place of the kept embeddings."""
    place = [i for i, text in enumerate(arguments) if text == "--base"]
    left = [text for i, text in enumerate(arguments) if i not in place and i - 1 not in place]
    return f"python -m benchmarks.index {' '.join(left)}"


def vectors_of(options: argparse.Namespace) -> tuple[Draw, Float32]:
    """How to draw the vectors of the cohort, and queries (Q, D) that are not among them."""
    if options.vectors == "phantom":
        base, _, queries = phantom_embeddings(options.base)
        return draw_from(base), prepared(queries, "cosine", "queries")
    draw = mixture(options.width)
    return draw, prepared(draw(QUERY_CROPS, 0, np.random.default_rng([SEED, 999_999])), "cosine", "queries")


@contextmanager
def peak_memory() -> Iterator[dict[str, float]]:
    """Peak MB that belong to this process alone, and to the largest of its children alone (Ray's workers among them), sampled."""
    found, done, process = {"driver_mb": 0.0, "worker_mb": 0.0}, threading.Event(), psutil.Process()

    def own_mb(one: psutil.Process) -> float:
        try:
            return float(one.memory_full_info().uss) / 2**20
        except psutil.Error:  # it ended
            return 0.0

    def sample() -> None:
        while not done.wait(0.5):
            workers = [own_mb(child) for child in process.children(recursive=True)]
            found["driver_mb"] = max(found["driver_mb"], own_mb(process))
            found["worker_mb"] = max(found["worker_mb"], *workers, 0.0)

    watcher = threading.Thread(target=sample, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


def measure(options: argparse.Namespace, draw: Draw, queries: Float32, folder: Path) -> dict[str, Any]:
    """Build the index of a cohort with the stage, open it, and ask it."""
    cohort = Cohort.open(str(folder / "cohort"), create=True)
    write_cohort(cohort, draw, options.cells)
    kind, threads = options.kind, options.threads
    config = RunConfig(index=IndexConfig(num_threads=threads, kind=kind, target_recall=0.99))
    session = connect(config=RayConfig(num_cpus=threads, object_store_mb=100)) if options.ray else nullcontext()
    with session, peak_memory() as memory:
        build_s = timed(lambda: run_index(config, cohort, progress=Progress(quiet=True)))[1]
    description = cohort.store.read_json(f"{cohort.index(ENCODER)}/index.json")
    path = cohort.store.local_path(f"{cohort.index(ENCODER)}/index.faiss")
    forget(path)
    forget(cohort.store.local_path(f"{cohort.index(ENCODER)}/cells.arrow"))
    index, open_s = timed(lambda: CellIndex.open(cohort, ENCODER, num_threads=threads, use_gpu=False))
    first_s = timed(lambda: index.similar_to_vectors(queries[:1], k=10))[1]
    index.similar_to_vectors(queries, k=10)
    with priority(options.nice) if options.nice else nullcontext():
        speeds = {**speed(index, queries), "filtered_ms": filtered(index, queries)}
    result = {
        "cells": options.cells,
        "width": int(queries.shape[1]),
        "threads": threads,
        "vectors": options.vectors,
        "kind": description["kind"],
        "lists": description.get("lists"),
        "depth": description["depth"],
        "measured_at_build": description["measured"],
        "considered": description.get("considered"),
        "build_s": round(build_s, 2),
        "build_with_ray": options.ray,
        "build_memory": {name: round(value) for name, value in memory.items()},
        "index_mb": round(path.stat().st_size / 2**20),
        "open_s": round(open_s, 4),
        "first_query_s": round(first_s, 4),
        **speeds,
        "recall": recall(index, queries[:1000], cohort),
        "nice_of_queries": options.nice,
        "load_average": [round(value, 1) for value in os.getloadavg()],
    }
    if options.grow:
        result["grown"] = grow(cohort, config, draw, options)
    return result


def filtered(index: CellIndex, queries: Float32) -> dict[str, float]:
    """Median milliseconds of one query among the cells of 1, 9 and 45 of the 90 patients."""
    found = {}
    for num in (1, 9, 45):
        names = index.cells.patients[:num]
        seconds = [
            timed(lambda query=query, names=names: index.similar_to_vectors(query[None], k=10, patients=names))[1]
            for query in queries[:50]
        ]
        found[f"patients_{num}"] = round(1e3 * float(np.median(seconds)), 2)
    return found


def grow(cohort: Cohort, config: RunConfig, draw: Draw, options: argparse.Namespace) -> dict[str, Any]:
    """Add two patients to the index: seconds, and whether their cells are found and the others stay where they are."""
    before = CellIndex.open(cohort, ENCODER, use_gpu=False)
    chosen = np.random.default_rng(SEED).integers(0, len(before), 1000).astype(np.int64)
    kept = before.vectors(chosen)
    size = options.cells // PATIENTS
    names, vectors = ("new-1", "new-2"), draw(2 * size, 0, np.random.default_rng([SEED, 888]))
    cohort.add_patients(dict.fromkeys(names, "made"))
    for number, name in enumerate(names):
        numbers = np.arange(size) + options.cells + number * size
        write_patient(cohort, name, numbers, vectors[number * size : (number + 1) * size])
    session = connect(config=RayConfig(num_cpus=options.threads, object_store_mb=100)) if options.ray else nullcontext()
    with session, peak_memory() as memory:
        seconds = timed(lambda: run_index(config, cohort, progress=Progress(quiet=True)))[1]
    after = CellIndex.open(cohort, ENCODER, use_gpu=False)
    own = after.similar_to_vectors(vectors[:200], k=1)["cell_id"].to_list()
    return {
        "cells_added": 2 * size,
        "seconds": round(seconds, 2),
        "memory": {name: round(value) for name, value in memory.items()},
        "former_unchanged": bool(np.array_equal(after.vectors(chosen), kept)),
        "new_found": float(np.mean([name == f"{options.cells + i:024x}" for i, name in enumerate(own)])),
    }


@contextmanager
def priority(nice: int) -> Iterator[None]:
    """Another priority for all threads of this process; below 0 is a matter of rights."""
    threads = [int(name) for name in os.listdir("/proc/self/task")]
    former = [os.getpriority(os.PRIO_PROCESS, thread) for thread in threads]
    for thread in threads:
        os.setpriority(os.PRIO_PROCESS, thread, nice)
    try:
        yield
    finally:
        for thread, value in zip(threads, former, strict=True):
            os.setpriority(os.PRIO_PROCESS, thread, value)


def forget(path: Path) -> None:
    """Drop a file from the page cache, so that what opens it next reads the disk."""
    with path.open("rb") as stream:
        os.fdatasync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    result = function()
    return result, time.perf_counter() - started


def speed(index: CellIndex, queries: Float32) -> dict[str, Any]:
    """Milliseconds of one query with its table of ten cells, and queries a second of a batch; warm."""
    cpu = time.process_time()
    alone = [
        1e3 * timed(lambda query=query: index.similar_to_vectors(query[None], k=10))[1] for query in queries[:1000]
    ]
    cpu_ms = 1e3 * (time.process_time() - cpu) / len(alone)
    batches = []
    for _ in range(5):
        cpu = time.process_time()
        seconds = timed(lambda: index.similar_to_vectors(queries, k=10))[1]
        batches.append((len(queries) / seconds, len(queries) / (time.process_time() - cpu)))
    wall, per_cpu = np.median(batches, axis=0)
    quantiles = {
        name: round(float(np.percentile(alone, q)), 3) for name, q in (("median", 50), ("p95", 95), ("p99", 99))
    }
    return {
        "one_query_ms": {**quantiles, "cpu_ms": round(cpu_ms, 3)},
        "queries_per_s": round(float(wall), 1),
        "queries_per_cpu_s": round(float(per_cpu), 1),
    }


def recall(index: CellIndex, queries: Float32, cohort: Cohort) -> dict[str, float]:
    """Recall of the nearest 10 and 50 against a product with all vectors."""
    best = np.full((len(queries), 50), -np.inf, np.float32)
    for vectors in all_vectors(cohort):
        together = np.concatenate([best, queries @ vectors.T], axis=1)
        best = -np.partition(-together, 49, axis=1)[:, :50]
    exact = -np.sort(-best, axis=1)
    found = {}
    for k in (10, 50):
        _, scores = index.nearest(queries, k)
        found[f"at_{k}"] = round(float(recall_of(scores + 1e-6, exact[:, :k]).mean()), 5)
    return found


def sizes(options: argparse.Namespace, draw: Draw, queries: Float32) -> list[dict[str, Any]]:
    """The same vectors in a flat index and in lists, by size: where `index.exact_below` should stand."""
    rows = []
    for cells in (10_000, 20_000, 40_000, 60_000, 80_000, 120_000, 200_000):
        for kind in ("flat", "ivf"):
            with tempfile.TemporaryDirectory() as folder:
                found = measure(
                    argparse.Namespace(**{**vars(options), "cells": cells, "kind": kind}), draw, queries, Path(folder)
                )
            kept = (
                "cells",
                "kind",
                "depth",
                "build_s",
                "open_s",
                "one_query_ms",
                "queries_per_s",
                "queries_per_cpu_s",
                "recall",
            )
            rows.append({name: found[name] for name in (*kept, "load_average")})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def retrieval(base: Float32, kinds: npt.NDArray[np.str_], threads: int) -> dict[str, Any]:
    """Precision at 50 among phantom cells: of the neighbours of CTCs, and of candidates from 20 labelled CTCs."""
    from polars import DataFrame

    ids = [f"{cell:024x}" for cell in range(len(base))]
    columns = {"cell_id": ids, "patient": ["phantom"] * len(ids), "physical_id": ids}
    frame = DataFrame(columns).with_row_index("position").to_arrow()
    zeros = {"field": np.ones(len(ids), np.int16), "row": np.zeros(len(ids)), "col": np.zeros(len(ids))}
    for name, values in {**zeros, "cluster": np.zeros(len(ids), np.int16)}.items():
        frame = frame.append_column(name, pa.array(values))
    cells = DataFrame(frame.select(CELLS_SCHEMA.names).cast(CELLS_SCHEMA))
    flat = new_index(base.shape[1], "cosine")
    flat.add(prepared(base, "cosine", "phantom"))
    index = CellIndex(flat, cells, "cosine", num_threads=threads)
    is_ctc = np.char.startswith(kinds, "ctc")
    kind_of = dict(zip(ids, is_ctc, strict=True))
    ctcs = np.flatnonzero(is_ctc)
    found = index.similar_to_cells([ids[i] for i in ctcs[:200]], k=50)
    result: dict[str, Any] = {
        "cells": len(ids),
        "prevalence": round(float(is_ctc.mean()), 4),
        "precision_at_50_of_ctc_queries": round(float(np.mean([kind_of[name] for name in found["cell_id"]])), 4),
    }
    for contrast, diversity in ((0.0, 0.0), (0.5, 0.0), (1.0, 0.0), (0.5, 0.2), (0.5, 0.5)):
        precision, spread = candidates(index, base, is_ctc, kind_of, contrast, diversity)
        result[f"candidates_contrast_{contrast}_diversity_{diversity}"] = {
            "precision_at_50": precision,
            "mean_cosine_among_candidates": spread,
        }
    return result


def candidates(
    index: CellIndex,
    base: Float32,
    is_ctc: npt.NDArray[np.bool_],
    kind_of: dict[str, np.bool_],
    contrast: float,
    diversity: float,
) -> tuple[float, float]:
    """Precision at 50 and mean cosine between the candidates, over 20 draws of 20 labelled CTCs and 80 other cells."""
    unit = prepared(base, "cosine", "phantom")
    precision, alike = [], []
    for seed in range(20):
        rng = np.random.default_rng([SEED, seed])
        positives = np.sort(rng.choice(np.flatnonzero(is_ctc), 20, replace=False)).astype(np.int64)
        negatives = np.sort(rng.choice(np.flatnonzero(~is_ctc), 80, replace=False)).astype(np.int64)
        excluded = np.zeros(len(index), bool)
        excluded[np.concatenate([positives, negatives])] = True
        found = rank_candidates(
            index, positives, negatives, k=50, excluded=excluded, contrast=contrast, diversity=diversity
        )["cell_id"].to_list()
        precision.append(np.mean([kind_of[name] for name in found]))
        vectors = unit[index.positions_of(found)]
        alike.append((vectors @ vectors.T)[np.triu_indices(len(found), 1)].mean())
    return round(float(np.mean(precision)), 4), round(float(np.mean(alike)), 4)


if __name__ == "__main__":
    main()
