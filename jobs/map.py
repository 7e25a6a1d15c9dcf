"""Fit the latent map and place every cell on it.

Example: `ray job submit --working-dir . -- python -m jobs.map --help`.
"""

import sys

from ctc_ray.cli import main

if __name__ == "__main__":
    main(["map", *sys.argv[1:]])
