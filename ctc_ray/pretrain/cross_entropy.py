"""DINO's cross-entropy over all pairs of different views, with its gradient, a few crops at a time.

With 65,536 prototypes the student's logits are 1.8 MB a crop, and automatic differentiation walks through all of a batch's a dozen
times. Here a block of crops is taken from logits to loss and gradient while it lies in the processor's cache.

Shape letters: V views, T teacher views, B crops, K prototypes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch.nn import functional

_BLOCK_VALUES: Final = 2**19
"""Logits taken at once on a processor."""


class _PairCrossEntropy(torch.autograd.Function):
    """Loss in the forward pass, together with its gradient, which the backward pass only scales."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        probabilities_TBK: torch.Tensor,
        temperature: float,
        *logits: torch.Tensor,
    ) -> torch.Tensor:
        num_teacher, num_crops, prototypes = probabilities_TBK.shape
        num_views = sum(len(part) for part in logits)
        pairs = num_teacher * (num_views - 1)
        gradients = [torch.empty_like(part) for part in logits]
        loss = probabilities_TBK.new_zeros((), dtype=torch.float64)
        on_processor = probabilities_TBK.device.type == "cpu"
        block = max(1, _BLOCK_VALUES // (num_views * prototypes)) if on_processor else num_crops
        # A view's own teacher is left out of its pairs.
        teachers = torch.full((num_views, 1, 1), float(num_teacher), device=probabilities_TBK.device)
        teachers[:num_teacher] -= 1.0
        for start in range(0, num_crops, block):
            crops = slice(start, start + block)
            teacher = probabilities_TBK[:, crops]
            log_student = torch.cat([part[:, crops].float() for part in logits]).div_(temperature)
            log_student = functional.log_softmax(log_student, dim=-1)
            # sum over s != t of -q_t . log p_s, without forming the T x V pairs
            others = log_student.sum(dim=0, keepdim=True) - log_student[:num_teacher]
            loss -= (teacher * others).sum()
            # d/dz_s of it: sum over t != s of (p_s - q_t)
            slope = log_student.exp_().mul_(teachers).sub_(teacher.sum(dim=0, keepdim=True))
            slope[:num_teacher] += teacher
            slope.mul_(1.0 / (temperature * pairs * num_crops))
            for gradient, own in zip(gradients, slope.split([len(part) for part in logits]), strict=True):
                gradient[:, crops] = own
        ctx.save_for_backward(*gradients)
        return (loss / (pairs * num_crops)).float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients: tuple[torch.Tensor, ...] = ctx.saved_tensors  # type: ignore[attr-defined]  # set by save_for_backward
        return (None, None, *(gradient * outer[0] for gradient in gradients))


def pair_cross_entropy(
    logits: Sequence[torch.Tensor], probabilities_TBK: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Mean cross-entropy between teacher and student over the pairs of different views.

    Args:
        logits: student logits (v, B, K), one tensor for each view size; in their order, the first T views are those that
            the teacher saw.
        probabilities_TBK: (T, B, K) float32 teacher probabilities, summing to 1 over K; no gradient flows to them.
        temperature: divides the student's logits.

    Returns:
        Scalar float32: mean over the batch and the T * (V - 1) pairs.
    """
    loss: torch.Tensor = _PairCrossEntropy.apply(probabilities_TBK, temperature, *logits)
    return loss
