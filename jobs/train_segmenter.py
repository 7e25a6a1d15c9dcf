"""Train a StarDist network.

Example: `ray job submit --working-dir . -- python -m jobs.train_segmenter --help`.
"""

import sys

from ctc_ray.cli import main

if __name__ == "__main__":
    main(["train-segmenter", *sys.argv[1:]])
