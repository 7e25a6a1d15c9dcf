"""Compare the candidates with CellSearch's events.

Example: `ray job submit --working-dir . -- python -m jobs.compare --help`.
"""

import sys

from ctc_ray.cli import main

if __name__ == "__main__":
    main(["compare", *sys.argv[1:]])
