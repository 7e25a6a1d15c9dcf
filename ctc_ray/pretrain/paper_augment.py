"""Views by the reference's colour augmentations, batched: the `paper` preset.

It treats the three markers as the colours of one image, inverts and equalises them, and so destroys which marker is
bright; it is here to compare against. Values and order are those in effect in the reference (`create_dino_gym` and
`data_augmentation`); operations follow torchvision's definitions on images of 0..1.

Departures: perspective and rotation share one bilinear resampling (the reference resamples twice, the second time to the
nearest pixel); corners move by any length, not by whole pixels; values are not rounded to 8 bits after each operation; only
3-channel crops have hue and saturation, so other channel counts skip those two.

Shape letters: N crops, M = views x N, C channels, H rows, W columns, S side of a view.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812  (the name torch's own documentation uses)

from ctc_ray.pretrain.augment import ViewGeometry, Views, blur, uniform, warp

PERSPECTIVE: Final = 0.2  # reference: RandomPerspective distortion_scale
PERSPECTIVE_PROBABILITY: Final = 0.5  # reference: RandomPerspective p
INVERT_PROBABILITY: Final = 0.3  # reference: RandomInvert p
SHARPNESS: Final = 2.0  # reference: RandomAdjustSharpness factor
SHARPNESS_PROBABILITY: Final = 0.5  # reference: RandomAdjustSharpness p
AUTOCONTRAST_PROBABILITY: Final = 0.5  # reference: RandomAutocontrast p
EQUALISE_PROBABILITY: Final = 0.2  # reference: RandomEqualize p
FLIP_PROBABILITY: Final = 0.5  # reference: horizontal and vertical flip p
ASPECT: Final = (3 / 4, 4 / 3)  # reference: RandomResizedCrop default
WINDOW_ATTEMPTS: Final = 10  # torchvision RandomResizedCrop
JITTER_PROBABILITY: Final = 0.8  # reference: ColorJitter p
BRIGHTNESS: Final = 0.1  # reference: ColorJitter
CONTRAST: Final = 0.4  # reference: ColorJitter
SATURATION: Final = 0.1  # reference: ColorJitter
HUE: Final = 0.1  # reference: ColorJitter
BLUR_SIGMA_PX: Final = (0.1, 5.0)  # reference: GaussianBlur sigma
BLUR_KERNEL_PX: Final = 11  # reference: GaussianBlur kernel size
BLUR_PROBABILITY: Final = (1.0, 0.1, 0.5)  # reference: first global, second global, local
SOLARISE_PROBABILITY: Final = 0.2  # reference: second global view only
SOLARISE_THRESHOLD: Final = 0.5  # reference: 128 of 255
_LUMA: Final = (0.2989, 0.587, 0.114)  # torchvision rgb_to_grayscale
_REFERENCE_GLOBAL_PX: Final = 256


class PaperAugment:
    """Two global and several local views by the `paper` preset.

    Args:
        geometry: view sizes. For views of 48 and 24 px take `replace(PAPER.geometry, global_px=48, local_px=24)` with an
            input of 48 px. The blur's sigma and kernel then scale by global_px / 256 (sigma 0.02 to 0.94 px, 3 px wide), as
            5 px of a 256 px view are 1 px of that. What has no size in px stays; the 3 px of sharpness cannot shrink, and
            reach further into the cell than at 224 px.
    """

    def __init__(self, geometry: ViewGeometry) -> None:
        self.geometry = geometry

    def __call__(self, fraction_NCHW: torch.Tensor, generator: torch.Generator) -> Views:
        """Make views of crops (N, C, H, W) in 0..1; same generator state, same views."""
        geometry = self.geometry
        fraction_NCHW = fraction_NCHW.clamp(0.0, 1.0)
        views = []
        for index in range(2 + geometry.num_local):
            is_local = index >= 2
            size_px = geometry.local_px if is_local else geometry.global_px
            scale = geometry.local_scale if is_local else geometry.global_scale
            image = pose(fraction_NCHW, generator)
            image = tone(image, generator)
            image = resized_crop(image, size_px=size_px, scale=scale, generator=generator)
            image = jitter(image, generator)
            image = self._blurred(image, BLUR_PROBABILITY[min(index, 2)], generator)
            if index == 1:
                image = _on(image, _chosen(len(image), SOLARISE_PROBABILITY, generator), solarise)
            views.append(image.clamp(0.0, 1.0) * 2.0 - 1.0)
        empty = views[0].new_empty(0, len(fraction_NCHW), fraction_NCHW.shape[1], geometry.local_px, geometry.local_px)
        return Views(torch.stack(views[:2]), torch.stack(views[2:]) if geometry.num_local else empty)

    def _blurred(self, image: torch.Tensor, probability: float, generator: torch.Generator) -> torch.Tensor:
        ratio = self.geometry.global_px / _REFERENCE_GLOBAL_PX
        sigma = uniform((len(image),), BLUR_SIGMA_PX[0] * ratio, BLUR_SIGMA_PX[1] * ratio, generator)
        reach = BLUR_KERNEL_PX // 2 * ratio
        chosen = _chosen(len(image), probability, generator)
        return _on(image, chosen, lambda part: blur(part, sigma[chosen], reach_px=max(1, round(reach)), mirror=True))


def _chosen(num: int, probability: float, generator: torch.Generator) -> torch.Tensor:
    return uniform((num,), 0.0, 1.0, generator) < probability


def _on(
    image_NCHW: torch.Tensor, chosen_N: torch.Tensor, operation: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Apply an operation to the chosen images alone."""
    changed = image_NCHW.clone()
    changed[chosen_N] = operation(image_NCHW[chosen_N])
    return changed


