"""Batched views for DINO that keep the identity and order of the channels: the `marker` preset.

A circulating tumor cell is defined by which marker is bright, so nothing here swaps, inverts or equalises channels.
What varies is what varies between cartridges: pose, focus, exposure, noise, background and bleed. Every operation is
one tensor operation over the whole batch; no sample is visited by itself.

Shape letters: N crops, M = views x N, V views, C channels, H rows, W columns, S side of a view.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812  (the name torch's own documentation uses)

from ctc_ray.pretrain.intensity import IntensityRule, to_network, to_unit


@dataclass(frozen=True)
class Views:
    """Views of one batch in network range.

    Attributes:
        global_views: (2, N, C, S, S) float32, seen by student and teacher.
        local_views: (V, N, C, s, s) float32 with s < S, seen by the student alone.
    """

    global_views: torch.Tensor
    local_views: torch.Tensor


class Augment(Protocol):
    """Turns a batch of crops into views."""

    def __call__(self, fraction_NCHW: torch.Tensor, generator: torch.Generator) -> Views:
        """Make views of crops (N, C, H, W) given as fractions of full scale, drawing from `generator` alone."""


@dataclass(frozen=True)
class ViewGeometry:
    """Sizes of the views.

    Attributes:
        global_px: side S of a global view, px.
        local_px: side of a local view, px.
        num_local: local views per crop.
        global_scale: smallest and largest share of the crop's area in a global view.
        local_scale: the same for a local view.
    """

    global_px: int = 48
    local_px: int = 24
    num_local: int = 5
    global_scale: tuple[float, float] = (0.45, 1.0)
    local_scale: tuple[float, float] = (0.2, 0.6)


@dataclass(frozen=True)
class MarkerStrength:
    """How strongly `marker` varies a crop; ranges are drawn anew per view unless said otherwise.

    Units: `unit` is the scaled light of `intensity.to_unit`, 0 background and 1 bright.

    Attributes:
        perspective: largest perspective coefficient (dimensionless, on coordinates -1..1).
        aspect: largest ratio of the sides of the sampled window.
        wander: how far a window's centre leaves the crop's, 0..1 of the room there is. The cell lies in the middle,
            and a window of background alone has nothing to say about it.
        exposure_log2: range of a common gain of all channels, drawn per *crop* and shared by its views: variety for
            the encoder, and no demand to ignore brightness.
        exposure_probability: share of crops that get such an exposure.
        gain_log2: standard deviation of a per-channel gain.
        offset: standard deviation of a per-channel offset, unit.
        gamma_log2: standard deviation of a per-channel exponent.
        background: standard deviation of the slope of a per-channel background plane, unit across the view.
        bleed: largest share of one channel's light that shows in another.
        shot_noise: largest variance per unit of light.
        read_noise: largest standard deviation of camera noise, unit.
        blur_px: range of the point-spread sigma, px of the view.
        blur_probability: share of blurred views (global, local).
    """

    perspective: float = 0.15
    aspect: float = 1.25
    wander: float = 0.7
    exposure_log2: tuple[float, float] = (-4.0, 1.0)
    exposure_probability: float = 0.3
    gain_log2: float = 0.125
    offset: float = 0.005
    gamma_log2: float = 0.075
    background: float = 0.01
    bleed: float = 0.025
    shot_noise: float = 0.002
    read_noise: float = 0.01
    blur_px: tuple[float, float] = (0.3, 1.2)
    blur_probability: tuple[float, float] = (0.5, 0.3)


def uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    """Uniform draws in `low`..`high` on the generator's device."""
    return torch.rand(shape, generator=generator, device=generator.device) * (high - low) + low


def normal(shape: tuple[int, ...], sd: float, generator: torch.Generator) -> torch.Tensor:
    """Normal draws of mean 0 on the generator's device."""
    return torch.randn(shape, generator=generator, device=generator.device) * sd


