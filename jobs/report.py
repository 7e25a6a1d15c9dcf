"""Write the HTML report.

Example: `ray job submit --working-dir . -- python -m jobs.report --help`.
"""

import sys

from ctc_ray.cli import main

if __name__ == "__main__":
    main(["report", *sys.argv[1:]])
