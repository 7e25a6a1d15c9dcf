"""Pretrains a cohort on two emulated machines and takes one away half way: `python lost_machine.py COHORT [OVERRIDE...]`."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from ctc_ray.cohort import Cohort
from ctc_ray.config import load_config
from ctc_ray.pretrain.stage import run_pretrain
from ctc_ray.progress import Progress


def main(folder: str, overrides: list[str]) -> None:
    """Run to the end; fails where the run does, or where it ended before the machine was lost."""
    memory = {"object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **memory})
    other = cluster.add_node(num_cpus=1, **memory)
    ray.init(address=cluster.address, log_to_driver=False)
    failures: list[Exception] = []

    def pretrain() -> None:
        try:
            run_pretrain(load_config(None, overrides), Cohort.open(folder), progress=Progress())
        except Exception as error:  # noqa: BLE001  (raised again below, in the main thread)
            failures.append(error)

    thread = threading.Thread(target=pretrain)
    thread.start()
    state = Path(folder, "encoders", "dino", "_train")
    while thread.is_alive() and not any(state.glob("*/checkpoints/*.json")):
        time.sleep(0.05)
    lost = thread.is_alive()
    if lost:
        cluster.remove_node(other, allow_graceful=False)
    thread.join()
    ray.shutdown()
    cluster.shutdown()
    if failures:
        raise failures[0]
    if not lost:
        raise RuntimeError("the run ended before a machine could be lost")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
