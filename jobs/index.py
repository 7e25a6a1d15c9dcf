"""Build the nearest-neighbour index.

Example: `ray job submit --working-dir . -- python -m jobs.index --help`.
"""

import sys

from ctc_ray.cli import main

if __name__ == "__main__":
    main(["index", *sys.argv[1:]])
