"""What to watch while DINO trains: loss and the signs of collapse.

Shape letters: T teacher views, B crops, K prototypes, D embedding width.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch

from ctc_ray.pretrain.schedules import StepValues


@dataclass(frozen=True)
class StepMetrics:
    """Measures of one step.

    Attributes:
        step: steps done, this one included.
        loss: mean cross-entropy over the workers, nats.
        learning_rate: used in this step.
        weight_decay: used in this step.
        teacher_momentum: used in this step.
        teacher_temperature: used in this step.
        gradient_norm: before clipping.
        teacher_entropy: mean entropy of the teacher's probabilities, nats; 0 where all crops choose one prototype each
            and ln K where they choose none.
        marginal_entropy: entropy of the probabilities' mean over the batch, nats; near 0 when all crops choose the
            same prototype, the other kind of collapse.
        centre_norm: Euclidean norm of the centre.
        feature_rank: effective rank of the teacher's features in the batch (exponential of the entropy of the
            normalised singular values), 1..min(B, D).
        crops_per_second: over all workers.
    """

    step: int
    loss: float
    learning_rate: float
    weight_decay: float
    teacher_momentum: float
    teacher_temperature: float
    gradient_norm: float
    teacher_entropy: float
    marginal_entropy: float
    centre_norm: float
    feature_rank: float
    crops_per_second: float

    def to_json(self) -> dict[str, float | int]:
        """The measures as plain JSON values."""
        return asdict(self)


def effective_rank(features_BD: torch.Tensor) -> float:
    """Exponential of the entropy of the normalised singular values of centred features.

    Args:
        features_BD: (B, D) any floating dtype.

    Returns:
        1..min(B, D); 0 where all features are equal.

    Source: Roy and Vetterli 2007, definition of the effective rank.
    """
    centred = features_BD.float() - features_BD.float().mean(dim=0, keepdim=True)
    singular = torch.linalg.svdvals(centred)
    total = float(singular.sum())
    if not math.isfinite(total) or total <= 1e-12:
        return 0.0
    share = singular / total
    return float(torch.exp(torch.special.entr(share).sum()))


@torch.no_grad()
def measure(
    *,
    step: int,
    loss: float,
    values: StepValues,
    gradient_norm: float,
    probabilities_TBK: torch.Tensor,
    centre_K: torch.Tensor,
    features_BD: torch.Tensor,
    num_crops: int,
    seconds: float,
) -> StepMetrics:
    """Compute a step's measures from what the step already has."""
    marginal = probabilities_TBK.mean(dim=(0, 1))
    return StepMetrics(
        step=step,
        loss=loss,
        learning_rate=values.learning_rate,
        weight_decay=values.weight_decay,
        teacher_momentum=values.teacher_momentum,
        teacher_temperature=values.teacher_temperature,
        gradient_norm=gradient_norm,
        teacher_entropy=float(torch.special.entr(probabilities_TBK).sum(dim=-1).mean()),
        marginal_entropy=float(torch.special.entr(marginal).sum()),
        centre_norm=float(centre_K.norm()),
        feature_rank=effective_rank(features_BD),
        crops_per_second=num_crops / max(seconds, 1e-9),
    )
