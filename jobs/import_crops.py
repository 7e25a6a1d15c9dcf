"""Bring in single-cell images that another program cut out.

Example: `ray job submit --working-dir . -- python -m jobs.import_crops --help`.
"""

import sys

from ctc_ray.cli import main

if __name__ == "__main__":
    main(["import-crops", *sys.argv[1:]])
