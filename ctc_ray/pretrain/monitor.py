"""What to watch while DINO trains: loss and the signs of collapse.

Shape letters: T teacher views, B crops, K prototypes, D embedding width.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Final, Literal

import torch

from ctc_ray.pretrain.schedules import StepValues

Collapse = Literal["features", "one-hot", "uniform"]

FEATURE_RANK_FLOOR: Final = 1.5
"""Features whose effective rank lies below have collapsed: they vary along one direction, if at all."""
PROTOTYPES_FLOOR: Final = 1.5
"""A teacher whose mean probabilities spread over fewer prototypes (exponential of the marginal entropy) is one-hot: it gives
all crops the same one."""
UNIFORM_SHARE: Final = 0.995
"""A teacher whose mean entropy exceeds this share of ln K is uniform: it tells no crop from another."""
PATIENCE_STEPS: Final = 25
"""Steps in a row that must show one kind of collapse before it is called one: single batches may."""


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


class CollapseMonitor:
    """Watches a run's steps for the three ways in which DINO collapses.

    Args:
        prototypes: K of the run.
        grace_steps: steps at the start in which a uniform teacher is none: as long as all crops look alike to a random
            network, centring leaves nothing of its logits.
    """

    def __init__(self, prototypes: int, *, grace_steps: int = 0) -> None:
        self._uniform_nats = UNIFORM_SHARE * math.log(prototypes)
        self._grace_steps = grace_steps
        self._streak: Counter[Collapse] = Counter()
        self._warned: set[Collapse] = set()

    def see(self, row: StepMetrics) -> tuple[Collapse | None, str | None]:
        """Judge a step.

        Returns:
            The kind of collapse that this and the `PATIENCE_STEPS - 1` steps before it show, or None; and a warning the
            first time that a kind is seen, else None.
        """
        signs: dict[Collapse, bool] = {
            "features": row.feature_rank < FEATURE_RANK_FLOOR,
            "one-hot": math.exp(row.marginal_entropy) < PROTOTYPES_FLOOR,
            "uniform": row.step > self._grace_steps and row.teacher_entropy > self._uniform_nats,
        }
        for kind, shown in signs.items():
            self._streak[kind] = self._streak[kind] + 1 if shown else 0
        found = next((kind for kind in signs if self._streak[kind] >= PATIENCE_STEPS), None)
        if found is None or found in self._warned:
            return found, None
        self._warned.add(found)
        return (
            found,
            f"at step {row.step} {_WHAT[found].format(row=row)}; lower the learning rate, or raise the batch size",
        )


_WHAT: Final[dict[Collapse, str]] = {
    "features": "the features have collapsed to one direction (effective rank {row.feature_rank:.2f})",
    "one-hot": "the teacher gives all crops the same prototype (marginal entropy {row.marginal_entropy:.3f} nats)",
    "uniform": "the teacher gives all crops all prototypes alike (entropy {row.teacher_entropy:.3f} nats)",
}


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