def draw_warps(
    num: int,
    *,
    scale: tuple[float, float],
    aspect: float,
    perspective: float,
    wander: float = 1.0,
    generator: torch.Generator,
) -> torch.Tensor:
    """Draw one homography per view: crop window, flip, rotation and perspective in one matrix.

    Args:
        num: number of views M.
        scale: range of the window's share of the crop's area.
        aspect: largest ratio of its sides.
        perspective: largest perspective coefficient.
        wander: share of the room between window and border that the window's centre uses.
        generator: source of all draws.

    Returns:
        (M, 3, 3) float32 mapping homogeneous view coordinates (x, y, 1) in -1..1 to crop coordinates in -1..1.
    """
    angle = uniform((num,), -math.pi, math.pi, generator)
    side = uniform((num,), scale[0], scale[1], generator).sqrt()
    stretch = torch.exp(uniform((num,), -0.5, 0.5, generator) * math.log(aspect))
    flip = torch.where(uniform((num,), 0.0, 1.0, generator) < 0.5, -1.0, 1.0)
    width, height = side * stretch * flip, side / stretch
    # The window's centre stays where the window lies inside the crop.
    room = (1.0 - side).clamp_min(0.0) * wander
    centre_x, centre_y = uniform((2, num), -1.0, 1.0, generator) * room
    tilt_x, tilt_y = uniform((2, num), -perspective, perspective, generator)
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    cos, sin = angle.cos(), angle.sin()
    place = torch.stack(
        [cos * width, -sin * height, centre_x, sin * width, cos * height, centre_y, zero, zero, one], dim=-1
    )
    project = torch.stack([one, zero, zero, zero, one, zero, tilt_x, tilt_y, one], dim=-1)
    return place.view(num, 3, 3) @ project.view(num, 3, 3)


def warp(
    images_MCHW: torch.Tensor, matrices_M33: torch.Tensor, size_px: int, *, padding: str = "reflection"
) -> torch.Tensor:
    """Resample every image through its homography, once.

    Args:
        images_MCHW: (M, C, H, W) float32.
        matrices_M33: (M, 3, 3) view to image coordinates, both -1..1 (see `draw_warps`).
        size_px: side S of the result.
        padding: what lies beyond the border: its mirror image (`reflection`) or nothing (`zeros`).

    Returns:
        (M, C, S, S) float32.
    """
    axis = (torch.arange(size_px, device=images_MCHW.device) + 0.5) * (2.0 / size_px) - 1.0
    # Products of 3 terms, written out: a batched matrix product of that width costs more than the sampling.
    by_x, by_y, constant = matrices_M33.to(images_MCHW.dtype).unsqueeze(-1).unsqueeze(-1).unbind(2)
    x, y, scale = (by_x * axis + (by_y * axis.view(-1, 1) + constant)).unbind(1)
    grid = torch.stack([x / scale, y / scale], dim=-1)
    return F.grid_sample(images_MCHW, grid, mode="bilinear", padding_mode=padding, align_corners=False)


def blur(
    images_MCHW: torch.Tensor, sigma_px_M: torch.Tensor, *, reach_px: int | None = None, mirror: bool = False
) -> torch.Tensor:
    """Gaussian blur with one sigma per image, as two batched matrix products.

    Args:
        images_MCHW: (M, C, S, S) float32.
        sigma_px_M: (M,) sigma in px; values below 0.05 leave the image as it is.
        reach_px: the kernel ends this far from its centre; None lets it fade out.
        mirror: what lies beyond the border is the image's mirror image, as torchvision has it; else the kernel is
            renormalised there. A flat image stays flat either way.

    Returns:
        (M, C, S, S) float32.
    """
    size = images_MCHW.shape[-1]
    axis = torch.arange(size, device=images_MCHW.device, dtype=images_MCHW.dtype)
    spread = 2.0 * sigma_px_M.clamp_min(0.05).square().view(-1, 1, 1)

    def weights(of_pixel: torch.Tensor) -> torch.Tensor:
        distance2 = (axis[:, None] - of_pixel[None, :]).square()
        kernel = torch.exp(-distance2 / spread)
        return kernel if reach_px is None else kernel * (distance2 <= reach_px**2)

    kernel = weights(axis)
    if mirror:
        # Pixels 1, 2, ... stand at -1, -2, ... too, and likewise at the far border.
        before, after = -axis, 2.0 * (size - 1) - axis
        kernel = kernel + weights(before) * (axis > 0) + weights(after) * (axis < size - 1)
    kernel = (kernel / kernel.sum(dim=-1, keepdim=True)).unsqueeze(1)
    return kernel @ images_MCHW @ kernel.transpose(-1, -2)


