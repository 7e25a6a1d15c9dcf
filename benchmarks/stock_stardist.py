"""Answers `benchmarks/segment.py` in the interpreter of the stock StarDist package (TensorFlow).

Reads one JSON object a line from its input: `{"image": path.npy, "labels": path.npy or null}`; segments the image as a user of
the stock package does and writes one JSON object a line: seconds of the network, of the rest, and end to end, the number
of objects, and the process's peak memory. The first argument is the weight folder, the second the number of threads.
It imports nothing of ctc_ray.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

THREADS = sys.argv[2]
for name in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = THREADS
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np  # noqa: E402  # the number of threads must be set before
import stardist  # noqa: E402
import tensorflow as tf  # noqa: E402
from csbdeep.utils import normalize  # noqa: E402
from stardist.models import StarDist2D  # noqa: E402


def peak_bytes() -> int:
    """Largest resident size of this process so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    folder = Path(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the packages print goes to the error stream
    model = StarDist2D(None, name=folder.name, basedir=str(folder.parent))
    print(json.dumps({"tensorflow": tf.__version__, "stardist": stardist.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        image = np.load(job["image"])
        started = time.perf_counter()
        normalised = normalize(image, 1, 99.8)
        predicted = time.perf_counter()
        prob, dist, points = model.predict_sparse(normalised)
        networked = time.perf_counter()
        model._instances_from_prediction(image.shape, prob, dist, points=points)
        ended = time.perf_counter()
        whole = time.perf_counter()
        labels, _ = model.predict_instances(normalize(image, 1, 99.8))
        seconds = time.perf_counter() - whole
        if job["labels"]:
            np.save(job["labels"], labels)
        answer = {
            "normalise_s": predicted - started,
            "network_s": networked - predicted,
            "post_s": ended - networked,
            "end_to_end_s": seconds,
            "objects": int(labels.max()),
            "peak_bytes": peak_bytes(),
        }
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
