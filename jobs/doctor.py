"""Show versions, devices, memory and write access of a cluster.

Example: `ray job submit --working-dir . -- python -m jobs.doctor`.
"""

import sys

from ctc_ray.cli import main

if __name__ == "__main__":
    main(["doctor", *sys.argv[1:]])
