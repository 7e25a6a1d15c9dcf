"""Run the whole flow on a phantom cohort.

Example: `ray job submit --working-dir . -- python -m jobs.demo --help`.
"""

import sys

from ctc_ray.cli import main

if __name__ == "__main__":
    main(["demo", *sys.argv[1:]])
