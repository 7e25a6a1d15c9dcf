"""Write the page of a simulation.

Example: `ray job submit --working-dir . -- python -m jobs.simulation_report --help`.
"""

import sys

from ctc_ray.cli import main

if __name__ == "__main__":
    main(["simulation-report", *sys.argv[1:]])
