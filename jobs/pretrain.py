"""Train the encoder with DINO.

Example: `ray job submit --working-dir . -- python -m jobs.pretrain --help`.
"""

import sys

from ctc_ray.cli import main

if __name__ == "__main__":
    main(["pretrain", *sys.argv[1:]])
