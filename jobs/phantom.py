"""Write synthetic cartridges.

Example: `ray job submit --working-dir . -- python -m jobs.phantom --help`.
"""

import sys

from ctc_ray.cli import main

if __name__ == "__main__":
    main(["phantom", *sys.argv[1:]])
