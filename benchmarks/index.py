"""The index at cohort size: build, recall, latency, queries a second, memory, the size where lists pay, and retrieval.

    python -m benchmarks.index --cells 1300000 --threads 2 [--vectors phantom|mixture] [--ray] [--base FILE] [--no-sizes]

Vectors `phantom`: the shipped encoder's embeddings of phantom crops (demo profile), brought to any number by walking from a
random one part of the way (uniform 0 to 1) to one of its ten nearest, plus isotropic noise of a tenth of that step.
`mixture`: 500 Gaussian components of 16 dimensions turned into the space, and noise in all dimensions. Both are written as a
cohort of patients, and the stage builds the index from there. Queries are further vectors made the same way, which the index
does not hold; the truth is a plain product with all vectors. Adds its result to `benchmarks/results/index.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
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

from ctc_ray.cluster import connect
from ctc_ray.cohort import Cohort
from ctc_ray.config import IndexConfig, RayConfig, RunConfig
from ctc_ray.index.build import faiss_threads, new_index, prepared
from ctc_ray.index.cell_table import CELLS_SCHEMA
from ctc_ray.index.retrieval import rank_candidates
from ctc_ray.index.search import CellIndex
from ctc_ray.index.stage import run_index
from ctc_ray.index.tune import recall_of
from ctc_ray.progress import Progress
from ctc_ray.records import Record, publish
from ctc_ray.schema import DUPLICATES_SCHEMA, embeddings_schema

Float32 = npt.NDArray[np.float32]
RESULTS = Path(__file__).parent / "results" / "index.json"
PATIENTS = 90
ENCODER = "dino"
SEED = 20_261
BASE_CROPS = 4_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=128, help="of the mixture; phantom vectors have the encoder's")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--queries", type=int, default=2_000)
    parser.add_argument("--vectors", choices=("phantom", "mixture"), default="phantom")
    parser.add_argument("--kind", choices=("auto", "flat", "ivf", "hnsw"), default="auto")
    parser.add_argument("--base", type=Path, help="file that keeps the phantom embeddings between runs")
    parser.add_argument("--ray", action="store_true", help="build with Ray tasks on as many CPUs as --threads")
    parser.add_argument("--no-sizes", action="store_true", help="skip flat indices of several sizes")
    options = parser.parse_args()
    base, kinds = phantom_embeddings(options.base) if options.vectors == "phantom" else (None, None)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, draw_from(base) if base is not None else mixture(options.width), Path(folder))
    if not options.no_sizes:
        result["flat_sizes"] = flat_sizes(options)
    if base is not None and kinds is not None:
        result["retrieval"] = retrieval(base, kinds, options.threads)
    result["command"] = f"python -m benchmarks.index --cells {options.cells} --vectors {options.vectors}"
    print(json.dumps(result, indent=1))
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known[f"{options.vectors}_{options.cells}_{options.kind}"] = result
    RESULTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


# Vectors -----------------------------------------------------------------------------------------------------------

Draw = Callable[[int, np.random.Generator], Float32]


def phantom_embeddings(path: Path | None) -> tuple[Float32, npt.NDArray[np.str_]]:
    """Embeddings (N, D) of phantom crops by the shipped encoder, and their kinds (N,)."""
    if path is not None and path.exists():
        with np.load(path) as stored:
            return stored["vectors"], stored["kinds"]
    from ctc_ray.embed import Embedder
    from ctc_ray.phantom import PROFILES
    from ctc_ray.phantom.crops import draw_crops

    crops, kinds = draw_crops(BASE_CROPS, seed=SEED, profile=PROFILES["demo"])
    vectors = Embedder.load(precision="fp32")(crops)
    if path is not None:
        np.savez(path, vectors=vectors, kinds=kinds)
    return vectors, kinds


def draw_from(base_ND: Float32) -> Draw:
    """Walk from known vectors towards their neighbours."""
    with faiss_threads(1):
        index = new_index(base_ND.shape[1], "l2")
        index.add(base_ND)
        _, near = index.search(base_ND, 11)

    def draw(num: int, rng: np.random.Generator) -> Float32:
        start = rng.integers(0, len(base_ND), num)
        step = base_ND[near[start, rng.integers(1, 11, num)]] - base_ND[start]
        scale = 0.1 * np.linalg.norm(step, axis=1, keepdims=True) / base_ND.shape[1] ** 0.5
        noise = rng.standard_normal(step.shape, np.float32) * scale
        return (base_ND[start] + rng.random((num, 1), np.float32) * step + noise).astype(np.float32)

    return draw


def mixture(width: int, components: int = 500, dimensions: int = 16) -> Draw:
    """Clouds of few dimensions, each turned its own way."""
    rng = np.random.default_rng(SEED)
    centres = rng.standard_normal((components, width)).astype(np.float32)
    axes = rng.standard_normal((components, dimensions, width)).astype(np.float32) / dimensions**0.5

    def draw(num: int, rng: np.random.Generator) -> Float32:
        code = np.sort(rng.integers(0, components, num))
        vectors = centres[code] + 0.05 * rng.standard_normal((num, width), np.float32)
        for number in np.unique(code):
            own = code == number
            vectors[own] += rng.standard_normal((int(own.sum()), dimensions), np.float32) @ axes[number] * 0.5
        return vectors[rng.permutation(num)].astype(np.float32)

    return draw


def write_cohort(cohort: Cohort, draw: Draw, num_cells: int) -> None:
    """A cohort of as many patients as the paper's, with what the index stage reads."""
    names = [f"P{number:02d}" for number in range(PATIENTS)]
    cohort.add_patients(dict.fromkeys(names, "made"))
    for number, (patient, part) in enumerate(zip(names, np.array_split(np.arange(num_cells), PATIENTS), strict=True)):
        vectors = draw(len(part), np.random.default_rng([SEED, number]))
        ids = [f"{cell:024x}" for cell in part]
        width = vectors.shape[1]
        embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), width)
        columns = {"cell_id": ids, "patient": [patient] * len(ids), "embedding": embedding}
        table = pa.table(columns, schema=embeddings_schema(width))
        place = np.arange(len(ids)).astype(np.float32)
        cells = pa.table({"cell_id": ids, "field": np.ones(len(ids), np.int16), "row": place, "col": place})
        own = pa.table({"cell_id": ids, "physical_id": ids}, schema=DUPLICATES_SCHEMA)
        store = cohort.store
        publish(store, cohort.cells(patient), {"part-000.parquet": cells}, Record("segment", patient, "1", {}, {}))
        store.write_table(cohort.duplicates_path(patient), own, row_group_size=65_536)
        record = Record("embed", patient, "1", {}, {})
        publish(store, cohort.embeddings(ENCODER, patient), {"part-000.parquet": table}, record)


