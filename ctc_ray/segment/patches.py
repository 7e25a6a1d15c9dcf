"""Training patches: which images are held out, seeded sampling and augmentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from ctc_ray.segment.instances import FloatArray
from ctc_ray.segment.training_images import Pair

PairT = TypeVar("PairT")


def split_pairs(pairs: Sequence[PairT], *, fraction: float, seed: int) -> tuple[list[PairT], list[PairT]]:
    """Hold out a seeded part of the pairs for thresholds and progress; at least one pair stays on either side."""
    order = np.random.default_rng([seed, 1]).permutation(len(pairs))
    num_held = min(max(1, round(fraction * len(pairs))), len(pairs) - 1) if len(pairs) > 1 else 0
    held = set(order[:num_held].tolist())
    kept = [pair for index, pair in enumerate(pairs) if index not in held]
    return kept, [pairs[index] for index in sorted(held)] or list(pairs)


class PatchSampler:
    """Draws augmented patches; patch `index` is a function of the seed and the index alone."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        *,
        patch_px: int,
        seed: int,
        foreground_fraction: float,
        scale_range: tuple[float, float],
    ) -> None:
        """Prepare sampling.

        Args:
            pairs: training images; large ones are drawn more often, by the root of their area.
            patch_px: side of a patch.
            seed: of everything that is drawn.
            foreground_fraction: patches centred on an object, 0 to 1.
            scale_range: smallest and largest magnification.
        """
        self._pairs = list(pairs)
        self._patch_px = patch_px
        self._seed = seed
        self._foreground_fraction = foreground_fraction
        self._scale_range = scale_range
        roots = np.sqrt([pair.image.size for pair in self._pairs])
        self._weights = roots / roots.sum()

    def draw(self, index: int) -> tuple[FloatArray, npt.NDArray[np.int32]]:
        """Patch `index`: normalised image (patch_px, patch_px) float32 and labels int32, both augmented alike."""
        rng = np.random.default_rng([self._seed, 2, index])
        pair = self._pairs[int(rng.choice(len(self._pairs), p=self._weights))]
        image, labels = self._window(pair, rng)
        turns, flip = int(rng.integers(4)), bool(rng.integers(2))
        image, labels = np.rot90(image, turns), np.rot90(labels, turns)
        if flip:
            image, labels = image[:, ::-1], labels[:, ::-1]
        return _vary_intensity(np.ascontiguousarray(image), rng), np.ascontiguousarray(labels)

    def _window(self, pair: Pair, rng: np.random.Generator) -> tuple[FloatArray, npt.NDArray[np.int32]]:
        scale = float(np.exp(rng.uniform(*np.log(self._scale_range)))) if rng.random() < 0.5 else 1.0
        side = max(8, round(self._patch_px / scale))
        height, width = pair.image.shape
        row, column = rng.integers(height), rng.integers(width)
        if rng.random() < self._foreground_fraction:
            # A few draws find an object without a list of all foreground pixels of every image.
            rows, columns = rng.integers(height, size=64), rng.integers(width, size=64)
            hits = np.flatnonzero(pair.labels[rows, columns])
            if len(hits):
                row, column = rows[hits[0]], columns[hits[0]]
        top = int(np.clip(row - rng.integers(side), 0, max(0, height - side)))
        left = int(np.clip(column - rng.integers(side), 0, max(0, width - side)))
        image = pair.image[top : top + side, left : left + side].astype(np.float32)
        image = (image - pair.low) / (pair.high - pair.low + 1e-20)
        labels = pair.labels[top : top + side, left : left + side]
        image, labels = _reflect_to(image, side), _reflect_to(labels, side)
        return (image, labels) if side == self._patch_px else _resize(image, labels, self._patch_px)


def _reflect_to(array: np.ndarray, side: int) -> np.ndarray:
    rows, columns = side - array.shape[0], side - array.shape[1]
    return np.pad(array, ((0, rows), (0, columns)), mode="symmetric") if rows or columns else array


def _resize(image: FloatArray, labels: npt.NDArray[np.int32], side: int) -> tuple[FloatArray, npt.NDArray[np.int32]]:
    pixels = torch.from_numpy(np.ascontiguousarray(image))[None, None]
    scaled = torch.nn.functional.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)
    # The same half-pixel centres as above, so that mask and image do not drift apart.
    nearest = np.floor((np.arange(side) + 0.5) * (labels.shape[0] / side)).astype(np.int64)
    return scaled[0, 0].numpy(), labels[np.ix_(nearest, nearest)]


def _vary_intensity(image: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Gain, offset, gamma and noise.

    Source: stardist `examples/2D/2_training.ipynb` (gain 0.6-2, offset +-0.2, noise 0.02); the gamma is ours, since
    stains differ in contrast as well as in strength.
    """
    if rng.random() < 0.5:
        gamma = float(np.exp(rng.uniform(-0.5, 0.5)))
        image = (np.sign(image) * np.abs(image) ** np.float32(gamma)).astype(np.float32)
    image = image * np.float32(rng.uniform(0.6, 2.0)) + np.float32(rng.uniform(-0.2, 0.2))
    noise = rng.standard_normal(image.shape, dtype=np.float32) * np.float32(rng.uniform(0.0, 0.06))
    return np.asarray(image + noise, dtype=np.float32)