def pose(image_NCHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Perspective, then rotation by up to 180 degrees, in one resampling; outside is black as in torchvision.

    Each corner moves inwards by up to `PERSPECTIVE / 2` of the side, as RandomPerspective does.
    """
    num = len(image_NCHW)
    corner = image_NCHW.new_tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    moved = corner * (1.0 - uniform((num, 4, 2), 0.0, PERSPECTIVE, generator))
    perspective = homography(moved, corner.expand(num, 4, 2))
    tilted = uniform((num,), 0.0, 1.0, generator) < PERSPECTIVE_PROBABILITY
    identity = torch.eye(3, device=image_NCHW.device).expand(num, 3, 3)
    perspective = torch.where(tilted.view(-1, 1, 1), perspective, identity)
    turned = rotation(uniform((num,), -math.pi, math.pi, generator))
    return warp(image_NCHW, perspective @ turned, image_NCHW.shape[-1], padding="zeros")


def rotation(angle_N: torch.Tensor) -> torch.Tensor:
    """Matrices (N, 3, 3), view to image, that turn images counter-clockwise by angles in radians."""
    cos, sin, zero, one = angle_N.cos(), angle_N.sin(), torch.zeros_like(angle_N), torch.ones_like(angle_N)
    return torch.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one], dim=-1).view(-1, 3, 3)


def homography(source_N42: torch.Tensor, target_N42: torch.Tensor) -> torch.Tensor:
    """The homographies that take four points to four others.

    Args:
        source_N42: (N, 4, 2) points (x, y).
        target_N42: (N, 4, 2) where each goes.

    Returns:
        (N, 3, 3) with a last element of 1.
    """
    x, y = source_N42.unbind(-1)
    u, v = target_N42.unbind(-1)
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    rows_u = torch.stack([x, y, one, zero, zero, zero, -u * x, -u * y], dim=-1)
    rows_v = torch.stack([zero, zero, zero, x, y, one, -v * x, -v * y], dim=-1)
    solved = torch.linalg.solve(torch.cat([rows_u, rows_v], dim=1), torch.cat([u, v], dim=1))
    return torch.cat([solved, torch.ones_like(solved[:, :1])], dim=1).view(-1, 3, 3)


def tone(image_NCHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Invert, sharpen, stretch and equalise, each on its share of the images."""
    num = len(image_NCHW)
    image = _on(image_NCHW, _chosen(num, INVERT_PROBABILITY, generator), invert)
    image = _on(image, _chosen(num, SHARPNESS_PROBABILITY, generator), sharpen)
    image = _on(image, _chosen(num, AUTOCONTRAST_PROBABILITY, generator), autocontrast)
    return _on(image, _chosen(num, EQUALISE_PROBABILITY, generator), equalise)


def invert(image_NCHW: torch.Tensor) -> torch.Tensor:
    """Dark for bright, 1 - v."""
    return 1.0 - image_NCHW


def solarise(image_NCHW: torch.Tensor) -> torch.Tensor:
    """Invert what is bright: 1 - v from `SOLARISE_THRESHOLD` on."""
    return torch.where(image_NCHW >= SOLARISE_THRESHOLD, 1.0 - image_NCHW, image_NCHW)


def sharpen(image_NCHW: torch.Tensor, factor: float = SHARPNESS) -> torch.Tensor:
    """Blend with a 3x3 smoothed copy, as torchvision's adjust_sharpness; borders stay as they are.

    The smoothing kernel is 1/13 everywhere and 5/13 in its centre, so sums of neighbours do for a convolution.
    """
    rows = image_NCHW[..., :-2, :] + image_NCHW[..., 1:-1, :] + image_NCHW[..., 2:, :]
    square = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    inner = image_NCHW[..., 1:-1, 1:-1]
    sharp = image_NCHW.clone()
    sharp[..., 1:-1, 1:-1] = factor * inner + (1.0 - factor) / 13.0 * (square + 4.0 * inner)
    return sharp.clamp_(0.0, 1.0)


def autocontrast(image_NCHW: torch.Tensor) -> torch.Tensor:
    """Stretch each channel of each image to 0..1; a flat channel stays as it is."""
    low = image_NCHW.amin(dim=(2, 3), keepdim=True)
    span = image_NCHW.amax(dim=(2, 3), keepdim=True) - low
    return torch.where(span > 0, (image_NCHW - low) / span.clamp_min(1e-12), image_NCHW)


def equalise(image_NCHW: torch.Tensor) -> torch.Tensor:
    """Equalise the 256-level histogram of each channel of each image, as torchvision's equalize."""
    num, channels, height, width = image_NCHW.shape
    level = (image_NCHW * 255.0).round().long().reshape(num * channels, height * width)
    histogram = torch.zeros(num * channels, 256, device=image_NCHW.device, dtype=torch.int64)
    histogram.scatter_add_(1, level, torch.ones_like(level))
    levels = torch.arange(256, device=image_NCHW.device)
    last = torch.where(histogram > 0, levels, -1).amax(dim=1, keepdim=True)
    step = (histogram.sum(dim=1, keepdim=True) - histogram.gather(1, last.clamp_min(0))) // 255
    table = (histogram.cumsum(dim=1) + step // 2) // step.clamp_min(1)
    table = F.pad(table, (1, 0))[:, :-1].clamp(0, 255)
    mapped = table.gather(1, level)
    return torch.where(step > 0, mapped, level).view(image_NCHW.shape).to(image_NCHW.dtype) / 255.0


def resized_crop(
    image_NCHW: torch.Tensor, *, size_px: int, scale: tuple[float, float], generator: torch.Generator
) -> torch.Tensor:
    """Random crop of an area and aspect, resampled to the view, then both flips; as RandomResizedCrop."""
    num, _, height, width = image_NCHW.shape
    windows = draw_windows(num, height=height, width=width, scale=scale, generator=generator)
    flips = uniform((2, num), 0.0, 1.0, generator) < FLIP_PROBABILITY
    return resize_windows(image_NCHW, windows, size_px, flips)


def draw_windows(
    num: int, *, height: int, width: int, scale: tuple[float, float], generator: torch.Generator
) -> torch.Tensor:
    """Draw one window an image: the first of ten draws of area and aspect that fits, else the whole image.

    Args:
        num: number of images N.
        height: of an image, px.
        width: of an image, px.
        scale: range of the window's share of the image's area.
        generator: source of all draws.

    Returns:
        (N, 4) int64 px: top, left, height, width.

    Source: torchvision RandomResizedCrop.get_params; departure: its fallback trims an image whose own aspect is out of range,
    which a square crop never is.
    """
    area = uniform((WINDOW_ATTEMPTS, num), scale[0], scale[1], generator) * (height * width)
    aspect = torch.exp(uniform((WINDOW_ATTEMPTS, num), math.log(ASPECT[0]), math.log(ASPECT[1]), generator))
    place = uniform((2, num), 0.0, 1.0, generator)
    tall, wide = (area / aspect).sqrt().round().long(), (area * aspect).sqrt().round().long()
    fits = (tall > 0) & (tall <= height) & (wide > 0) & (wide <= width)
    attempt = torch.arange(WINDOW_ATTEMPTS, device=area.device).view(-1, 1)
    first = torch.where(fits, attempt, WINDOW_ATTEMPTS - 1).amin(dim=0, keepdim=True)
    found = fits.any(dim=0)
    tall = torch.where(found, tall.gather(0, first)[0], height)
    wide = torch.where(found, wide.gather(0, first)[0], width)
    top = (place[0] * (height - tall + 1)).long().clamp_max(height - 1)
    left = (place[1] * (width - wide + 1)).long().clamp_max(width - 1)
    return torch.stack([top, left, tall, wide], dim=-1)


def resize_windows(
    image_NCHW: torch.Tensor, windows_N4: torch.Tensor, size_px: int, flips_2N: torch.Tensor | None = None
) -> torch.Tensor:
    """Cut a window from each image and resample it bilinearly, smoothing where it shrinks, as PIL and torchvision do.

    Args:
        image_NCHW: (N, C, H, W) float32.
        windows_N4: (N, 4) px: top, left, height, width.
        size_px: side S of the result.
        flips_2N: (2, N) bool: mirror the columns, mirror the rows.

    Returns:
        (N, C, S, S) float32.
    """
    top, left, tall, wide = windows_N4.unbind(-1)
    rows = _triangles(top, tall, image_NCHW.shape[2], size_px)
    columns = _triangles(left, wide, image_NCHW.shape[3], size_px)
    if flips_2N is not None:
        columns = torch.where(flips_2N[0].view(-1, 1, 1), columns.flip(1), columns)
        rows = torch.where(flips_2N[1].view(-1, 1, 1), rows.flip(1), rows)
    return rows.unsqueeze(1) @ image_NCHW @ columns.unsqueeze(1).transpose(-1, -2)


def _triangles(start_N: torch.Tensor, length_N: torch.Tensor, side_px: int, size_px: int) -> torch.Tensor:
    """Weights (N, S, side) of the pixels of an axis in each pixel of the view; none from outside the window."""
    pixel = torch.arange(side_px, device=start_N.device)
    inside = pixel - start_N.view(-1, 1, 1)
    step = (length_N / size_px).view(-1, 1, 1)
    centre = (torch.arange(size_px, device=start_N.device) + 0.5).view(1, -1, 1) * step
    weight = (1.0 - (inside + 0.5 - centre).abs() / step.clamp_min(1.0)).clamp_min(0.0)
    weight = weight * ((inside >= 0) & (inside < length_N.view(-1, 1, 1)))
    return weight / weight.sum(dim=-1, keepdim=True)


def jitter(image_MCHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Brightness, contrast, saturation and hue in an order drawn per image, on most images."""
    num, channels = image_MCHW.shape[:2]
    brightness = uniform((num, 1, 1, 1), 1 - BRIGHTNESS, 1 + BRIGHTNESS, generator)
    contrast = uniform((num, 1, 1, 1), 1 - CONTRAST, 1 + CONTRAST, generator)
    saturation = uniform((num, 1, 1, 1), 1 - SATURATION, 1 + SATURATION, generator)
    hue = uniform((num, 1, 1), -HUE, HUE, generator)
    order = uniform((num, 4), 0.0, 1.0, generator).argsort(dim=1)
    chosen = _chosen(num, JITTER_PROBABILITY, generator)
    image = image_MCHW.clone()
    for position in range(4):
        operation = order[:, position]
        at = (chosen & (operation == 0)).nonzero().view(-1)
        image[at] = brighten(image[at], brightness[at])
        at = (chosen & (operation == 1)).nonzero().view(-1)
        image[at] = contrasted(image[at], contrast[at])
        if channels != 3:
            continue
        at = (chosen & (operation == 2)).nonzero().view(-1)
        image[at] = saturate(image[at], saturation[at])
        at = (chosen & (operation == 3)).nonzero().view(-1)
        image[at] = shift_hue(image[at], hue[at])
    return image


def brighten(image_MCHW: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Multiply the light, as adjust_brightness; `factor` broadcasts, as in the two that follow."""
    return (image_MCHW * factor).clamp_(0.0, 1.0)


def contrasted(image_MCHW: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Move values away from the image's mean grey, as adjust_contrast."""
    return _blend(image_MCHW, grey(image_MCHW).mean(dim=(1, 2, 3), keepdim=True), factor)


def saturate(image_M3HW: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Move values away from their pixel's grey, as adjust_saturation."""
    return _blend(image_M3HW, grey(image_M3HW), factor)


def grey(image_MCHW: torch.Tensor) -> torch.Tensor:
    """Luma of three channels (torchvision's weights), the plain mean of any other number: (M, 1, H, W)."""
    if image_MCHW.shape[1] != 3:
        return image_MCHW.mean(dim=1, keepdim=True)
    weights = image_MCHW.new_tensor(_LUMA).view(1, 3, 1, 1)
    return (image_MCHW * weights).sum(dim=1, keepdim=True)


def _blend(image: torch.Tensor, other: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
    return (ratio * image + (1.0 - ratio) * other).clamp(0.0, 1.0)


def shift_hue(image_M3HW: torch.Tensor, shift_M11: torch.Tensor) -> torch.Tensor:
    """Turn the hue by a share of the circle, through HSV and back as torchvision does."""
    red, green, blue = image_M3HW.unbind(1)
    value = image_M3HW.amax(dim=1)
    chroma = value - image_M3HW.amin(dim=1)
    safe = torch.where(chroma > 0, chroma, torch.ones_like(chroma))
    sector = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2.0 + (blue - red) / safe, 4.0 + (red - green) / safe),
    )
    hue = torch.where(chroma > 0, sector / 6.0 + shift_M11, torch.zeros_like(sector)).remainder(1.0)
    # k(n) = (n + 6 h) mod 6 for n = 5, 3, 1; channel = v - c * max(0, min(k, 4 - k, 1))
    channels = []
    for offset in (5.0, 3.0, 1.0):
        k = (offset + hue * 6.0).remainder(6.0)
        channels.append(value - chroma * torch.minimum(torch.minimum(k, 4.0 - k), torch.ones_like(k)).clamp_min(0.0))
    return torch.stack(channels, dim=1)
