"""What Ray Data's own loop costs a unit of work, and so how many actors one driver can feed.

    python -m benchmarks.scheduler --units 250 1000 4000

Units that compute nothing go through a plan of the shape that embedding has: rows, read tasks, a pool of actors, status rows to
the driver. One block a unit, as with up to 1,000 units; with more, embedding puts several into a block. The slope between the sizes
is the cost of a unit without the plan's start. Units a second are those of this machine, on which reader, actors and driver share
the processors; the driver's own processor time a unit bounds a driver that has a core for itself. Writes
`benchmarks/results/scheduler.json`, from which `python -m benchmarks.scaling` takes it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa

from benchmarks.segment_accuracy import hardware
from ctc_ray.cluster import connect
from ctc_ray.config import RayConfig
from ctc_ray.records import library_versions

READERS = 2
"""Reading tasks at once, as embedding has on processors."""
RESULTS = Path(__file__).parent / "results" / "scheduler.json"


def read_nothing(units: pa.Table) -> pa.Table:
    """A read task without a file."""
    return units


class EmbedNothing:
    """An actor that answers a unit with a status row of the usual columns."""

    def __call__(self, units: pa.Table) -> pa.Table:
        """Status rows of the units."""
        rows = [
            {"part": row["part"], "cells": 0, "node": "node", "pid": os.getpid(), "kind": "", "message": ""}
            for row in units.to_pylist()
        ]
        return pa.Table.from_pylist(rows)


def feed(num_units: int, num_actors: int) -> dict[str, float]:
    """Send units through the plan; seconds, the driver's processor seconds, and how much it grew."""
    import ray

    shard = "cells/patient/part-000.parquet"
    units = [
        {"patient": "patient", "shard": shard, "start": i, "stop": i, "part": f"{i:08d}"} for i in range(num_units)
    ]
    process = psutil.Process()
    cpu, memory, started = time.process_time(), process.memory_info().rss, time.perf_counter()
    rows = (
        ray.data.from_items(units, override_num_blocks=num_units)
        .map_batches(
            read_nothing,
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=0.1,
            compute=ray.data.TaskPoolStrategy(size=READERS),
        )
        .map_batches(
            EmbedNothing,
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=0.9,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=num_actors, initial_size=num_actors),
        )
    )
    done: set[str] = set()
    batch: Any
    for batch in rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        done.update(batch["part"].to_pylist())
    if len(done) != num_units:
        raise RuntimeError(f"{len(done)} of {num_units} units came back")
    return {
        "units": num_units,
        "seconds": round(time.perf_counter() - started, 2),
        "driver_cpu_s": round(time.process_time() - cpu, 2),
        "driver_grew_mb": round((process.memory_info().rss - memory) / 2**20, 1),
    }


def slope(rows: list[dict[str, float]], name: str) -> float:
    """Seconds a unit between the smallest and the largest size."""
    return (rows[-1][name] - rows[0][name]) / (rows[-1]["units"] - rows[0]["units"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, nargs="+", default=[250, 1000, 4000], help="two sizes at least")
    parser.add_argument("--actors", type=int, default=2)
    options = parser.parse_args()
    sizes = sorted(set(options.units))
    if len(sizes) < 2:
        parser.error("--units: give two sizes at least")
    with connect(config=RayConfig(num_cpus=max(4, options.actors + 1), object_store_mb=100)):
        feed(20, options.actors)  # workers start
        rows = [feed(size, options.actors) for size in sizes]
    result = {
        "rows": rows,
        "units_per_s": round(1 / slope(rows, "seconds"), 1),
        "driver_cpu_ms_a_unit": round(1e3 * slope(rows, "driver_cpu_s"), 2),
        "actors": options.actors,
        "load_average": [round(value, 1) for value in os.getloadavg()],
        "hardware": hardware(),
        "versions": library_versions(),
        "command": f"python -m benchmarks.scheduler --units {' '.join(map(str, sizes))} --actors {options.actors}",
    }
    print(f"{'units':>8}{'s':>10}{'driver CPU s':>14}{'driver grew MB':>16}")
    for row in rows:
        print(f"{row['units']:8}{row['seconds']:10.2f}{row['driver_cpu_s']:14.2f}{row['driver_grew_mb']:16.1f}")
    print(f"{result['units_per_s']} units/s here, {result['driver_cpu_ms_a_unit']} ms of the driver's processor a unit")
    RESULTS.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
