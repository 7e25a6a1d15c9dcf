"""Views: batched, seeded, and true to the channels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812  (the name torch's own documentation uses)
from scipy import ndimage, stats
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.v2 import functional as reference

from ctc_ray.pretrain import augment as augment_module
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


def _light(views: torch.Tensor) -> torch.Tensor:
    """Views (V, N, C, S, S) as scaled light (V * N, C, S, S)."""
    return ((views + 1) / 2).flatten(0, 1)


def _varied(images: torch.Tensor, seed: int = 0, **strength: Any) -> torch.Tensor:
    """Light of global views in which only the named variation is on."""
    augment = MarkerAugment(RULE, strength=replace(STILL, **strength))
    return _light(augment(images, _generator(seed)).global_views)


def test_identity_draw_returns_the_crop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment_module, "draw_warps", lambda num, **_: torch.eye(3).expand(num, 3, 3))
    images = _images()
    views = MarkerAugment(RULE, strength=STILL)(images, _generator()).global_views
    assert torch.allclose(views, (images * 2 - 1).expand(2, -1, -1, -1, -1), atol=1e-5)


def test_swapped_channels_swap_views_exactly_without_light_variation() -> None:
    images, order = _images(), [2, 0, 1]
    augment = MarkerAugment(RULE, strength=STILL)
    views, swapped = augment(images, _generator()), augment(images[:, order], _generator())
    assert torch.allclose(swapped.global_views, views.global_views[:, :, order], atol=1e-6)
    assert torch.allclose(swapped.local_views, views.local_views[:, :, order], atol=1e-6)


def test_swapped_channels_swap_views_in_distribution() -> None:
    images, order = _images(num=1).expand(400, -1, -1, -1) * torch.tensor([0.2, 0.6, 1.0]).view(3, 1, 1), [2, 0, 1]
    # One view a crop: the views of a crop share its exposure, and the test below wants independent draws.
    views = _light(MarkerAugment(RULE)(images, _generator(1)).global_views[:1])
    swapped = _light(MarkerAugment(RULE)(images[:, order], _generator(2)).global_views[:1])
    for position, channel in enumerate(order):
        for light in (lambda v: v.mean(dim=(1, 2)), lambda v: v.std(dim=(1, 2))):
            p = stats.ks_2samp(light(views[:, channel]).numpy(), light(swapped[:, position]).numpy()).pvalue
            assert p > 1e-5
    # and the channels themselves do differ
    assert stats.ks_2samp(views[:, 0].mean(dim=(1, 2)).numpy(), views[:, 1].mean(dim=(1, 2)).numpy()).pvalue < 1e-20


def test_gain_is_drawn_per_channel_with_its_spread() -> None:
    light = _varied(torch.full((400, 3, 48, 48), 0.3), gain_log2=0.25).mean(dim=(2, 3))
    octaves = torch.log2(light / 0.3)
    assert torch.allclose(octaves.std(dim=0), torch.full((3,), 0.25), atol=0.03)
    assert float(torch.corrcoef(octaves.T)[0, 1].abs()) < 0.15


def test_offset_is_drawn_per_channel_with_its_spread() -> None:
    light = _varied(torch.full((400, 3, 48, 48), 0.3), offset=0.01).mean(dim=(2, 3)) - 0.3
    assert torch.allclose(light.std(dim=0), torch.full((3,), 0.01), atol=1.5e-3)
    assert float(torch.corrcoef(light.T)[0, 1].abs()) < 0.15


def test_gamma_bends_light_and_keeps_full_scale_and_background() -> None:
    images = torch.full((400, 3, 48, 48), 0.25)
    images[:, 1], images[:, 2] = 1.0, 0.0
    light = _varied(images, gamma_log2=0.15).mean(dim=(2, 3))
    exponents = torch.log2(torch.log2(light[:, 0]) / -2.0)
    assert float(exponents.std()) == pytest.approx(0.15, abs=0.02)
    assert torch.allclose(light[:, 1], torch.ones(800), atol=1e-4)
    assert torch.allclose(light[:, 2], torch.zeros(800), atol=1e-4)


def test_background_is_a_plane_that_keeps_the_mean() -> None:
    light = _varied(torch.full((200, 3, 48, 48), 0.3), background=0.02)
    assert torch.allclose(light.mean(dim=(2, 3)), torch.tensor(0.3), atol=1e-4)
    slope = light[..., -1] - light[..., 0]
    assert float(slope.mean(dim=2).std()) == pytest.approx(0.02, abs=3e-3)
    assert torch.allclose(light.diff(dim=2).diff(dim=2), torch.tensor(0.0), atol=1e-5)


def test_bleed_shows_a_share_of_one_channel_in_the_others() -> None:
    images = torch.zeros(200, 3, 48, 48)
    images[:, 1] = 0.6
    light = _varied(images, bleed=0.05).mean(dim=(2, 3))
    assert torch.allclose(light[:, 1], torch.tensor(0.6), atol=1e-4)
    for other in (0, 2):
        assert float(light[:, other].min()) >= -1e-5
        assert 0.04 * 0.6 < float(light[:, other].max()) <= 0.05 * 0.6 + 1e-5


def test_shot_noise_grows_with_light_and_read_noise_does_not() -> None:
    images = torch.full((300, 2, 48, 48), 0.2)
    images[:, 1] = 0.8
    augment = {
        name: MarkerAugment(IntensityRule("constants", (0.0,) * 2, (1.0,) * 2), strength=replace(STILL, **{name: 0.02}))
        for name in ("shot_noise", "read_noise")
    }
    shot, read = (_light(a(images, _generator()).global_views).var(dim=(2, 3)).mean(dim=0) for a in augment.values())
    # mean over views of a uniform draw: half the largest variance, and a third of the largest sd squared
    assert torch.allclose(shot, 0.01 * torch.tensor([0.2, 0.8]), rtol=0.1)
    assert torch.allclose(read, torch.full((2,), 0.02**2 / 3), rtol=0.1)


def test_blur_softens_its_share_of_views() -> None:
    images = torch.rand(1, 3, 48, 48, generator=_generator()).expand(300, -1, -1, -1)
    sharp = _varied(images).diff(dim=3).abs().mean(dim=(1, 2, 3))
    soft = _varied(images, blur_probability=(0.5, 0.0), blur_px=(1.0, 1.2)).diff(dim=3).abs().mean(dim=(1, 2, 3))
    share = (soft < 0.75 * sharp).float().mean()
    assert float(share) == pytest.approx(0.5, abs=0.08)


def test_exposure_is_shared_by_channels_and_views_of_a_crop() -> None:
    augment = MarkerAugment(RULE, strength=replace(STILL, exposure_probability=0.5, exposure_log2=(-2.0, 0.0)))
    views = augment(torch.full((200, 3, 48, 48), 0.4), _generator())
    light = ((torch.cat([views.global_views.mean(dim=(3, 4)), views.local_views.mean(dim=(3, 4))]) + 1) / 2) / 0.4
    assert torch.allclose(light, light[:1, :, :1].expand_as(light), atol=1e-4)
    assert float((light[0, :, 0] < 0.999).float().mean()) == pytest.approx(0.5, abs=0.12)
    assert float(light.min()) >= 0.25 - 1e-4


class _CountOperations(TorchDispatchMode):
    """Counts what torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("augment", [MarkerAugment(RULE), PaperAugment(ViewGeometry())])
def test_number_of_operations_does_not_grow_with_the_batch(augment: MarkerAugment | PaperAugment) -> None:
    counts = []
    for num in (8, 64):
        with _CountOperations() as counter:
            augment(_images(num=num), _generator())
        counts.append(counter.count)
    assert 0 < counts[1] <= 1.02 * counts[0]  # `paper` asks a little less or more where a draw chose no image


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
