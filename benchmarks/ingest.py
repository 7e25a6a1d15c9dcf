"""Ingest beside segment, then embed: seconds on the same fields, in turns, and how long both pools of ingest worked at once.

Phantom fields of about 84 objects, the shipped StarDist weights and encoder, one local cluster for all runs. `fields a batch` compares
how many fields an embedding actor takes at a time.

python -m benchmarks.ingest [--fields N] [--repeats N] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from benchmarks.segment_accuracy import hardware
from ctc_ray.cluster import connect
from ctc_ray.cohort import Cohort
from ctc_ray.config import PhantomConfig, RayConfig, RunConfig, load_config
from ctc_ray.embed.stage import run_embed
from ctc_ray.ingest import stage
from ctc_ray.ingest.statistics import busy_of, statistics_path
from ctc_ray.phantom import write_phantom
from ctc_ray.progress import Progress
from ctc_ray.records import library_versions
from ctc_ray.segment.stage import run_segment

QUIET = Progress(quiet=True)
Way = Callable[[RunConfig, Cohort, str], None]
BATCHES = (1, stage.FIELDS_A_BATCH)


def two_stages(config: RunConfig, cohort: Cohort, cartridges: str) -> None:
    """`segment`, then `embed`, on the cluster that is connected."""
    run_segment(config, cohort, cartridges=cartridges, progress=QUIET)
    run_embed(config, cohort, progress=QUIET)


def one_plan(fields_a_batch: int) -> Way:
    """`ingest` with so many fields a batch."""

    def run(config: RunConfig, cohort: Cohort, cartridges: str) -> None:
        with mock.patch.object(stage, "FIELDS_A_BATCH", fields_a_batch):
            stage.run_ingest(config, cohort, cartridges=cartridges, progress=QUIET)

    return run


def busy_row(cohort: Cohort) -> dict[str, float]:
    """Seconds that the pools of a finished ingest worked."""
    rows = [
        row for patient in cohort.patient_ids() for row in cohort.store.read_table(statistics_path(patient)).to_pylist()
    ]
    busy = busy_of(rows)
    return {
        "network_busy_s": busy.network,
        "embedding_busy_s": busy.embedding,
        "both_busy_s": busy.both,
        "either_busy_s": busy.either,
    }


def measure(config: RunConfig, cartridges: str, folder: Path, repeats: int) -> list[dict[str, object]]:
    """One row a way; the ways take turns, and the first round, in which processes and pages are cold, does not count."""
    ways: dict[str, Way] = {"segment, then embed": two_stages}
    ways |= {f"ingest, {number} fields a batch": one_plan(number) for number in BATCHES}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    busy: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for number, (name, run) in enumerate(ways.items()):
            cohort = Cohort.open(str(folder / f"{repeat}-{number}"), create=True)
            started = time.perf_counter()
            run(config, cohort, cartridges)
            if repeat:
                seconds[name].append(time.perf_counter() - started)
                busy[name] += [busy_row(cohort)] if name.startswith("ingest") else []
    base = statistics.median(seconds["segment, then embed"])
    return [
        {
            "way": name,
            "seconds": seconds[name],
            "median_s": statistics.median(seconds[name]),
            "share_of_two_stages": statistics.median(seconds[name]) / base,
            **{key: statistics.median(row[key] for row in busy[name]) for key in (busy[name][0] if busy[name] else {})},
        }
        for name in ways
    ]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fields", type=int, default=48, help="of two patients together")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/ingest.json"))
    arguments = parser.parse_args()
    config = load_config(None, ["embed.encoder=default", "embed.num_actors=1"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        phantom = PhantomConfig(patients=2, fields=arguments.fields // 2, seed=11)
        write_phantom(phantom, str(folder / "cartridges"), progress=QUIET)
        with connect(config=RayConfig(num_cpus=4)):
            rows = measure(config, str(folder / "cartridges"), folder, arguments.repeats)
    for row in rows:
        print(f"{row['way']:28} {row['median_s']:7.1f} s   {row['share_of_two_stages']:.2f} of segment, then embed")
        if "both_busy_s" in row:
            print(f"{'':28} both pools at once {row['both_busy_s']:.1f} of {row['either_busy_s']:.1f} s")
    found = {"fields": arguments.fields, "rows": rows, "hardware": hardware(), "versions": library_versions()}
    arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
