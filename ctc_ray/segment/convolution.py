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


class FrozenUpConvolution:
    """Upsampling by two, concatenation with the skip connection and the first convolution of a decoder level, in fewer products.

    A 3x3 convolution of a map that was doubled by repetition reads each value up to four times. With the kernel's taps on equal
    values added beforehand it is four 2x2 convolutions of the small map, one for each parity of the output's row and
    column: 16 products instead of 36. The skip connection's part is a convolution of its own, added in its pass; nothing is
    concatenated.
    """

    def __init__(self, layer: nn.Conv2d, activation: nn.Module, *, channels_up: int, dtype: torch.dtype) -> None:
        """Freeze a layer; the caller has asked `splits`.

        Args:
            layer: 3x3, reads the upsampled channels first, then the skip connection's.
            activation: follows it.
            channels_up: upsampled channels.
            dtype: of weights and maps.
        """
        self.channels_out = layer.out_channels
        self._attribute = _FUSED_ACTIVATIONS[type(activation)]
        weight = layer.weight.detach()
        self._bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        self._skip_weight = _frozen(weight[:, channels_up:], dtype)
        rows = _added_taps(weight[:, :channels_up], dim=2)
        self._up_weights = [[_frozen(taps, dtype) for taps in _added_taps(row, dim=3)] for row in rows]

    @staticmethod
    def splits(layer: nn.Conv2d, activation: nn.Module, pool: tuple[int, int], dtype: torch.dtype) -> bool:
        """Whether a layer can be computed so: 3x3, doubled in both directions, a fused activation."""
        fits = tuple(layer.kernel_size) == (3, 3) and pool == (2, 2) and type(activation) in _FUSED_ACTIVATIONS
        return fits and split_upsampling_works(dtype)

    def __call__(self, coarse: torch.Tensor, skip: torch.Tensor, offset: tuple[int, int]) -> torch.Tensor:
        """Convolve.

        Args:
            coarse: (1, C, h, w) map that is doubled.
            skip: (1, C', H, W), a rectangle of the doubled map's positions.
            offset: where that rectangle begins in the doubled map, (row, column), each 0 or 1.

        Returns:
            (1, C'', H, W).
        """
        height, width = coarse.shape[2:]
        shape = (1, self.channels_out, *skip.shape[2:])
        maps = torch.empty(shape, dtype=coarse.dtype, memory_format=torch.channels_last)
        for row_parity in range(2):
            for column_parity in range(2):
                part = _fused(coarse, self._up_weights[row_parity][column_parity], None, [1, 1], "none")
                # With one row and column of padding, output row o sums the rows o - 1 and o of the small map.
                part = part[:, :, row_parity : row_parity + height, column_parity : column_parity + width]
                top, left = (parity ^ begin for parity, begin in zip((row_parity, column_parity), offset, strict=True))
                place = maps[:, :, top::2, left::2]
                first = (top + offset[0]) // 2, (left + offset[1]) // 2
                place.copy_(part[:, :, first[0] : first[0] + place.shape[2], first[1] : first[1] + place.shape[3]])
        added: torch.Tensor = torch.ops.mkldnn._convolution_pointwise_.binary(
            maps, skip, self._skip_weight, self._bias, [1, 1], [1, 1], [1, 1], 1, "add", 1.0, self._attribute, [], ""
        )
        return added


def _frozen(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return _packed(weight.to(dtype).contiguous(memory_format=torch.channels_last), [1, 1])


def _added_taps(weight: torch.Tensor, dim: int) -> list[torch.Tensor]:
    """A kernel of three taps as two of two taps: for even and for odd positions of a doubled axis."""
    before, here, after = weight.unbind(dim)
    return [torch.stack([before, here + after], dim), torch.stack([before + here, after], dim)]


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


@functools.cache
def split_upsampling_works(dtype: torch.dtype) -> bool:
    """As `fused_convolutions_work`, for the sum with the skip connection that `FrozenUpConvolution` needs beside them.

    Args:
        dtype: float32 or bfloat16.
    """
    if not fused_convolutions_work(dtype):
        return False
    layer = nn.Conv2d(5, 3, 3, padding=1)
    with torch.inference_mode():
        layer.weight.copy_(torch.linspace(-0.5, 0.5, 3 * 5 * 9).reshape(3, 5, 3, 3))
        coarse = torch.linspace(-1.0, 1.0, 2 * 4 * 5).reshape(1, 2, 4, 5)
        skip = torch.linspace(1.0, -1.0, 3 * 8 * 10).reshape(1, 3, 8, 10)
        doubled = nn.functional.interpolate(coarse, scale_factor=2.0, mode="nearest")
        expected = torch.relu(layer(torch.cat([doubled, skip], dim=1)))
        given = [maps.to(dtype).contiguous(memory_format=torch.channels_last) for maps in (coarse, skip)]
        try:
            found = FrozenUpConvolution(layer, nn.ReLU(), channels_up=2, dtype=dtype)(given[0], given[1], (0, 0))
        except (AttributeError, NotImplementedError, RuntimeError, TypeError):
            return False  # another torch, as above
        return bool(torch.allclose(found.float(), expected, atol=1e-5 if dtype == torch.float32 else 0.1))
