"""DINO: projection head, self-distillation loss, student and teacher.

Shape letters: V views, B crops in the batch, C channels, H rows, W columns, D embedding width, K prototypes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812  (the name torch's own documentation uses)
from torch import nn

from ctc_ray.pretrain.cross_entropy import pair_cross_entropy
from ctc_ray.pretrain.unit_length import unit_length

_KOLEO_EPS: Final = 1e-8
"""Source: DINOv2 `koleo_loss`: identical vectors have a finite loss."""
Reduce = Callable[[torch.Tensor], torch.Tensor]
"""Averages a tensor over the workers; the identity in one process."""


class DinoHead(nn.Module):
    """Three-layer projection to a unit-length bottleneck, then cosine similarity to K prototypes.

    Source: reference `create_dino_gym` (128 -> 2048 -> 2048 -> 256, GELU, no batch norm, truncated normal 0.02,
    weight-normed last layer with its gain fixed at 1).
    """

    def __init__(self, width: int, *, hidden: int = 2048, bottleneck: int = 256, prototypes: int = 65_536) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck))
        nn.init.trunc_normal_(self.prototypes, std=0.02)

    def forward(self, features_BD: torch.Tensor) -> torch.Tensor:
        """Features (B, D) to logits (B, K): cosines, since both sides have unit length."""
        bottleneck = unit_length(self.mlp(features_BD), eps=1e-6)
        return F.linear(bottleneck, unit_length(self.prototypes, eps=1e-6))


class DinoNetwork(nn.Module):
    """Backbone and head; a forward pass takes all views of one size as one batch."""

    def __init__(self, backbone: nn.Module, head: DinoHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, views: list[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Project views.

        Args:
            views: tensors (V, B, C, H, W), one per view size.

        Returns:
            Logits, one (V, B, K) per view size in that order, and the features (V * B, D) of the first size.
        """
        features, shapes = [], []
        for view in views:
            num_views, batch = view.shape[:2]
            features.append(self.backbone(view.flatten(0, 1)))
            shapes.append((num_views, batch))
        logits = self.head(torch.cat(features))
        parts = logits.split([v * b for v, b in shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)], features[0]


def teacher_of(student: DinoNetwork) -> DinoNetwork:
    """A teacher with the student's weights that takes no gradient.

    Source: reference `create_dino_gym`; departure: there the teacher's head is initialised apart from the student's,
    so that the first steps chase a random target.
    """
    teacher = copy.deepcopy(student)
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    return teacher


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move the teacher's parameters towards the student's by an exponential moving average.

    Buffers (batch-norm statistics) are left alone: they come from the teacher's own passes in train mode, as in the
    reference.
    """
    teacher_parameters: list[torch.Tensor] = list(teacher.parameters())
    torch._foreach_mul_(teacher_parameters, momentum)
    torch._foreach_add_(teacher_parameters, [p.detach() for p in student.parameters()], alpha=1.0 - momentum)


def _identity(value: torch.Tensor) -> torch.Tensor:
    return value


def koleo(features_BD: torch.Tensor) -> torch.Tensor:
    """Mean negative logarithm of each vector's distance to its nearest neighbour in the batch, on the unit sphere.

    A small weight of it keeps features of short runs from crowding into a few directions.

    Args:
        features_BD: (B, D) student features of one view, B at least 2.

    Returns:
        Scalar.

    Source: Sablayrolles et al. 2019 (Kozachenko-Leonenko entropy); used beside DINO by Oquab et al. 2023 (DINOv2). Not in
    the reference.
    """
    unit = unit_length(features_BD.float())
    with torch.no_grad():
        cosine = unit @ unit.T
        nearest = cosine.fill_diagonal_(-2.0).argmax(dim=1)
    return -torch.log((unit - unit[nearest]).norm(dim=-1) + _KOLEO_EPS).mean()


class DinoLoss(nn.Module):
    """Cross-entropy between the centred, sharpened teacher and the student over all pairs of different views.

    Source: Caron et al. 2021, algorithm 1; reference: student temperature 0.1, centre momentum 0.9, first centre equal
    to the first batch's mean.
    """

    centre: torch.Tensor
    steps_seen: torch.Tensor

    def __init__(self, prototypes: int, *, student_temperature: float = 0.1, centre_momentum: float = 0.9) -> None:
        super().__init__()
        self.student_temperature = student_temperature
        self.centre_momentum = centre_momentum
        self.register_buffer("centre", torch.zeros(prototypes))
        self.register_buffer("steps_seen", torch.zeros((), dtype=torch.int64))

    def teacher_probabilities(self, teacher_VBK: torch.Tensor, temperature: float) -> torch.Tensor:
        """Centre and sharpen teacher logits (V, B, K) float32 to probabilities over K."""
        return F.softmax((teacher_VBK - self.centre) / temperature, dim=-1)

    def forward(
        self, student_VBK: torch.Tensor | Sequence[torch.Tensor], probabilities_TBK: torch.Tensor
    ) -> torch.Tensor:
        """Mean cross-entropy.

        Args:
            student_VBK: student logits, together or one tensor for each view size; the first T views are the ones that
                the teacher saw.
            probabilities_TBK: teacher probabilities of T views; no gradient flows to them.

        Returns:
            Scalar: mean over the batch and the T * (V - 1) pairs of different views.
        """
        parts = [student_VBK] if isinstance(student_VBK, torch.Tensor) else student_VBK
        return pair_cross_entropy(parts, probabilities_TBK, self.student_temperature)

    @torch.no_grad()
    def update_centre(self, teacher_VBK: torch.Tensor, reduce: Reduce = _identity) -> None:
        """Move the centre towards the mean teacher logits of this step, averaged over the workers."""
        batch_mean = reduce(teacher_VBK.float().mean(dim=(0, 1)))
        if self.steps_seen == 0:
            self.centre.copy_(batch_mean)
        else:
            self.centre.mul_(self.centre_momentum).add_(batch_mean, alpha=1.0 - self.centre_momentum)
        self.steps_seen.add_(1)
