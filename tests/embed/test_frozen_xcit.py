"""The inference form of XCiT gives what timm's module gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ctc_ray.embed import Embedder
from ctc_ray.embed.frozen_xcit import freeze_xcit
from ctc_ray.phantom import CellKind, draw_crops
from ctc_ray.pretrain.encoder import DEFAULT_FOLDER, build_backbone, load_folder
from ctc_ray.pretrain.intensity import scale_for_network, to_fraction
from ctc_ray.pretrain.unit_length import with_contiguous_attention

ARCHITECTURES = ("xcit_nano_12_p8", "xcit_tiny_12_p8", "xcit_nano_12_p16_224")


def _trained_like(architecture: str, channels: int = 3) -> nn.Module:
    """A backbone whose norms, scales and biases are not the ones that it was built with."""
    generator = torch.Generator().manual_seed(3)
    backbone = build_backbone(architecture, channels=channels).eval()
    with torch.no_grad():
        for name, value in backbone.state_dict().items():
            if name.endswith("running_var"):
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
            elif value.is_floating_point() and value.ndim <= 1:
                value.add_(0.2 * torch.randn(value.shape, generator=generator))
            elif name.endswith("temperature"):
                value.copy_(0.5 + 2 * torch.rand(value.shape, generator=generator))
    return backbone


def _images(channels: int = 3, side: int = 48) -> torch.Tensor:
    return torch.randn(3, channels, side, side, generator=torch.Generator().manual_seed(5))


def _relative(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max() / right.abs().max())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.inference_mode()
def test_frozen_equals_timm_in_float32(architecture: str) -> None:
    backbone = _trained_like(architecture)
    frozen = freeze_xcit(backbone, 48, torch.float32)
    assert frozen is not None
    assert _relative(frozen(_images()), backbone(_images())) < 1e-5


@pytest.mark.parametrize(("channels", "side"), [(4, 48), (3, 64), (3, 56)])
@torch.inference_mode()
def test_frozen_equals_timm_with_other_channels_and_sizes(channels: int, side: int) -> None:
    backbone = _trained_like("xcit_nano_12_p8", channels)
    frozen = freeze_xcit(with_contiguous_attention(backbone), side, torch.float32)
    assert frozen is not None
    images = _images(channels, side)
    assert _relative(frozen(images), backbone(images)) < 1e-5


@torch.inference_mode()
def test_freezing_leaves_the_backbone_as_it_was_and_forward_leaves_its_input() -> None:
    backbone = _trained_like("xcit_nano_12_p8")
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    frozen = freeze_xcit(backbone, 48, torch.float32)
    assert frozen is not None
    images = _images()
    first = frozen(images)
    assert torch.equal(frozen(images), first)
    assert torch.equal(images, _images())
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_other_backbones_and_changed_ones_are_not_frozen() -> None:
    for architecture in ("test_resnet", "test_vit"):
        assert freeze_xcit(build_backbone(architecture).eval(), 48, torch.float32) is None
    changed = build_backbone("xcit_nano_12_p8").eval()
    changed.blocks[3].mlp.act = nn.ReLU()
    assert freeze_xcit(changed, 48, torch.float32) is None
    classifier = build_backbone("xcit_nano_12_p8").eval()
    classifier.reset_classifier(5)
    assert freeze_xcit(classifier, 48, torch.float32) is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_backbone_that_is_not_frozen_embeds_as_its_plain_forward_pass(precision: str) -> None:
    _, spec = load_folder(DEFAULT_FOLDER)
    torch.manual_seed(0)
    backbone = build_backbone("test_vit").eval()
    crops, _ = draw_crops(6, seed=2)
    with torch.inference_mode():
        expected = backbone(scale_for_network(to_fraction(crops), spec.intensity)).numpy()
    wide = type(spec)("test_vit", 3, 48, expected.shape[1], spec.intensity)
    vectors = Embedder(backbone, wide, precision=precision)(crops)
    assert _cosine(vectors, expected) > (0.9999999 if precision == "fp32" else 0.999)


def _cosine(left: np.ndarray, right: np.ndarray) -> float:
    products = (left * right).sum(1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)
    return float(products.min())


def test_bf16_agrees_with_fp32_on_every_phantom_cell() -> None:
    crops, _ = draw_crops(160, seed=9, kinds=dict.fromkeys(CellKind, 1.0))
    exact, rounded = Embedder.load(precision="fp32")(crops), Embedder.load(precision="bf16")(crops)
    assert _cosine(rounded, exact) >= 0.999


def test_bf16_agrees_with_fp32_on_every_real_cell(shared_data: Path) -> None:
    with np.load(shared_data / "jurkat_ifc" / "cells.npz", allow_pickle=False) as data:
        images = data["X"][:: max(1, len(data["X"]) // 160)]
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="reflect")
    crops = np.ascontiguousarray(padded.transpose(0, 3, 1, 2))
    exact, rounded = (Embedder.load(precision=p)(crops, full_scale=4095.0) for p in ("fp32", "bf16"))
    assert _cosine(rounded, exact) >= 0.999


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("intensity", [None, "reference", "minmax"])
def test_lookup_of_counts_gives_the_arithmetic_of_the_rule(dtype: str, intensity: str | None) -> None:
    embed = Embedder.load(precision="fp32", intensity=intensity)
    crops, _ = draw_crops(4, seed=4, dtype=dtype)
    crops[0, :, 0, :2] = [0, np.iinfo(crops.dtype).max]
    crops.setflags(write=False)
    full_scale = None if dtype == "uint8" else 4095.0
    expected = scale_for_network(to_fraction(crops, full_scale), embed.rule)
    assert torch.allclose(embed._scaled(crops, full_scale), expected, rtol=1e-6, atol=1e-6)
