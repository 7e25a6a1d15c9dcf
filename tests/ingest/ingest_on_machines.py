"""Ingests twice on three emulated machines, the second time losing one half way.

`python ingest_on_machines.py FOLDER CARTRIDGES [OVERRIDE...]`. The cohorts are FOLDER/kept and FOLDER/lost.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from ctc_ray.cluster import connect
from ctc_ray.cohort import Cohort
from ctc_ray.config import load_config
from ctc_ray.ingest.stage import run_ingest
from ctc_ray.progress import Progress

MACHINE = {"num_cpus": 2, "object_store_memory": 80 * 2**20}
FILLING = ["embed.num_actors=1", "embed.num_threads=2"]
"""An embedding actor that fills its machine, so that the cells are cut on another."""


def ingest(
    folder: Path, cartridges: str, overrides: list[str], meanwhile: Callable[[Path, threading.Thread], None]
) -> None:
    """Ingest in a thread, since machines can be removed from the main one alone; raises what the run raises."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            cohort = Cohort.open(str(folder), create=True)
            run_ingest(load_config(None, overrides), cohort, cartridges=cartridges, progress=Progress())
        except BaseException as error:  # noqa: BLE001  (raised again below, in the main thread)
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    meanwhile(folder, thread)
    thread.join()
    if failures:
        raise failures[0]


def main(folder: str, cartridges: str, overrides: list[str]) -> None:
    """Run to the end; fails where a run does, or where the second ended before the machine was lost."""
    cluster = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **MACHINE})
    machines = [cluster.add_node(**MACHINE) for _ in range(2)]

    def lose_one(cohort: Path, run: threading.Thread) -> None:
        while run.is_alive() and not any(cohort.glob("cells/*/_parts/*/field-*.parquet")):
            time.sleep(0.02)
        if not run.is_alive():
            raise RuntimeError("the run ended before a machine could be lost")
        cluster.remove_node(machines[0], allow_graceful=False)

    with connect(address=cluster.address):
        ray.data.DataContext.get_current().wait_for_min_actors_s = 400  # all actors are there before the first field
        ingest(Path(folder, "kept"), cartridges, [*overrides, *FILLING], lambda *_: None)
        ingest(Path(folder, "lost"), cartridges, overrides, lose_one)
    cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
