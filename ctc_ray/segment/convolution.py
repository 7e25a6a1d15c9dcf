"""Convolutions frozen for inference: weights packed once, bias and activation inside the same pass where oneDNN is there."""

from __future__ import annotations

import functools

import torch
from torch import nn

_FUSED_ACTIVATIONS = {nn.ReLU: "relu", nn.Identity: "none"}


class FrozenConvolution:
    """One convolution with bias and activation, for inference only.

    On a CPU with oneDNN bias and activation are applied in the convolution's own pass and the weights are packed once: a
    field of 1036x1384 otherwise spends more time reading and writing maps than multiplying (`benchmarks/segment.py`).
    Everywhere else it is the plain convolution.
    """

    def __init__(self, layer: nn.Conv2d, activation: nn.Module, *, dtype: torch.dtype, device: torch.device) -> None:
        """Freeze a layer.

        Args:
            layer: stride 1, dilation 1, one group, zero padding, with a bias.
            activation: follows it.
            dtype: of weights and maps, float32 or bfloat16.
            device: where it runs.
        """
        self.channels_out = layer.out_channels
        self._activation = activation
        self._padding = [int(side) for side in layer.padding]
        weight = layer.weight.detach().to(device, dtype).contiguous(memory_format=torch.channels_last)
        self._bias = None if layer.bias is None else layer.bias.detach().to(device, dtype)
        self._fused = device.type == "cpu" and fused_convolutions_work(dtype)
        self._attribute = _FUSED_ACTIVATIONS.get(type(activation), "none")
        self._apart = self._fused and type(activation) not in _FUSED_ACTIVATIONS
        self._weight = _packed(weight, self._padding) if self._fused else weight

    def __call__(self, maps: torch.Tensor) -> torch.Tensor:
        """Convolve.

        Args:
            maps: (N, C, H, W), channels last.

        Returns:
            (N, C', H, W) of the same type, channels last.
        """
        if not self._fused:
            plain: torch.Tensor = nn.functional.conv2d(maps, self._weight, self._bias, padding=self._padding)
            activated: torch.Tensor = self._activation(plain)
            return activated
        fused = _fused(maps, self._weight, self._bias, self._padding, self._attribute)
        return self._activation(fused) if self._apart else fused


def _fused(
    maps: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, padding: list[int], activation: str
) -> torch.Tensor:
    fused: torch.Tensor = torch.ops.mkldnn._convolution_pointwise(
        maps, weight, bias, padding, [1, 1], [1, 1], 1, activation, [], ""
    )
    return fused


def _packed(weight: torch.Tensor, padding: list[int]) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_convolution_weight(weight, padding, [1, 1], [1, 1], 1, None)
    return packed


@functools.cache
def fused_convolutions_work(dtype: torch.dtype) -> bool:
    """Whether this build of torch has oneDNN's fused convolution and it gives what the plain one gives.

    The operators belong to torch's own compiler and are no promised interface, so they are tried before they are trusted.

    Args:
        dtype: float32 or bfloat16.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    maps = torch.linspace(-1.0, 1.0, 2 * 9 * 8).reshape(1, 2, 9, 8)
    weight = torch.linspace(-0.5, 0.5, 3 * 2 * 9).reshape(3, 2, 3, 3)
    bias = torch.tensor([-0.1, 0.0, 0.1])
    with torch.inference_mode():
        expected = torch.relu(nn.functional.conv2d(maps, weight, bias, padding=1))
        given = maps.to(dtype).contiguous(memory_format=torch.channels_last)
        try:
            packed = _packed(weight.to(dtype).contiguous(memory_format=torch.channels_last), [1, 1])
            found = _fused(given, packed, bias.to(dtype), [1, 1], "relu")
        except (AttributeError, NotImplementedError, RuntimeError, TypeError):
            return False  # another torch: its plain convolution is as right, and slower
        return bool(torch.allclose(found.float(), expected, atol=1e-5 if dtype == torch.float32 else 0.05))
