"""Discs on a dark field with their label images, and a training short enough for a test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from skimage.io import imsave

from ctc_ray.segment.network import NetworkConfig
from ctc_ray.segment.training import Schedule
from ctc_ray.segment.training_images import Pair

TINY = NetworkConfig(unet_n_depth=1, unet_n_filter_base=6, net_conv_after_unet=12, n_rays=8)


def disc_pair(seed: int, side: int = 96) -> Pair:
    """Six discs of 5 to 9 px radius."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:side, :side]
    labels = np.zeros((side, side), np.int32)
    for number in range(1, 7):
        row, column, radius = rng.uniform(8, side - 8), rng.uniform(8, side - 8), rng.uniform(5, 9)
        labels[((rows - row) ** 2 + (columns - column) ** 2 < radius**2) & (labels == 0)] = number
    image = (rng.poisson(8, labels.shape) + 90 * (labels > 0)).astype(np.uint8)
    low, high = np.percentile(image, [1, 99.8])
    return Pair(f"disc-{seed}", image, labels, float(low), float(high))


def short(steps: int, **options: object) -> Schedule:
    """A schedule of few steps of two small patches."""
    return Schedule(
        steps=steps, batch_size=2, patch_px=64, learning_rate=3e-3, warmup_steps=5, checkpoint_steps=10,
        evaluate_steps=10, average_decay=0.9, **options,  # type: ignore[arg-type]
    )  # fmt: skip


def write_pairs(root: Path, count: int) -> tuple[Path, Path]:
    """Write disc images and masks; gives their two folders."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for seed in range(count):
        pair = disc_pair(seed)
        imsave(root / "images" / f"{pair.name}.png", pair.image, check_contrast=False)
        imsave(root / "masks" / f"{pair.name}.png", pair.labels.astype(np.uint16), check_contrast=False)
    return root / "images", root / "masks"
