"""Segment and embed in one streaming plan.

Example: `ray job submit --working-dir . -- python -m jobs.ingest --help`.
"""

import sys

from ctc_ray.cli import main

if __name__ == "__main__":
    main(["ingest", *sys.argv[1:]])
