"""XCiT for inference alone: constants folded into weights, weights cast once, tokens left where they lie.

Shape letters: B crops of a batch, T patch tokens, D embedding width, G tokens a side of the grid (T = G * G).
"""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812  (the name torch's own documentation uses)
from timm.layers.mlp import Mlp
from timm.models.cait import ClassAttn
from timm.models.xcit import LPI, XCA, ClassAttentionBlock, ConvPatchEmbed, PositionalEncodingFourier, XCABlock, Xcit
from torch import nn

from ctc_ray.pretrain.unit_length import ContiguousXCA

_SMALLEST_SQUARE: Final = 1e-24
"""Square of the length below which `F.normalize`, as timm calls it, divides by a constant."""
_EXPECTED: Final[dict[type[nn.Module], tuple[type[nn.Module], ...]]] = {
    XCABlock: (nn.LayerNorm, XCA, ContiguousXCA, LPI, Mlp, nn.Identity),
    ClassAttentionBlock: (nn.LayerNorm, ClassAttn, Mlp, nn.Identity),
}
"""Children that the arithmetic below knows, a block."""


def freeze_xcit(backbone: nn.Module, input_size_px: int, dtype: torch.dtype) -> FrozenXcit | None:
    """Build the inference form of a backbone, where it is an XCiT as timm builds it.

    Args:
        backbone: in eval mode, float32, on the processor; left as it is.
        input_size_px: side of its input.
        dtype: of weights and tokens, float32 or bfloat16.

    Returns:
        A module from (B, C, side, side) float32 to (B, D) float32; None for every other backbone.
    """
    return FrozenXcit(backbone, input_size_px, dtype) if _is_plain_xcit(backbone) else None


def _is_plain_xcit(backbone: nn.Module) -> bool:
    if type(backbone) is not Xcit or backbone.global_pool != "token" or not isinstance(backbone.head, nn.Identity):
        return False
    if type(backbone.patch_embed) is not ConvPatchEmbed or type(backbone.norm) is not nn.LayerNorm:
        return False
    if backbone.pos_embed is not None and type(backbone.pos_embed) is not PositionalEncodingFourier:
        return False
    for blocks, kind in ((backbone.blocks, XCABlock), (backbone.cls_attn_blocks, ClassAttentionBlock)):
        for block in blocks:
            if type(block) is not kind or any(type(child) not in _EXPECTED[kind] for child in block.children()):
                return False
    activations = [m for m in backbone.modules() if type(m).__name__.endswith(("GELU", "GELUTanh", "ReLU", "SiLU"))]
    return all(type(module) is nn.GELU and module.approximate == "none" for module in activations)


class FrozenXcit(nn.Module):
    """XCiT with nothing left to train.

    Batch norms and layer scales are folded into the convolutions and matrices beside them (in float64), the position code
    is computed once for the input's size, and queries and keys are divided by their lengths after their product, where
    fewer numbers stand. Tokens are never transposed: their depthwise convolutions read them as channels-last images.

    With bfloat16 the patch embedding stays in float32: it is a small share of the work, and most of the rounding error came
    from there. Layer norms, softmax and the lengths of queries and keys are summed in float32.

    Source: timm `Xcit.forward`; departure: the same sums in another order.
    """

    def __init__(self, backbone: Any, input_size_px: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        self.stem = nn.ModuleList([_folded_stem(layer) for layer in backbone.patch_embed.proj[::2]])
        side = input_size_px
        for _ in self.stem:
            side = (side + 1) // 2
        position = torch.zeros(1, side * side, backbone.embed_dim)
        if backbone.pos_embed is not None:
            with torch.no_grad():
                position = backbone.pos_embed(1, side, side).flatten(2).transpose(1, 2)
        self.position = _fixed(position, dtype)
        self.class_token = _fixed(backbone.cls_token, dtype)
        self.blocks = nn.ModuleList([_Block(block, side, dtype) for block in backbone.blocks])
        blocks = list(backbone.cls_attn_blocks)
        self.class_blocks = nn.ModuleList([_ClassBlock(block, dtype, last=block is blocks[-1]) for block in blocks])
        self.norm = _Norm(backbone.norm, torch.float32)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Embed (B, C, side, side) float32 images, to (B, D) float32."""
        x = images.contiguous(memory_format=torch.channels_last)
        for number, convolution in enumerate(self.stem):
            x = convolution(F.gelu(x) if number else x)
        tokens = x.permute(0, 2, 3, 1).flatten(1, 2).to(self._dtype) + self.position
        for block in self.blocks:
            tokens = block(tokens)
        tokens = torch.cat([self.class_token.expand(len(tokens), -1, -1), tokens], dim=1)
        for block in self.class_blocks:
            tokens = block(tokens)
        vectors: torch.Tensor = self.norm(tokens[:, 0].float())
        return vectors


class _Block(nn.Module):
    """`XCABlock`: attention across channels, a local mixing of tokens, and two layers at each token."""

    def __init__(self, block: Any, side: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._side, self._heads = side, int(block.attn.num_heads)
        self.norm1, self.norm3, self.norm2 = (_Norm(n, dtype) for n in (block.norm1, block.norm3, block.norm2))
        self.qkv = _Product.of(block.attn.qkv, dtype)
        self.temperature = _fixed(block.attn.temperature.unsqueeze(0), torch.float32)
        self.projection = _Product.of(block.attn.proj, dtype, block.gamma1)
        mixing, gamma = block.local_mp, block.gamma3.detach().double()
        self.conv1 = _Convolution(mixing.conv1.weight, mixing.conv1.bias, dtype, groups=len(gamma))
        scale, shift = _batch_norm(mixing.bn)
        weight = mixing.conv2.weight.detach().double()
        self.conv2 = _Convolution(weight * (scale * gamma).view(-1, 1, 1, 1), None, dtype, groups=len(gamma))
        # Padding adds zeros behind the batch norm: what its shift gives depends on the place.
        constant = shift.view(1, -1, 1, 1).expand(1, -1, side, side)
        constant = F.conv2d(constant, weight, mixing.conv2.bias.detach().double(), padding=1, groups=len(gamma))
        self.local_bias = _fixed((constant * gamma.view(1, -1, 1, 1)).flatten(2).transpose(1, 2), dtype)
        self.hidden = _Product.of(block.mlp.fc1, dtype)
        self.output = _Product.of(block.mlp.fc2, dtype, block.gamma2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, T, D) to (B, T, D), in place."""
        tokens += self.projection(self._attend(self.norm1(tokens)))
        images = self.norm3(tokens).unflatten(1, (self._side, self._side)).permute(0, 3, 1, 2)
        images = self.conv2(F.gelu(self.conv1(images)))
        tokens += images.permute(0, 2, 3, 1).flatten(1, 2)
        tokens += self.local_bias
        tokens += self.output(F.gelu(self.hidden(self.norm2(tokens))))
        return tokens

    def _attend(self, tokens: torch.Tensor) -> torch.Tensor:
        batch, count, width = tokens.shape
        heads, channels = self._heads, width // self._heads
        parts = self.qkv(tokens).view(batch, count, 3, heads, channels).permute(2, 0, 3, 1, 4).contiguous()
        squares = parts[:2].float().square().sum(dim=-2).clamp_min_(_SMALLEST_SQUARE).rsqrt_()
        query, key, value = parts.view(3, batch * heads, count, channels)
        product = torch.bmm(query.transpose(1, 2), key).view(batch, heads, channels, channels)
        product = product.float() * (squares[0].unsqueeze(-1) * self.temperature) * squares[1].unsqueeze(-2)
        weights = product.softmax(dim=-1).to(self.qkv.weight.dtype).view(-1, channels, channels)
        mixed = torch.bmm(value, weights.transpose(1, 2)).view(batch, heads, count, channels)
        return mixed.transpose(1, 2).reshape(batch, count, width)


class _ClassBlock(nn.Module):
    """`ClassAttentionBlock`: the class token looks at all tokens; the last block leaves out what nobody reads."""

    def __init__(self, block: Any, dtype: torch.dtype, *, last: bool) -> None:
        super().__init__()
        attention = block.attn
        self._heads, self._norm_all, self._last = int(attention.num_heads), bool(block.tokens_norm), last
        self.norm1, self.norm2 = _Norm(block.norm1, dtype), _Norm(block.norm2, dtype)
        self.query = _Product.of(attention.q, dtype)
        bias = None if attention.k.bias is None else torch.cat([attention.k.bias, attention.v.bias])
        self.key_value = _Product(torch.cat([attention.k.weight, attention.v.weight]), bias, dtype)
        # A layer scale that is switched off is the plain number 1.
        gamma1, gamma2 = (torch.as_tensor(g).expand(block.norm1.normalized_shape) for g in (block.gamma1, block.gamma2))
        self.gamma = _fixed(gamma1, dtype)
        self.projection = _Product.of(attention.proj, dtype, gamma1)
        self.hidden = _Product.of(block.mlp.fc1, dtype)
        self.output = _Product.of(block.mlp.fc2, dtype, gamma2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, 1 + T, D) to the same, class token first; the last block gives (B, 1, D)."""
        batch, count, width = tokens.shape
        normed = self.norm1(tokens)
        query = self.query(normed[:, 0]).view(batch, 1, self._heads, -1).transpose(1, 2)
        both = self.key_value(normed).view(batch, count, 2, self._heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, both[0], both[1]).reshape(batch, width)
        token = self.norm2(tokens[:, 0] + self.projection(attended))
        first: torch.Tensor = (token + self.output(F.gelu(self.hidden(token)))).unsqueeze(1)
        if self._last:
            return first
        rest = torch.addcmul(tokens[:, 1:], self.gamma, normed[:, 1:])
        # timm adds the patch tokens to themselves.
        return torch.cat([first, 2 * (self.norm2(rest) if self._norm_all else rest)], dim=1)


class _Norm(nn.Module):
    """Layer norm over the last axis; its sums are taken in float32 whatever the dtype."""

    def __init__(self, norm: nn.LayerNorm, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.bias, self._eps = _fixed(norm.weight, dtype), _fixed(norm.bias, dtype), norm.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self._eps)


class _Product(nn.Module):
    """Product with a matrix (out, in), and a bias."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype, scale: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        factor = torch.ones(len(weight), dtype=torch.float64) if scale is None else scale.detach().double()
        self.weight = _fixed(weight.detach().double() * factor.unsqueeze(1), dtype)
        self.bias = None if bias is None else _fixed(bias.detach().double() * factor, dtype)

    @classmethod
    def of(cls, layer: Any, dtype: torch.dtype, scale: torch.Tensor | None = None) -> _Product:
        """That of a linear layer; `scale` (out,) multiplies its result."""
        return cls(layer.weight, layer.bias, dtype, scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class _Convolution(nn.Module):
    """3 x 3 convolution of channels-last images, padded with zeros."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype, *, groups: int = 1, stride: int = 1
    ) -> None:
        super().__init__()
        self.weight = _fixed(weight, dtype, torch.channels_last)
        self.bias = None if bias is None else _fixed(bias, dtype)
        self._groups, self._stride = groups, stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        convolved: torch.Tensor = F.conv2d(x, self.weight, self.bias, self._stride, padding=1, groups=self._groups)
        return convolved


def _folded_stem(layer: Any) -> _Convolution:
    """A convolution and the batch norm behind it, in float32."""
    convolution, norm = layer
    scale, shift = _batch_norm(norm)
    weight = convolution.weight.detach().double() * scale.view(-1, 1, 1, 1)
    return _Convolution(weight, shift, torch.float32, stride=convolution.stride)


def _batch_norm(norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift of a channel, float64, by the running statistics."""
    if norm.running_mean is None or norm.running_var is None:
        raise TypeError("a batch norm without running statistics cannot be folded")
    scale = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale, norm.bias.detach().double() - norm.running_mean.double() * scale


def _fixed(
    value: torch.Tensor, dtype: torch.dtype, memory_format: torch.memory_format = torch.contiguous_format
) -> nn.Parameter:
    """A parameter that follows its module to a device and takes no gradient."""
    return nn.Parameter(
        value.detach().to(dtype, copy=True).contiguous(memory_format=memory_format), requires_grad=False
    )
