"""Find cells with StarDist and cut them out.

Example: `ray job submit --working-dir . -- python -m jobs.segment --help`.
"""

import sys

from ctc_ray.cli import main

if __name__ == "__main__":
    main(["segment", *sys.argv[1:]])