class MarkerAugment:
    """Two global and several local views by the `marker` preset.

    Args:
        rule: intensity rule of the encoder; light is varied in its linear space and compressed afterwards.
        geometry: view sizes.
        strength: ranges of the variation.
    """

    def __init__(
        self,
        rule: IntensityRule,
        geometry: ViewGeometry | None = None,
        strength: MarkerStrength | None = None,
    ) -> None:
        self.rule = rule
        self.geometry = geometry or ViewGeometry()
        self.strength = strength or MarkerStrength()

    def __call__(self, fraction_NCHW: torch.Tensor, generator: torch.Generator) -> Views:
        """Make views.

        Args:
            fraction_NCHW: (N, C, H, W) float32 fractions of full scale.
            generator: source of all draws, on the crops' device; same state, same views.
        """
        geometry, strength = self.geometry, self.strength
        unit = self._expose(to_unit(fraction_NCHW, self.rule), generator)
        views = []
        for num_views, size_px, scale, blur_probability in (
            (2, geometry.global_px, geometry.global_scale, strength.blur_probability[0]),
            (geometry.num_local, geometry.local_px, geometry.local_scale, strength.blur_probability[1]),
        ):
            matrices = draw_warps(
                num_views * len(unit),
                scale=scale,
                aspect=strength.aspect,
                perspective=strength.perspective,
                wander=strength.wander,
                generator=generator,
            )
            repeated = unit.repeat(num_views, 1, 1, 1)
            lit = self._vary_light(warp(repeated, matrices, size_px), blur_probability, generator)
            views.append(to_network(lit, self.rule).unflatten(0, (num_views, len(unit))))
        return Views(views[0], views[1])

    def _expose(self, unit_NCHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        low, high = self.strength.exposure_log2
        num = len(unit_NCHW)
        gain = torch.exp2(uniform((num,), low, high, generator))
        chosen = uniform((num,), 0.0, 1.0, generator) < self.strength.exposure_probability
        return unit_NCHW * torch.where(chosen, gain, torch.ones_like(gain)).view(-1, 1, 1, 1)

    def _vary_light(
        self, images_MCHW: torch.Tensor, blur_probability: float, generator: torch.Generator
    ) -> torch.Tensor:
        """Optics first (blur, bleed), then staining and illumination, then the camera's noise."""
        strength = self.strength
        num, channels, size, _ = images_MCHW.shape
        sigma = uniform((num,), strength.blur_px[0], strength.blur_px[1], generator)
        chosen = uniform((num,), 0.0, 1.0, generator) < blur_probability
        images_MCHW = blur(images_MCHW, torch.where(chosen, sigma, torch.zeros_like(sigma)))

        leak = uniform((num, channels, channels), 0.0, strength.bleed, generator)
        itself = torch.eye(channels, device=leak.device, dtype=torch.bool)
        gain = torch.exp2(normal((num, channels, 1), strength.gain_log2, generator))
        mix = torch.where(itself, torch.ones_like(leak), leak) * gain
        images_MCHW = (mix @ images_MCHW.flatten(2)).view(num, channels, size, size)

        gamma = torch.exp2(normal((num, channels, 1, 1), strength.gamma_log2, generator))
        positive = images_MCHW.clamp_min(1e-4)
        # Light below the background has no power law; it stays as it is.
        images_MCHW = torch.where(images_MCHW > 1e-4, positive**gamma, images_MCHW)

        axis = torch.linspace(-0.5, 0.5, size, device=images_MCHW.device)
        slope_y = normal((num, channels, 1, 1), strength.background, generator) * axis.view(1, 1, -1, 1)
        slope_x = normal((num, channels, 1, 1), strength.background, generator) * axis.view(1, 1, 1, -1)
        images_MCHW = images_MCHW + normal((num, channels, 1, 1), strength.offset, generator) + slope_y + slope_x

        shot = uniform((num, 1, 1, 1), 0.0, strength.shot_noise, generator)
        read = uniform((num, 1, 1, 1), 0.0, strength.read_noise, generator)
        sd = (images_MCHW.clamp_min(0.0) * shot + read.square()).sqrt()
        return images_MCHW + torch.randn(images_MCHW.shape, generator=generator, device=generator.device) * sd
