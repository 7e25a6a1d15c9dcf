"""AP against steps of a segmenter's training: a table, a picture, and the history as JSON.

    python -m benchmarks.segment_training MODEL_FOLDER [--picture curve.png] [--out benchmarks/results/segment_training.json]

MODEL_FOLDER is the output of `ctc-ray train-segmenter` or of `train_default_segmenter.py`, finished or under way.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import polars as pl
from matplotlib.figure import Figure

from ctc_ray.errors import MissingInputError
from ctc_ray.records import library_versions
from ctc_ray.segment.training_checkpoint import HISTORY
from ctc_ray.segment.weights import load_weights

WHAT = (
    "AP at IoU 0.5 on held-out training images, at the provisional cuts 0.5 (probability) and 0.4 (overlap), and mean loss "
    "since the row before, against optimiser steps"
)


def read_history(folder: Path) -> pl.DataFrame:
    """Rows of a training: step, loss, rate, seconds, ap50.

    Raises:
        MissingInputError: the folder holds no history.
    """
    path = folder / HISTORY
    if not path.exists():
        raise MissingInputError(f"{path} is missing: give the output folder of a training")
    return pl.read_ndjson(path)


def draw(history: pl.DataFrame, picture: Path) -> None:
    """AP and loss against steps, one above the other."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    top.plot(history["step"], history["ap50"], marker=".", color="tab:blue")
    top.set_ylabel("AP at IoU 0.5\n(held-out images)")
    top.set_ylim(0, 1)
    bottom.plot(history["step"], history["loss"], marker=".", color="tab:red")
    bottom.set_ylabel("loss\n(mean since the point before)")
    bottom.set_xlabel("steps")
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)


def main() -> None:
    """Print, draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--note", default="", help="what was trained on, for the JSON")
    arguments = parser.parse_args()
    history = read_history(arguments.folder)
    with pl.Config(tbl_rows=-1, tbl_hide_dataframe_shape=True, tbl_hide_column_data_types=True, float_precision=4):
        print(history)
    if arguments.picture:
        draw(history, arguments.picture)
    if arguments.out:
        finished = (arguments.folder / "config.json").exists()
        results = {
            "what": WHAT,
            "note": arguments.note,
            "weights": load_weights(arguments.folder).fingerprint if finished else None,
            "history": history.to_dicts(),
            "versions": library_versions(),
        }
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
