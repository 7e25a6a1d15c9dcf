"""Embedding at cohort size: the bare model loop, the pipeline, and reading alone; memory, spilling, and a naive way beside it.

    python -m benchmarks.embed --folder FOLDER [--sizes 10000 100000 1000000] [--repeats 3] [--naive] [--compile]

The cohort of phantom crops (`benchmarks/embed_cohort.py`) is drawn where FOLDER does not hold it yet, and kept. In every round
follow each other, so that a busy machine is as unkind to one as to another:

- bare: crops in memory through `Embedder`, in one process with as many threads as the pipeline has, and in as many processes of
  one thread;
- pipeline: `run_embed` on a Ray that is up, with `--actors` actors of `--threads` threads. `steady` counts from the start of the
  first unit to the end of the last, with reading, writing and status rows; `whole` is the call, with the start of the actors and
  the joining of parts.

The bar is `steady` over the bare loop in one process with the same threads. CPU seconds are those of all processes of the run, Ray's
own included. Then reading alone: the plan's read tasks through Ray Data into the driver, per CPU second of the reading workers,
and pyarrow alone in one process. `--naive` compares with one PNG a channel a cell (`benchmarks/embed_naive.py`), `--compile` measures
`torch.compile`. Adds its results to `benchmarks/results/embed.json`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Barrier
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import ray
import torch

import ctc_ray.embed.stage
from benchmarks.embed_cohort import CELLS_A_PATIENT, make_cohort, patients_of
from benchmarks.process_watch import watched
from benchmarks.segment_accuracy import hardware
from ctc_ray.cluster import connect
from ctc_ray.cohort import Cohort
from ctc_ray.config import RayConfig, RunConfig, load_config
from ctc_ray.embed import Embedder
from ctc_ray.embed.frozen_xcit import freeze_xcit
from ctc_ray.embed.reading import read_units
from ctc_ray.embed.stage import run_embed
from ctc_ray.embed.units import Unit, units_of
from ctc_ray.pretrain.encoder import DEFAULT_FOLDER, load_folder
from ctc_ray.pretrain.precision import autocast
from ctc_ray.pretrain.slices import Slice, read_slice
from ctc_ray.progress import Progress
from ctc_ray.records import library_versions
from ctc_ray.schema import unpack_pixels
from ctc_ray.storage import Store

RESULTS = Path(__file__).parent / "results" / "embed.json"
ENCODER = "default"
BARE_CROPS = 4_096
BARE_SECONDS = 12.0
READ_CELLS = 100_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of the cohort; kept")
    parser.add_argument("--sizes", type=int, nargs="*", default=[10_000, 100_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of an actor")
    parser.add_argument("--unit-cells", type=int, default=None)
    parser.add_argument("--naive", action="store_true")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    cohort = make_cohort(options.folder, max(*options.sizes, READ_CELLS) if options.sizes else CELLS_A_PATIENT)
    found: dict[str, Any] = {"hardware": hardware(), "versions": library_versions()}
    found["precision"] = Embedder.load().precision
    if options.sizes:
        with connect(config=RayConfig(object_store_mb=500)):
            found["sizes"] = {str(size): measure_size(options, cohort, size) for size in options.sizes}
            found["reading"] = reading(cohort)
        largest = found["sizes"][str(max(options.sizes))]
        devices = options.actors * options.threads
        found["rates"] = [{"device": "cpu", "crops_per_second": largest["pipeline_steady_per_s"], "devices": devices}]
    if options.compile:
        found["compile"] = compiled(crops_of(cohort, BARE_CROPS))
    if options.naive:
        from benchmarks.embed_naive import compare

        found["naive"] = compare(cohort)
    print(json.dumps(found, indent=1))
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    sizes = known.get("sizes", {}) | found.get("sizes", {})
    known |= found
    if sizes:
        known["sizes"] = sizes
    RESULTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def crops_of(cohort: Cohort, num_cells: int) -> npt.NDArray[Any]:
    """Crops (N, C, 48, 48) of the first patient, in memory."""
    (shard,) = cohort.shards(cohort.cells(patients_of(1)[0]))
    table = read_slice(cohort.store, Slice(shard, 0, min(num_cells, CELLS_A_PATIENT)), ["pixels"])
    return unpack_pixels(table["pixels"], table.schema.field("pixels")).copy()


# The bare loop -----------------------------------------------------------------------------------------------------


def bare(cohort: Cohort, processes: int, threads: int) -> dict[str, float]:
    """Crops a second of `Embedder` alone, in processes that begin together, and per CPU second."""
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(processes), context.Queue()
    arguments = (str(cohort.store.address), threads, barrier, queue)
    children = [context.Process(target=_bare_loop, args=arguments) for _ in range(processes)]
    for child in children:
        child.start()
    rates = [queue.get() for _ in children]
    for child in children:
        child.join()
    return {"per_s": sum(rate for rate, _ in rates), "cpu_ms": float(np.mean([cpu for _, cpu in rates]))}


def _bare_loop(address: str, threads: int, barrier: Barrier, queue: Any) -> None:
    torch.set_num_threads(threads)
    crops, embed = crops_of(Cohort.open(address), BARE_CROPS), Embedder.load()
    embed(crops[:256])
    barrier.wait()
    started, cpu, done = time.perf_counter(), time.process_time(), 0
    while (seconds := time.perf_counter() - started) < BARE_SECONDS:
        start = done % BARE_CROPS
        embed(crops[start : start + 512])
        done += 512
    queue.put((done / seconds, 1e3 * (time.process_time() - cpu) / done))


def compiled(crops: npt.NDArray[Any], num_crops: int = 512, batch: int = 64) -> dict[str, Any]:
    """One thread: timm's module under autocast and the frozen one, as they are and through `torch.compile`."""
    torch.set_num_threads(1)
    backbone, spec = load_folder(DEFAULT_FOLDER)
    embed = Embedder.load()
    dtype = torch.bfloat16 if embed.precision == "bf16" else torch.float32
    frozen = freeze_xcit(backbone, spec.input_size_px, dtype)
    images = embed._scaled(crops[:num_crops], None)
    found: dict[str, Any] = {}
    for name, module in (("timm", backbone), ("frozen", frozen)):
        precision = embed.precision if name == "timm" else "fp32"
        for way in ("eager", "compiled"):
            torch._dynamo.reset()
            call: Any = torch.compile(module) if way == "compiled" else module
            with torch.inference_mode(), autocast(precision, embed.device):
                started = time.perf_counter()
                call(images[:batch])
                first_s = time.perf_counter() - started
                seconds = []
                for _ in range(5):
                    cpu = time.process_time()
                    for start in range(0, num_crops, batch):
                        call(images[start : start + batch])
                    seconds.append(time.process_time() - cpu)
            found[f"{name}, {way}"] = {
                "first_call_s": round(first_s, 1),
                "per_cpu_s": round(num_crops / min(seconds), 1),
            }
    return found


