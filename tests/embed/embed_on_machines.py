"""Embeds a cohort on three emulated machines and takes one away half way: `python embed_on_machines.py COHORT [OVERRIDE...]`."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from ctc_ray.cohort import Cohort
from ctc_ray.config import load_config
from ctc_ray.embed.stage import run_embed
from ctc_ray.progress import Progress

MACHINE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
PARTS_BEFORE = 10


def main(folder: str, overrides: list[str]) -> None:
    """Run to the end; fails where the run does, or where it ended before the machine was lost."""
    cluster = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **MACHINE})
    cluster.add_node(**MACHINE)
    last = cluster.add_node(**MACHINE)
    ray.init(address=cluster.address, log_to_driver=False)
    ray.data.DataContext.get_current().wait_for_min_actors_s = 400  # all actors are there before the first unit
    failures: list[Exception] = []

    def embed() -> None:
        try:
            run_embed(load_config(None, overrides), Cohort.open(folder), progress=Progress())
        except Exception as error:  # noqa: BLE001  (raised again below, in the main thread)
            failures.append(error)

    thread = threading.Thread(target=embed)
    thread.start()
    output = Path(folder, "embeddings")
    while thread.is_alive() and len(list(output.glob("*/*/_parts/*/part-*.parquet"))) < PARTS_BEFORE:
        time.sleep(0.05)
    lost = thread.is_alive()
    if lost:
        cluster.remove_node(last, allow_graceful=False)
    thread.join()
    ray.shutdown()
    cluster.shutdown()
    if failures:
        raise failures[0]
    if not lost:
        raise RuntimeError("the run ended before a machine could be lost")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
