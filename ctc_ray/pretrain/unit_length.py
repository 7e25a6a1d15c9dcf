"""Scaling vectors to unit length at a fraction of autograd's cost, and XCiT's attention with it.

`torch.nn.functional.normalize` differentiates its norm, clamp and quotient one by one, and reduces a strided axis an
element at a time. For 65,536 prototypes, and for the channels of XCiT's cross-covariance attention, that was a
quarter of a training step. The values here are the same; gradients differ by rounding.
"""

from __future__ import annotations

from typing import Final

import torch
from timm.models.xcit import XCA
from torch import nn

_BLOCK_ROWS: Final = 2048
"""Rows whose gradient is computed at once on a processor: what comes between stays in its cache. Fresh memory for all of 65,536
prototypes costs more than the arithmetic."""


class _UnitLength(torch.autograd.Function):
    """`F.normalize` along the last axis with its gradient (g - y <y, g>) / |x| written out."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, values: torch.Tensor, eps: float) -> torch.Tensor:
        norm = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
        divisor = norm.clamp_min(eps)
        scaled: torch.Tensor = values / divisor
        ctx.save_for_backward(scaled, divisor, norm > eps)
        ctx.dtype = values.dtype  # type: ignore[attr-defined]  # torch's way to keep what is no tensor
        return scaled

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        scaled, divisor, is_long = ctx.saved_tensors  # type: ignore[attr-defined]  # set by save_for_backward
        (gradient,) = gradients
        if gradient.device.type != "cpu" or gradient.ndim != 2:
            result = _tangent(gradient, scaled, divisor, is_long)
        else:
            result = torch.empty_like(gradient)
            for rows in range(0, len(gradient), _BLOCK_ROWS):
                block = slice(rows, rows + _BLOCK_ROWS)
                result[block] = _tangent(gradient[block], scaled[block], divisor[block], is_long[block])
        return result.to(ctx.dtype), None  # type: ignore[attr-defined]  # see forward


def _tangent(
    gradient: torch.Tensor, scaled: torch.Tensor, divisor: torch.Tensor, is_long: torch.Tensor
) -> torch.Tensor:
    along = (gradient * scaled).sum(dim=-1, keepdim=True)
    # Below eps the divisor is a constant, and nothing is projected out.
    along = torch.where(is_long, along, torch.zeros_like(along))
    return torch.addcmul(gradient, scaled, along, value=-1).div_(divisor)


def unit_length(values: torch.Tensor, eps: float = 1e-12) -> torch.Tensor:
    """Divide vectors by their Euclidean length.

    Args:
        values: (..., D) floating point; fastest where the last axis is contiguous.
        eps: shorter vectors are divided by this instead.

    Returns:
        (..., D), equal to `torch.nn.functional.normalize(values, dim=-1, eps=eps)`.
    """
    scaled: torch.Tensor = _UnitLength.apply(values, eps)
    return scaled


class ContiguousXCA(XCA):
    """timm's cross-covariance attention with queries and keys laid out so that their tokens are neighbours.

    Source: timm `XCA.forward`; departure: one copy of queries and keys before they are normalised along the tokens.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend (B, N, C) tokens across channels, to (B, N, C)."""
        batch, tokens, width = x.shape
        parts = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, width // self.num_heads)
        query, key, value = parts.permute(2, 0, 3, 4, 1).unbind(0)
        query, key = unit_length(query.contiguous()), unit_length(key.contiguous())
        attention = ((query @ key.transpose(-2, -1)) * self.temperature).softmax(dim=-1)
        attended = self.attn_drop(attention) @ value
        mixed: torch.Tensor = self.proj_drop(self.proj(attended.permute(0, 3, 1, 2).reshape(batch, tokens, width)))
        return mixed


def with_contiguous_attention(backbone: nn.Module) -> nn.Module:
    """Let every cross-covariance attention of a backbone compute as `ContiguousXCA`, in place.

    Names and values of the weights stay as they are. Other backbones, and XCiT where timm was told to use its own fused
    attention, are left alone.
    """
    for module in backbone.modules():
        if type(module) is XCA and not module.fused_attn:
            # The subclass adds no state: the weights, and references to the module, stay valid.
            module.__class__ = ContiguousXCA
    return backbone
