"""Train the classifier.

Example: `ray job submit --working-dir . -- python -m jobs.train --help`.
"""

import sys

from ctc_ray.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
