"""List the CTC candidates of new patients.

Example: `ray job submit --working-dir . -- python -m jobs.detect --help`.
"""

import sys

from ctc_ray.cli import main

if __name__ == "__main__":
    main(["detect", *sys.argv[1:]])