def all_vectors(cohort: Cohort) -> Iterator[Float32]:
    from ctc_ray.latent.embeddings import iterate_shards

    for patient in cohort.patient_ids():
        for _, _, vectors in iterate_shards(cohort, ENCODER, patient):
            yield prepared(vectors, "cosine", patient)


# Measures ----------------------------------------------------------------------------------------------------------


@contextmanager
def peak_memory() -> Iterator[dict[str, float]]:
    """Peak resident MB of this process and of it with its children, sampled; mapped files count where they are touched."""
    found, done, process = {"driver_mb": 0.0, "all_mb": 0.0}, threading.Event(), psutil.Process()

    def sample() -> None:
        while not done.wait(0.2):
            own = process.memory_info().rss / 2**20
            others = 0.0
            for child in process.children(recursive=True):
                try:
                    others += child.memory_info().rss / 2**20
                except psutil.NoSuchProcess:
                    continue
            found["driver_mb"], found["all_mb"] = max(found["driver_mb"], own), max(found["all_mb"], own + others)

    watcher = threading.Thread(target=sample, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


def measure(options: argparse.Namespace, draw: Draw, folder: Path) -> dict[str, Any]:
    cohort = Cohort.open(str(folder / "cohort"), create=True)
    write_cohort(cohort, draw, options.cells)
    kind, threads = options.kind, options.threads
    config = RunConfig(index=IndexConfig(num_threads=threads, kind=kind, target_recall=0.99))
    session = connect(config=RayConfig(num_cpus=threads, object_store_mb=100)) if options.ray else nullcontext()
    with session, peak_memory() as memory:
        started = time.perf_counter()
        run_index(config, cohort, progress=Progress(quiet=True))
        build_s = time.perf_counter() - started
    description = cohort.store.read_json(f"{cohort.index(ENCODER)}/index.json")
    open_s = min(timed(lambda: CellIndex.open(cohort, ENCODER, use_gpu=False))[1] for _ in range(3))
    index = CellIndex.open(cohort, ENCODER, num_threads=threads, use_gpu=False)
    queries = prepared(draw(options.queries, np.random.default_rng([SEED, 999_999])), "cosine", "queries")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "cells": options.cells,
        "width": int(queries.shape[1]),
        "threads": threads,
        "vectors": options.vectors,
        "kind": description["kind"],
        "lists": description.get("lists"),
        "depth": description["depth"],
        "measured_at_build": description["measured"],
        "build_s": round(build_s, 2),
        "build_with_ray": options.ray,
        "build_memory": {name: round(value) for name, value in memory.items()},
        "index_mb": round((cohort.store.size(f"{cohort.index(ENCODER)}/index.faiss") or 0) / 2**20),
        "open_s": round(open_s, 4),
        **speed(index, queries, threads),
        "recall": recall(index, queries[:512], cohort),
        "peak_rss_mb_after_open": round(max(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)),
        "load_average": [round(value, 1) for value in os.getloadavg()],
    }


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    result = function()
    return result, time.perf_counter() - started


