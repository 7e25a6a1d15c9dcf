"""Runs the stock StarDist package (TensorFlow) on a list of jobs; started by the parity tests in its own interpreter.

Usage: `python stock.py jobs.json`, with `{"build": [...], "predict": [...], "about": path}`:

- build: `{"config": {...}, "folder": path, "image": path.npy, "seed": n}` makes a model with random weights that finds
  objects in the image, and writes its weight folder;
- predict: `{"folder": path, "image": path.npy, "n_tiles": [rows, columns] or null, "maps": bool, "out": path.npz}`;
- about: where versions and the registry of published models are written.

It imports nothing of ctc_ray, and ctc_ray nothing of it: TensorFlow and torch never share a process.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from csbdeep.models.pretrained import get_model_details, get_registered_models
from csbdeep.utils import normalize
from csbdeep.utils.tf import keras_import, v_keras
from stardist.models import Config2D, StarDist2D

PROB_THRESH, NMS_THRESH = 0.5, 0.3


def read_image(path: str) -> np.ndarray:
    """The image as users normalise it: 1 and 99.8 percentiles, channels one by one."""
    return normalize(np.load(path), 1, 99.8, axis=(0, 1))


def build(config: dict[str, Any], folder: str, image: str, seed: int) -> None:
    """Save a model of random weights whose outputs on the image look like those of a trained one."""
    rng = np.random.default_rng(seed)
    keras_import().utils.set_random_seed(seed)
    target = Path(folder)
    model = StarDist2D(Config2D(**config), name=target.name, basedir=str(target.parent))
    for layer in model.keras_model.layers:
        if layer.get_weights():
            kernel, bias = layer.get_weights()
            # Glorot's kernels lose half the signal at each ReLU; biases of zero would hide a bias that is not read.
            layer.set_weights([kernel * np.sqrt(2), rng.normal(0, 0.1, bias.shape)])
    pixels = read_image(image)
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    height, width = (side - side % step for side, step in zip(pixels.shape, model._axes_div_by("YX"), strict=False))
    prob, dist = model.keras_model.predict(pixels[None, :height, :width], verbose=0)
    rescale(model, "prob", np.log(np.maximum(prob, 1e-30) / np.maximum(1 - prob, 1e-30)), mean=-1.0, std=1.5)
    rescale(model, "dist", dist, mean=6.0, std=1.5)
    model.keras_model.save_weights(str(target / "weights_best.h5"))
    cuts = {"prob": PROB_THRESH, "nms": NMS_THRESH}
    (target / "thresholds.json").write_text(json.dumps(cuts))


def rescale(model: Any, head: str, found: np.ndarray, *, mean: float, std: float) -> None:
    """Scale a head so that its values before any activation, found (1, H, W, C), get a mean and deviation."""
    layer = model.keras_model.get_layer(head)
    kernel, bias = layer.get_weights()
    values = found.reshape(-1, found.shape[-1])
    gain = std / (values.std(axis=0) + 1e-6)
    layer.set_weights([kernel * gain, (bias - values.mean(axis=0)) * gain + mean])


def predict(folder: str, image: str, n_tiles: list[int] | None, maps: bool, out: str) -> None:
    """Write what the stock package finds in an image."""
    target = Path(folder)
    model = StarDist2D(None, name=target.name, basedir=str(target.parent))
    pixels = read_image(image)
    tiles = None if n_tiles is None else tuple(n_tiles) + (1,) * (pixels.ndim - 2)
    labels, found = model.predict_instances(pixels, n_tiles=tiles, show_tile_progress=False, sparse=True)
    arrays = {"labels": labels, "points": found["points"], "prob": found["prob"], "coord": found["coord"]}
    if maps:
        arrays["prob_map"], arrays["dist_map"] = model.predict(pixels)
    arrays["thresholds"] = np.array([model.thresholds.prob, model.thresholds.nms])
    np.savez(out, **arrays)


def about(path: str) -> None:
    """Write versions and the registry."""
    names = get_registered_models(StarDist2D, return_aliases=False)
    registry = {name: get_model_details(StarDist2D, name)[2] for name in names}
    found = {"tensorflow": tf.__version__, "keras": str(v_keras), "registry": registry}
    Path(path).write_text(json.dumps(found))


if __name__ == "__main__":
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    jobs = json.loads(Path(sys.argv[1]).read_text())
    for job in jobs["build"]:
        build(**job)
    for job in jobs["predict"]:
        predict(**job)
    about(jobs["about"])
