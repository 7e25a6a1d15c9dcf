"""The `paper` preset's operations against PIL and torchvision, on real cells; tolerances in levels of 8 bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision import transforms
from torchvision.transforms import functional as reference

from ctc_ray.pretrain import paper_augment
from ctc_ray.pretrain.augment import ViewGeometry, blur, warp
from ctc_ray.pretrain.intensity import IntensityRule
from ctc_ray.pretrain.paper_augment import PaperAugment, draw_windows, resize_windows
from ctc_ray.pretrain.settings import PAPER
from ctc_ray.pretrain.trainer import DinoTrainer

LEVEL = 1 / 255
Measure = Callable[[torch.Tensor], torch.Tensor]
SMALL = replace(PAPER.geometry, global_px=48, local_px=24)


@pytest.fixture(scope="module")
def cells(shared_data: Path) -> np.ndarray:
    """(N, 48, 48, 3) uint8: real cells, each channel over its own range, mirrored at the border."""
    with np.load(shared_data / "jurkat_ifc" / "cells.npz", allow_pickle=False) as data:
        images = data["X"][::40].astype(np.float64)
    low, high = images.min(axis=(1, 2), keepdims=True), images.max(axis=(1, 2), keepdims=True)
    levels = np.round(230 * (images - low) / np.maximum(high - low, 1)).astype(np.uint8)
    return np.pad(levels, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="reflect")


def _batch(cells: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(cells).permute(0, 3, 1, 2).float() / 255


def _by_pil(cells: np.ndarray, operation: Callable[[Image.Image], Image.Image]) -> torch.Tensor:
    """Each cell through a PIL operation, by itself."""
    return _batch(np.stack([np.asarray(operation(Image.fromarray(cell))) for cell in cells]))


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("ours", "theirs", "levels"),
    [
        (paper_augment.invert, reference.invert, 0.01),
        (paper_augment.sharpen, lambda i: reference.adjust_sharpness(i, 2.0), 2.0),  # PIL rounds the smoothed copy
        (paper_augment.autocontrast, reference.autocontrast, 1.0),  # PIL's table of 256 levels cuts fractions off
        (paper_augment.equalise, reference.equalize, 0.01),
        (paper_augment.solarise, lambda i: reference.solarize(i, 128), 0.01),
    ],
)
def test_tone_operation_equals_pil(
    cells: np.ndarray,
    ours: Callable[[torch.Tensor], torch.Tensor],
    theirs: Callable[[Image.Image], Image.Image],
    levels: float,
) -> None:
    assert float((ours(_batch(cells)) - _by_pil(cells, theirs)).abs().max()) <= levels * LEVEL


@pytest.mark.parametrize(
    ("ours", "theirs", "factor", "levels"),
    [
        (paper_augment.brighten, reference.adjust_brightness, 0.9, 1.0),
        (paper_augment.brighten, reference.adjust_brightness, 1.1, 1.0),
        (paper_augment.contrasted, reference.adjust_contrast, 0.6, 1.5),  # PIL rounds the mean grey
        (paper_augment.contrasted, reference.adjust_contrast, 1.4, 1.5),
        (paper_augment.saturate, reference.adjust_saturation, 0.9, 1.5),  # PIL rounds each grey
        (paper_augment.saturate, reference.adjust_saturation, 1.1, 1.5),
    ],
)
def test_jitter_operation_equals_pil(
    cells: np.ndarray,
    ours: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    theirs: Callable[[Image.Image, float], Image.Image],
    factor: float,
    levels: float,
) -> None:
    expected = _by_pil(cells, lambda image: theirs(image, factor))
    assert float((ours(_batch(cells), torch.tensor(factor)) - expected).abs().max()) <= levels * LEVEL


@pytest.mark.parametrize("shift", [-0.1, 0.0, 0.06])
def test_hue_shift_equals_torchvision_and_comes_near_pil(cells: np.ndarray, shift: float) -> None:
    images = _batch(cells)
    actual = paper_augment.shift_hue(images, torch.full((len(images), 1, 1), shift))
    assert float((actual - reference.adjust_hue(images, shift)).abs().max()) < 1e-4
    expected = _by_pil(cells, lambda image: reference.adjust_hue(image, shift))
    # PIL keeps hue and saturation in 8 bits each.
    assert float((actual - expected).abs().mean()) <= 1.5 * LEVEL


@pytest.mark.parametrize("window", [(0, 0, 48, 48), (3, 7, 40, 31), (20, 0, 16, 18), (30, 29, 18, 19)])
@pytest.mark.parametrize("size_px", [24, 48])
def test_window_equals_pil_and_torchvision(cells: np.ndarray, window: tuple[int, int, int, int], size_px: int) -> None:
    images = _batch(cells)
    actual = resize_windows(images, torch.tensor(window).expand(len(images), 4), size_px)
    exact = reference.resized_crop(images, *window, [size_px, size_px], antialias=True)
    assert float((actual - exact).abs().max()) < 1e-5
    expected = _by_pil(cells, lambda image: reference.resized_crop(image, *window, [size_px, size_px]))
    assert float((actual - expected).abs().max()) <= 1.5 * LEVEL  # PIL rounds after each axis


def test_flips_mirror_columns_and_rows(cells: np.ndarray) -> None:
    images = _batch(cells[:4])
    whole = torch.tensor([0, 0, 48, 48]).expand(4, 4)
    flips = torch.tensor([[False, True, False, True], [False, False, True, True]])
    flipped = resize_windows(images, whole, 48, flips)
    for index, axes in enumerate(((), (-1,), (-2,), (-1, -2))):
        assert torch.allclose(flipped[index], images[index].flip(axes), atol=1e-6)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0, 5.0])
def test_blur_of_eleven_px_equals_torchvision_up_to_the_border(cells: np.ndarray, sigma: float) -> None:
    images = _batch(cells)
    actual = blur(images, torch.full((len(images),), sigma), reach_px=5, mirror=True)
    expected = reference.gaussian_blur(images, [11, 11], [sigma, sigma])
    assert float((actual - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("degrees", [-131.0, 30.0, 90.0])
def test_rotation_equals_torchvision(cells: np.ndarray, degrees: float) -> None:
    images = _batch(cells)
    matrices = paper_augment.rotation(torch.full((len(images),), math.radians(degrees)))
    actual = warp(images, matrices, 48, padding="zeros")
    expected = reference.rotate(images, degrees, interpolation=transforms.InterpolationMode.BILINEAR)
    assert float((actual - expected).abs().max()) < 1e-4


def test_perspective_comes_within_half_a_px_of_torchvision(cells: np.ndarray) -> None:
    images = _batch(cells)
    corner = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    inwards = torch.tensor([[4, 1], [0, 3], [2, 2], [1, 4]])
    moved = corner * (1.0 - inwards / 24.0)
    matrix = paper_augment.homography(moved[None], corner[None])
    actual = warp(images, matrix.expand(len(images), 3, 3), 48, padding="zeros")
    start = [[0, 0], [47, 0], [47, 47], [0, 47]]
    end = [
        [s + int(i) * (1 if s == 0 else -1) for s, i in zip(c, by, strict=True)]
        for c, by in zip(start, inwards, strict=True)
    ]
    # torchvision puts the last corner at pixel 47 of 0..48: a shift of at most half a px.
    expected = reference.perspective(images, start, end)
    moved_half_px = (images[..., 1:, 1:] - images[..., :-1, :-1]).abs().mean() / 2
    assert float((actual - expected).abs().mean()) < float(moved_half_px)
    assert float((actual - expected).abs().mean()) < 0.25 * float((actual - images).abs().mean())


@pytest.mark.parametrize("scale", [PAPER.geometry.global_scale, PAPER.geometry.local_scale])
def test_windows_are_distributed_as_torchvision_draws_them(scale: tuple[float, float]) -> None:
    ours = draw_windows(1500, height=224, width=224, scale=scale, generator=_generator())
    torch.manual_seed(0)
    blank = Image.new("RGB", (224, 224))
    params = [transforms.RandomResizedCrop.get_params(blank, list(scale), [3 / 4, 4 / 3]) for _ in range(1500)]
    theirs = torch.tensor(params)
    assert bool((ours[:, :2] >= 0).all())
    assert int((ours[:, :2] + ours[:, 2:]).max()) <= 224
    measures: tuple[Measure, ...] = (lambda w: w[:, 2] * w[:, 3], lambda w: w[:, 2] / w[:, 3], lambda w: w[:, 0])
    for measure in measures:
        assert stats.ks_2samp(measure(ours).numpy(), measure(theirs).numpy()).pvalue > 1e-3


def test_window_that_never_fits_is_the_whole_image() -> None:
    windows = draw_windows(50, height=20, width=20, scale=(3.0, 4.0), generator=_generator())
    assert windows.tolist() == [[0, 0, 20, 20]] * 50


@pytest.mark.parametrize(
    ("index", "local"), [(0, False), (1, False), (2, True)], ids=["first global", "second global", "local"]
)
def test_views_are_distributed_as_the_reference_makes_them(cells: np.ndarray, index: int, local: bool) -> None:
    """Mean light, contrast and sharpness of 64 cells' views, beside those by torchvision's transforms on PIL images."""
    geometry = replace(SMALL, num_local=1)
    blurred = [
        transforms.RandomApply([transforms.GaussianBlur(3, (0.1 * 48 / 256, 5 * 48 / 256))], (1.0, 0.1, 0.5)[index])
    ]
    by_pil = transforms.Compose(
        [
            transforms.RandomPerspective(0.2, p=0.5),
            transforms.RandomRotation(180, interpolation=transforms.InterpolationMode.BILINEAR),
            transforms.RandomInvert(0.3),
            transforms.RandomAdjustSharpness(2, 0.5),
            transforms.RandomAutocontrast(0.5),
            transforms.RandomEqualize(0.2),
            transforms.RandomResizedCrop(24 if local else 48, scale=(0.1, 0.5) if local else (0.5, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.RandomVerticalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.1, 0.4, 0.1, 0.1)], 0.8),
            *blurred,
            transforms.RandomSolarize(128, 0.2 if index == 1 else 0.0),
            transforms.ToTensor(),
        ]
    )
    torch.manual_seed(1)
    theirs = torch.stack([by_pil(Image.fromarray(cell)) for _ in range(6) for cell in cells]) * 2 - 1
    drawn = [PaperAugment(geometry)(_batch(cells), _generator(seed)) for seed in range(6)]
    ours = torch.cat([views.local_views[0] if local else views.global_views[index] for views in drawn])
    measures: tuple[Measure, ...] = (
        lambda views: views.mean(dim=(1, 2, 3)),
        lambda views: views.std(dim=(1, 2, 3)),
        lambda views: (views[..., 1:] - views[..., :-1]).abs().mean(dim=(1, 2, 3)),
    )
    for measure in measures:
        assert stats.ks_2samp(measure(ours).numpy(), measure(theirs).numpy()).pvalue > 1e-3


def test_views_of_published_size_have_reference_shapes(cells: np.ndarray) -> None:
    images = torch.nn.functional.interpolate(_batch(cells[:2]), size=(224, 224), mode="bilinear")
    views = PaperAugment(PAPER.geometry)(images, _generator())
    assert views.global_views.shape == (2, 2, 3, 256, 256)
    assert views.local_views.shape == (5, 2, 3, 85, 85)
    assert float(views.global_views.abs().max()) <= 1.0


def test_paper_settings_take_small_views_of_crops_as_they_are() -> None:
    settings = replace(
        PAPER,
        geometry=SMALL,
        input_px=48,
        architecture="resnet10t",
        prototypes=32,
        head_hidden=16,
        batch_size=4,
        steps=2,
    )
    trainer = DinoTrainer(settings, IntensityRule("reference"))
    views = trainer.views_of(torch.rand(4, 3, 48, 48, generator=_generator()))
    assert views.global_views.shape == (2, 4, 3, 48, 48)
    assert views.local_views.shape == (5, 4, 3, 24, 24)


def test_preset_holds_the_values_in_effect_in_the_reference() -> None:
    found = {
        "geometry": PAPER.geometry,
        "input": PAPER.input_px,
        "head": (PAPER.head_hidden, PAPER.head_bottleneck, PAPER.prototypes),
        "batch": PAPER.batch_size,
        "rate": (PAPER.learning_rate, PAPER.learning_rate_end),
        "decay": (PAPER.weight_decay, PAPER.weight_decay_end),
        "teacher": (PAPER.teacher_momentum, PAPER.teacher_momentum_end),
        "temperature": (PAPER.teacher_temperature_start, PAPER.teacher_temperature),
        "clip": (PAPER.clip, PAPER.clip_factor),
        "steps": PAPER.steps,
    }
    assert found == {
        "geometry": ViewGeometry(256, 85, 5, (0.5, 1.0), (0.1, 0.5)),
        "input": 224,
        "head": (2048, 256, 65_536),
        "batch": 128,
        "rate": (1e-3, 1e-6),
        "decay": (0.04, 0.4),
        "teacher": (0.995, 0.995),
        "temperature": (0.04, 0.04),
        "clip": ("agc", 3.0),
        "steps": 30_000,
    }
