"""Train the noise filter, and score every cell with it.

Example: `ray job submit --working-dir . -- python -m jobs.filter_noise --help`.
"""

import sys

from ctc_ray.cli import main

if __name__ == "__main__":
    main(["filter-noise", *sys.argv[1:]])
