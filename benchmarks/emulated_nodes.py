"""Run a command on a Ray cluster of several nodes on this machine: `python -m benchmarks.emulated_nodes NODES COMMAND...`.

The first node is the one that the command's driver belongs to; it has two processors, the others one each. Ends with the
command's exit code. Nodes share this machine's address, so they stand for lost processes and stores, not for lost networks.
"""

from __future__ import annotations

import os
import subprocess
import sys

from ray.cluster_utils import Cluster

STORE_BYTES = 80 * 2**20


def main(num_nodes: int, command: list[str]) -> int:
    """Start the nodes, run the command, stop the nodes."""
    head = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(num_nodes - 1):
        cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
    cluster.wait_for_nodes()
    try:
        return subprocess.run(command, env={**os.environ, "RAY_ADDRESS": cluster.address}, check=False).returncode
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
