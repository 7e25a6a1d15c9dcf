"""Learning-rate, weight-decay and teacher schedules as pure functions of the step.

A value is a function of the global step alone, so a resumed run needs no scheduler state, and it is computed before
the update it belongs to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ctc_ray.errors import ConfigError


def cosine(step: int, *, start: float, end: float, num_steps: int) -> float:
    """Half a cosine from `start` at step 0 to `end` at step `num_steps` and after."""
    if num_steps <= 0 or step >= num_steps:
        return end
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * step / num_steps))


def warmup_cosine(step: int, *, peak: float, end: float, warmup_steps: int, num_steps: int) -> float:
    """Linear warm-up to `peak` over `warmup_steps`, then half a cosine to `end` at `num_steps`.

    The first step already has `peak / warmup_steps`: a step at rate 0 would be wasted.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return cosine(step - warmup_steps, start=peak, end=end, num_steps=num_steps - warmup_steps)


def linear_then_constant(step: int, *, start: float, end: float, num_steps: int) -> float:
    """Linear from `start` to `end` over `num_steps`, then `end`."""
    if num_steps <= 0 or step >= num_steps:
        return end
    return start + (end - start) * step / num_steps


@dataclass(frozen=True)
class StepValues:
    """What one step uses; all are set before its update.

    Attributes:
        learning_rate: of AdamW.
        weight_decay: of matrices (biases and 1-D parameters are not decayed).
        teacher_momentum: m of `teacher = m * teacher + (1 - m) * student`.
        teacher_temperature: divides the centred teacher logits.
        train_last_layer: False while the prototypes are frozen.
    """

    learning_rate: float
    weight_decay: float
    teacher_momentum: float
    teacher_temperature: float
    train_last_layer: bool


@dataclass(frozen=True)
class Schedules:
    """All schedules of a run.

    `num_steps` is the horizon the cosines are scaled to. It equals the run's length except in the `paper` preset,
    whose reference sized its schedules for 1,951,500 steps and was stopped by hand after 30,000.

    Source: reference `create_dino_gym` and sparsam `train`; departure: the reference stepped its scheduler after the
    update, so step 0 ran at the full rate and step 1 at 0; here a step uses its own value.
    """

    num_steps: int
    warmup_steps: int
    learning_rate: float
    learning_rate_end: float
    weight_decay: float
    weight_decay_end: float
    teacher_momentum: float
    teacher_momentum_end: float
    teacher_temperature_start: float
    teacher_temperature: float
    teacher_temperature_warmup_steps: int
    freeze_last_layer_steps: int

    def __post_init__(self) -> None:
        if self.num_steps < 1 or not 0 <= self.warmup_steps <= self.num_steps:
            msg = f"warm-up of {self.warmup_steps} steps does not fit a schedule of {self.num_steps} steps"
            raise ConfigError(msg)

    def at(self, step: int) -> StepValues:
        """The values of global step `step`, counted from 0."""
        return StepValues(
            learning_rate=warmup_cosine(
                step,
                peak=self.learning_rate,
                end=self.learning_rate_end,
                warmup_steps=self.warmup_steps,
                num_steps=self.num_steps,
            ),
            weight_decay=cosine(step, start=self.weight_decay, end=self.weight_decay_end, num_steps=self.num_steps),
            teacher_momentum=cosine(
                step, start=self.teacher_momentum, end=self.teacher_momentum_end, num_steps=self.num_steps
            ),
            teacher_temperature=linear_then_constant(
                step,
                start=self.teacher_temperature_start,
                end=self.teacher_temperature,
                num_steps=self.teacher_temperature_warmup_steps,
            ),
            train_last_layer=step >= self.freeze_last_layer_steps,
        )
