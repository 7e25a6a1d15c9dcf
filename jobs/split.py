"""Give every patient a role.

Example: `ray job submit --working-dir . -- python -m jobs.split --help`.
"""

import sys

from ctc_ray.cli import main

if __name__ == "__main__":
    main(["split", *sys.argv[1:]])
