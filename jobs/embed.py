"""Turn every crop into a vector.

Example: `ray job submit --working-dir . -- python -m jobs.embed --help`.
"""

import sys

from ctc_ray.cli import main

if __name__ == "__main__":
    main(["embed", *sys.argv[1:]])