def speed(index: CellIndex, queries: Float32, threads: int) -> dict[str, Any]:
    """Milliseconds of one query with its table of ten cells, and queries a second of a batch; warm."""
    index.similar_to_vectors(queries, k=10)
    one_cpu = time.process_time()
    one_by_one = [
        1e3 * timed(lambda query=query: index.similar_to_vectors(query[None], k=10))[1] for query in queries[:300]
    ]
    one_cpu = 1e3 * (time.process_time() - one_cpu) / len(one_by_one)
    batches = []
    for _ in range(3):
        cpu = time.process_time()
        seconds = timed(lambda: index.similar_to_vectors(queries, k=10))[1]
        batches.append((len(queries) / seconds, len(queries) / (time.process_time() - cpu)))
    wall, per_cpu = max(batches)
    return {
        "one_query_ms": {
            "median": round(float(np.median(one_by_one)), 3),
            "p95": round(float(np.percentile(one_by_one, 95)), 3),
            "cpu_ms": round(one_cpu, 3),
        },
        "queries_per_s": round(wall, 1),
        "queries_per_cpu_s": round(per_cpu, 1),
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


def flat_sizes(options: argparse.Namespace) -> list[dict[str, float]]:
    """Speed of a flat index by size: `index.exact_below` is the largest one that still answers 1,000 queries/s."""
    rng, rows = np.random.default_rng(SEED), []
    with faiss_threads(options.threads):
        for size in (10_000, 20_000, 40_000, 60_000, 80_000, 120_000, 200_000):
            index = new_index(options.width, "cosine")
            index.add(rng.standard_normal((size, options.width), np.float32))
            queries = rng.standard_normal((1_000, options.width), np.float32)
            index.search(queries[:10], 10)
            cpu = time.process_time()
            batch = min(timed(lambda index=index, queries=queries: index.search(queries, 10))[1] for _ in range(2))
            cpu = (time.process_time() - cpu) / 2
            one = [timed(lambda index=index, query=query: index.search(query[None], 10))[1] for query in queries[:50]]
            row = {"cells": size, "queries_per_s": round(1_000 / batch, 1), "queries_per_cpu_s": round(1_000 / cpu, 1)}
            rows.append({**row, "one_query_ms": round(1e3 * float(np.median(one)), 3)})
    return rows


def retrieval(base: Float32, kinds: npt.NDArray[np.str_], threads: int) -> dict[str, Any]:
    """Precision at 50 among phantom cells: of the neighbours of each CTC, and of candidates from 20 labelled CTCs."""
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