# The pipeline ------------------------------------------------------------------------------------------------------


def measure_size(options: argparse.Namespace, cohort: Cohort, num_cells: int) -> dict[str, Any]:
    """Medians over rounds of the bare loops and the pipeline, one after the other."""
    total_threads = options.actors * options.threads
    rounds = []
    for _ in range(options.repeats if num_cells < 500_000 else 1):
        one = {f"bare_{total_threads}_threads": bare(cohort, 1, total_threads)}
        one[f"bare_{total_threads}_processes"] = bare(cohort, total_threads, 1)
        one["pipeline"] = pipeline(options, cohort, num_cells)
        one["load_average"] = round(os.getloadavg()[0], 1)
        rounds.append(one)
        print(json.dumps(one), flush=True)

    def middle(*path: str) -> float:
        values = []
        for one in rounds:
            value: Any = one
            for key in path:
                value = value[key]
            values.append(value)
        return float(median(values))

    steady = [one["pipeline"]["steady_per_s"] for one in rounds]
    threads, processes = (f"bare_{total_threads}_{kind}" for kind in ("threads", "processes"))
    over = {
        name: [rate / one[name]["per_s"] for rate, one in zip(steady, rounds, strict=True)]
        for name in (threads, processes)
    }
    return {
        "actors": options.actors,
        "threads_an_actor": options.threads,
        "rounds": rounds,
        "bare_per_s": {name: round(middle(name, "per_s"), 1) for name in over},
        "pipeline_steady_per_s": round(middle("pipeline", "steady_per_s"), 1),
        "pipeline_whole_per_s": round(middle("pipeline", "whole_per_s"), 1),
        "pipeline_over_bare": {name: round(float(median(values)), 3) for name, values in over.items()},
        "bare_cpu_ms_a_crop": {name: round(middle(name, "cpu_ms"), 4) for name in over},
        "pipeline_cpu_ms_a_crop": round(middle("pipeline", "cpu_ms_a_crop"), 4),
    }


