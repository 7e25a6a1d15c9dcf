"""Ingests on three emulated machines, of which one may go: `python ingest_on_machines.py COHORT CARTRIDGES keep|lose [OVERRIDE...]`."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from ctc_ray.cluster import connect
from ctc_ray.cohort import Cohort
from ctc_ray.config import load_config
from ctc_ray.ingest.stage import run_ingest
from ctc_ray.progress import Progress

MACHINE = {"num_cpus": 2, "object_store_memory": 80 * 2**20}


def main(folder: str, cartridges: str, fate: str, overrides: list[str]) -> None:
    """Run to the end; fails where the run does, or where it ended before the machine was lost."""
    cluster = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **MACHINE})
    machines = [cluster.add_node(**MACHINE) for _ in range(2)]
    failures: list[BaseException] = []

    def ingest() -> None:
        try:
            run_ingest(load_config(None, overrides), Cohort.open(folder), cartridges=cartridges, progress=Progress())
        except BaseException as error:  # noqa: BLE001  (raised again below, in the main thread)
            failures.append(error)

    with connect(address=cluster.address):
        ray.data.DataContext.get_current().wait_for_min_actors_s = 400  # all actors are there before the first field
        thread = threading.Thread(target=ingest)
        thread.start()
        if fate == "lose":
            parts = Path(folder, "cells")
            while thread.is_alive() and not any(parts.glob("*/_parts/*/field-*.parquet")):
                time.sleep(0.02)
            if not thread.is_alive():
                failures.append(RuntimeError("the run ended before a machine could be lost"))
            else:
                cluster.remove_node(machines[0], allow_graceful=False)
        thread.join()
    cluster.shutdown()
    if failures:
        raise failures[0]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])
