"""What the StarDist network learns from a label image, and the loss that compares the two.

Source: stardist `models/model2d.py` (`StarDistData2D`) and `models/base.py` (`masked_loss_mae`); distances and the
distance transform come from the stardist package.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from stardist.geometry import star_dist
from stardist.utils import edt_prob

FloatArray = npt.NDArray[np.float32]
EPSILON = 1e-7
"""Keras' `epsilon`, added to the mask's mean."""


@dataclass(frozen=True)
class Loss:
    """The terms of the loss, scalars; `total` is what is minimised."""

    total: torch.Tensor
    prob: torch.Tensor
    dist: torch.Tensor


def star_targets(
    labels: npt.NDArray[np.integer], *, n_rays: int, grid: tuple[int, int]
) -> tuple[FloatArray, FloatArray]:
    """Targets of one patch.

    Args:
        labels: (H, W) integers, 0 background.
        n_rays: rays of a polygon.
        grid: pixels (row, column) between two positions.

    Returns:
        prob (H', W') float32: distance to the object's border, divided by its largest in the object; and dist
        (H', W', n_rays) float32: pixels to the border along each ray, 0 in the background.
    """
    dist = np.asarray(star_dist(labels, n_rays, mode="cpp", grid=grid), dtype=np.float32)
    prob = np.asarray(edt_prob(labels[:: grid[0], :: grid[1]]), dtype=np.float32)
    return prob, dist


def star_loss(
    logits: torch.Tensor,
    dist: torch.Tensor,
    target_prob: torch.Tensor,
    target_dist: torch.Tensor,
    *,
    dist_weight: float = 0.2,
    background_weight: float = 1e-4,
    foreground_mean: torch.Tensor | None = None,
) -> Loss:
    """The published loss: cross-entropy of the probability, and the distances' absolute error where objects are.

    Args:
        logits: (N, 1, H', W') probability logits.
        dist: (N, n_rays, H', W') distances.
        target_prob: (N, 1, H', W'), 0 to 1; it also weights the distances' error.
        target_dist: (N, n_rays, H', W').
        dist_weight: weight of the distances beside the probability (weight 1).
        background_weight: weight of the distances predicted in the background.
        foreground_mean: scalar, mean of `target_prob` over the whole batch, where this is a share of one; the mean of the
            shares' losses then is the batch's loss.

    Source: stardist `Config2D` (`train_loss_weights` (1, 0.2), `train_background_reg` 1e-4, `train_dist_loss` mae).
    """
    prob_loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, target_prob)
    if foreground_mean is None:
        foreground_mean = target_prob.mean()
    error = (target_prob * (dist - target_dist).abs()).mean() / (foreground_mean + EPSILON)
    background = ((1 - target_prob) * dist.abs()).mean()
    dist_loss = error + background_weight * background
    return Loss(prob_loss + dist_weight * dist_loss, prob_loss.detach(), dist_loss.detach())
