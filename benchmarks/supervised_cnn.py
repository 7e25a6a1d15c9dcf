"""A small convolutional network trained on a few labelled crops alone: what a lab would do without pretraining."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812  (the name torch's own documentation uses)
from torch import nn

STEPS = 300
BATCH = 32
WIDTHS = (16, 32, 64, 64)


def build(channels: int, num_classes: int) -> nn.Sequential:
    """Four blocks of convolution, batch norm and pooling, the mean over the rest and a linear layer."""
    layers: list[nn.Module] = []
    for width in WIDTHS:
        layers += [
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        ]
        channels = width
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(channels, num_classes)
    )


def _turned(images_BCHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The batch in one of the eight positions of the square, with channel gains within a tenth, drawn anew each step."""
    quarter_turns, flip = (
        torch.randint(0, 8, (1,), generator=generator).item() % 4,
        torch.rand(1, generator=generator) < 0.5,
    )
    images_BCHW = torch.rot90(images_BCHW, int(quarter_turns), dims=(2, 3))
    if flip:
        images_BCHW = images_BCHW.flip(3)
    gain = 1.0 + 0.1 * (2 * torch.rand((*images_BCHW.shape[:2], 1, 1), generator=generator) - 1)
    return (images_BCHW + 1.0) * gain - 1.0


def train_and_predict(
    train_NCHW: torch.Tensor, labels: npt.NDArray[np.str_], judged_NCHW: torch.Tensor, *, seed: int
) -> npt.NDArray[np.str_]:
    """Train on the labelled crops and name the class of the others.

    Args:
        train_NCHW: (N, C, H, W) float32 in -1..1.
        labels: (N,) class names.
        judged_NCHW: (M, C, H, W) float32 in -1..1.
        seed: of weights, order and positions.

    Returns:
        (M,) class names.
    """
    names, target = np.unique(labels, return_inverse=True)
    classes = torch.from_numpy(target)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build(train_NCHW.shape[1], len(names)).train()
        weights = len(classes) / (len(names) * torch.bincount(classes).float())
        optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=STEPS)
        for _ in range(STEPS):
            rows = torch.randint(0, len(classes), (BATCH,), generator=generator)
            loss = F.cross_entropy(network(_turned(train_NCHW[rows], generator)), classes[rows], weight=weights)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    network.eval()
    with torch.inference_mode():
        predicted = torch.cat([network(part).argmax(dim=1) for part in judged_NCHW.split(256)])
    return names[predicted.numpy()]
