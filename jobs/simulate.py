"""Sweep human-in-the-loop simulations over strategies and seeds.

Example: `ray job submit --working-dir . -- python -m jobs.simulate --help`.
"""

import sys

from ctc_ray.cli import main

if __name__ == "__main__":
    main(["simulate", *sys.argv[1:]])