@contextmanager
def status_rows() -> Iterator[list[dict[str, Any]]]:
    """The status rows that the stage sees while the block runs."""
    rows: list[dict[str, Any]] = []
    stream = ctc_ray.embed.stage.stream_units

    def tee(*arguments: Any) -> Iterator[dict[str, Any]]:
        for row in stream(*arguments):
            rows.append(row)
            yield row

    with mock.patch.object(ctc_ray.embed.stage, "stream_units", tee):
        yield rows


def config_of(options: argparse.Namespace) -> RunConfig:
    given = {"encoder": ENCODER, "num_actors": options.actors, "num_threads": options.threads}
    if options.unit_cells:
        given["unit_cells"] = options.unit_cells
    return load_config(None, [f"embed.{name}={value}" for name, value in given.items()])


def pipeline(options: argparse.Namespace, cohort: Cohort, num_cells: int) -> dict[str, Any]:
    """One run of the stage from nothing, with what it took."""
    cohort.store.delete_folder(f"embeddings/{ENCODER}")
    patients = patients_of(num_cells)
    with status_rows() as rows, watched() as seen:
        started = time.perf_counter()
        result = run_embed(config_of(options), cohort, patients=patients, progress=Progress())
        whole_s = time.perf_counter() - started
    cells = result.counts["cells"]
    begun, ended = min(row["start"] for row in rows), max(row["end"] for row in rows)
    busy = sum(row["end"] - row["start"] for row in rows)
    own = seen.driver_uss_mb_by_time
    third = max(1, len(own) // 3)
    return {
        "cells": cells,
        "units": len(rows),
        "steady_per_s": cells / (ended - begun),
        "steady_s": ended - begun,
        "whole_per_s": cells / whole_s,
        "whole_s": whole_s,
        "actors_busy_share": busy / (ended - begun) / len({row["pid"] for row in rows}),
        "cpu_ms_a_crop": 1e3 * seen.cpu_seconds() / cells,
        "cpu_s": {kind: round(seen.cpu_seconds(kind), 1) for kind in ("driver", "embed", "read", "worker", "ray")},
        "driver_rss_mb": round(seen.driver_rss_mb),
        "driver_uss_mb": round(seen.driver_uss_mb),
        "driver_uss_mb_first_and_last_third": [round(max(own[:third])), round(max(own[-third:]))],
        "worker_uss_mb": round(seen.worker_uss_mb),
        "workers_uss_mb": round(seen.workers_uss_mb),
        "object_store_mb": round(seen.store_mb),
        "spilled_mb": round(seen.spilled_mb),
    }


# Reading -----------------------------------------------------------------------------------------------------------


def reading(cohort: Cohort, num_cells: int = READ_CELLS) -> dict[str, Any]:
    """Crops a CPU second of reading workers through Ray Data, and of pyarrow alone."""
    units: list[Unit] = []
    for patient in patients_of(num_cells):
        units += units_of(cohort.store, patient, cohort.shards(cohort.cells(patient)), "none", 1_000)
    with watched() as seen:
        started = time.perf_counter()
        rows = read_through_ray(cohort.store, units)
        seconds = time.perf_counter() - started
    cpu = time.process_time()
    for unit in units:
        read_slice(cohort.store, Slice(unit.shard, unit.start, unit.stop), ["cell_id", "patient", "pixels"])
    cpu = time.process_time() - cpu
    workers = seen.cpu_seconds("read") + seen.cpu_seconds("worker")
    return {
        "cells": num_cells,
        "units_read": rows,
        "ray_data_per_s": round(num_cells / seconds, 1),
        "ray_data_per_worker_cpu_s": round(num_cells / workers, 1),
        "ray_data_per_cpu_s_of_all": round(num_cells / seen.cpu_seconds(), 1),
        "pyarrow_per_cpu_s": round(num_cells / cpu, 1),
        "object_store_mb": round(seen.store_mb),
        "spilled_mb": round(seen.spilled_mb),
        "load_average": round(os.getloadavg()[0], 1),
    }


def read_through_ray(store: Store, units: list[Unit]) -> int:
    """Read units with the plan's read tasks into the driver; returns how many came with their cells."""
    plan = ray.data.from_items([unit.to_row() for unit in units], override_num_blocks=len(units)).map_batches(
        read_units,
        fn_kwargs={"store": store},
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.TaskPoolStrategy(size=2),
        num_cpus=1,
    )
    found = 0
    batch: Any
    for batch in plan.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        found += len(batch) - batch["cells"].null_count
    return found


if __name__ == "__main__":
    main()
