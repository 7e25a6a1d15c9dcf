"""Views: batched, seeded, and true to the channels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812  (the name torch's own documentation uses)
from scipy import ndimage
from torchvision.transforms.v2 import functional as reference

from ctc_ray.pretrain import paper_augment
from ctc_ray.pretrain.augment import MarkerAugment, MarkerStrength, ViewGeometry, blur, draw_warps, warp
from ctc_ray.pretrain.intensity import IntensityRule
from ctc_ray.pretrain.paper_augment import PaperAugment

RULE = IntensityRule("constants", (0.0,) * 3, (1.0,) * 3)
STILL = MarkerStrength(
    exposure_probability=0.0,
    gain_log2=0.0,
    offset=0.0,
    gamma_log2=0.0,
    background=0.0,
    bleed=0.0,
    shot_noise=0.0,
    read_noise=0.0,
    blur_probability=(0.0, 0.0),
)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _images(num: int = 4, channels: int = 3, side: int = 48, seed: int = 0) -> torch.Tensor:
    smooth = torch.rand(num, channels, side // 4, side // 4, generator=_generator(seed))
    return F.interpolate(smooth, size=(side, side), mode="bilinear", align_corners=False)


@pytest.mark.parametrize("augment", [MarkerAugment(RULE), PaperAugment(ViewGeometry())])
def test_views_have_documented_shapes_and_are_finite(augment: MarkerAugment | PaperAugment) -> None:
    views = augment(_images(), _generator())
    assert views.global_views.shape == (2, 4, 3, 48, 48)
    assert views.local_views.shape == (5, 4, 3, 24, 24)
    assert torch.isfinite(views.global_views).all()
    assert torch.isfinite(views.local_views).all()


@pytest.mark.parametrize("augment", [MarkerAugment(RULE), PaperAugment(ViewGeometry())])
def test_views_of_same_seed_are_equal_and_of_other_seed_differ(augment: MarkerAugment | PaperAugment) -> None:
    first, again, other = (augment(_images(), _generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.global_views, again.global_views)
    assert torch.equal(first.local_views, again.local_views)
    assert not torch.equal(first.global_views, other.global_views)


def test_two_global_views_differ() -> None:
    views = MarkerAugment(RULE)(_images(), _generator())
    assert not torch.equal(views.global_views[0], views.global_views[1])


@pytest.mark.parametrize("bright", [0, 1, 2])
def test_marker_views_keep_the_bright_channel(bright: int) -> None:
    images = torch.full((64, 3, 48, 48), 0.05)
    images[:, bright] = 0.6
    views = MarkerAugment(RULE)(images, _generator())
    for part in (views.global_views, views.local_views):
        assert (part.mean(dim=(3, 4)).argmax(dim=2) == bright).float().mean() > 0.99


def test_marker_views_without_variation_keep_mean_light_of_flat_image() -> None:
    images = torch.full((8, 3, 48, 48), 0.3)
    views = MarkerAugment(RULE, strength=STILL)(images, _generator())
    assert torch.allclose(views.global_views, torch.tensor(0.3 * 2 - 1), atol=1e-4)
    assert torch.allclose(views.local_views, torch.tensor(0.3 * 2 - 1), atol=1e-4)


@pytest.mark.parametrize("num_channels", [1, 4])
def test_marker_views_take_any_number_of_channels(num_channels: int) -> None:
    rule = IntensityRule("constants", (0.0,) * num_channels, (1.0,) * num_channels)
    assert MarkerAugment(rule)(_images(channels=num_channels), _generator()).global_views.shape[2] == num_channels


def test_warp_by_identity_returns_the_image() -> None:
    images = _images()
    assert torch.allclose(warp(images, torch.eye(3).expand(4, 3, 3), 48), images, atol=1e-5)


def test_warp_by_quarter_turn_equals_rot90() -> None:
    images = _images()
    turn = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]).expand(4, 3, 3)
    turned = warp(images, turn, 48)
    expected = (torch.rot90(images, 1, (2, 3)), torch.rot90(images, -1, (2, 3)))
    assert any(torch.allclose(turned, e, atol=1e-4) for e in expected)


def test_warp_window_equals_slice() -> None:
    images = _images()
    half = torch.tensor([[0.5, 0.0, -0.5], [0.0, 0.5, -0.5], [0.0, 0.0, 1.0]]).expand(4, 3, 3)
    assert torch.allclose(warp(images, half, 24), images[..., :24, :24], atol=1e-5)


def test_drawn_warps_are_invertible_and_of_the_asked_scale() -> None:
    matrices = draw_warps(500, scale=(0.25, 0.5), aspect=1.3, perspective=0.0, generator=_generator())
    area = torch.linalg.det(matrices[:, :2, :2]).abs()
    assert float(area.min()) >= 0.25 - 1e-4
    assert float(area.max()) <= 0.5 + 1e-4


def test_blur_equals_scipy_away_from_border_and_keeps_flat_image() -> None:
    images = _images(num=2)
    blurred = blur(images, torch.tensor([1.0, 2.0]))
    for index, sigma in enumerate((1.0, 2.0)):
        expected = ndimage.gaussian_filter(images[index, 0].numpy(), sigma, truncate=8)
        inner = np.s_[14:-14, 14:-14]
        assert np.allclose(blurred[index, 0].numpy()[inner], expected[inner], atol=1e-4)
    flat = torch.ones(1, 1, 48, 48)
    assert torch.allclose(blur(flat, torch.tensor([3.0])), flat, atol=1e-5)
    assert torch.allclose(blur(images, torch.zeros(2)), images, atol=1e-6)


def test_sharpen_equals_torchvision() -> None:
    images = _images()
    expected = reference.adjust_sharpness(images, 2.0)
    assert torch.allclose(paper_augment.sharpen(images, 2.0), expected, atol=1e-5)


def test_autocontrast_equals_torchvision_and_keeps_flat_channel() -> None:
    images = _images()
    images[0, 1] = 0.4
    assert torch.allclose(paper_augment.autocontrast(images), reference.autocontrast(images), atol=1e-5)


def test_equalise_equals_torchvision() -> None:
    levels = (_images(num=6) * 200).to(torch.uint8)
    levels[0, 0] = 7
    expected = reference.equalize(levels).float() / 255
    assert torch.allclose(paper_augment.equalise(levels.float() / 255), expected, atol=1e-6)


def test_hue_shift_equals_torchvision() -> None:
    images = _images(num=3)
    for shift in (-0.1, 0.0, 0.07):
        expected = reference.adjust_hue(images, shift)
        actual = paper_augment.shift_hue(images, torch.full((3, 1, 1), shift))
        assert torch.allclose(actual, expected, atol=1e-4)


def test_paper_homography_maps_corners() -> None:
    corner = torch.tensor([[[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]]])
    moved = corner * torch.tensor([0.9, 0.8])
    matrix = paper_augment.homography(corner, moved)
    mapped = torch.cat([corner, torch.ones(1, 4, 1)], dim=-1) @ matrix.transpose(1, 2)
    assert torch.allclose(mapped[..., :2] / mapped[..., 2:], moved, atol=1e-5)
