"""Objects to light: emission maps of nucleus, cytoplasm and membrane, blurred and pasted onto a canvas.

Legend: N objects, S stamp side, K lobes, T texture nodes, C channels in the order of `Channel`.

Everything is a batch over objects of similar size: forms are low-rank products of row and column factors, textures and blur
are matrix products, so that a cell costs tens of microseconds in plain NumPy.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ctc_ray.phantom.objects import TEXTURE_NODES, FloatArray, Objects

STAMP_SIDES = (16, 32, 48, 96)
"""Stamp sizes, px; an object takes the smallest that holds its reach."""
PSF_PX: tuple[float, float, float] = (0.75, 0.9, 1.0)
"""Standard deviation of the point-spread function of DAPI, CK and CD45: 10x objective, NA 0.45, longer waves blur more."""
BATCH = 128
_LOBE_EDGE = 0.487
"""Value of a single lobe at its radius: the iso-line that is the nucleus' outline."""
_MASK_LEVEL = 0.3
"""An outline lies where the blurred body falls to this fraction: where an expert sees the edge."""


@dataclass(frozen=True)
class Stamps:
    """Rendered objects of one stamp side.

    Attributes:
        index: (N,) rows of the rendered objects.
        top, left: (N,) int64 canvas position of the stamp's first pixel; may lie outside the canvas.
        light: (N, C, S, S) float32 counts after blur.
        body, nucleus: (N, S, S) bool outlines, or None if not asked for.
    """

    index: npt.NDArray[np.intp]
    top: npt.NDArray[np.int64]
    left: npt.NDArray[np.int64]
    light: FloatArray
    body: npt.NDArray[np.bool_] | None
    nucleus: npt.NDArray[np.bool_] | None


def render(objects: Objects, *, masks: bool = False) -> Iterator[Stamps]:
    """Render every object once, in batches of one stamp side.

    Args:
        objects: what to draw; positions in px of the canvas.
        masks: also give the outlines of body and nucleus.

    Yields:
        Stamps; together they cover every object exactly once.
    """
    need = 2.0 * objects.reach_px() + 2.0
    sides = np.asarray(STAMP_SIDES)[np.minimum(np.searchsorted(STAMP_SIDES, need), len(STAMP_SIDES) - 1)]
    for side in STAMP_SIDES:
        chosen = np.flatnonzero(sides == side)
        for start in range(0, len(chosen), BATCH):
            index = chosen[start : start + BATCH]
            yield _render_batch(objects.take(index), index, side, masks=masks)


def paste(canvas: FloatArray, stamps: Stamps) -> None:
    """Add stamps to one canvas (C, H, W) in place; what lies outside is cut off."""
    height, width = canvas.shape[-2:]
    for n in range(len(stamps.index)):
        window = _window(int(stamps.top[n]), int(stamps.left[n]), stamps.light.shape[-1], height, width)
        if window is not None:
            on_canvas, on_stamp = window
            canvas[(slice(None), *on_canvas)] += stamps.light[(n, slice(None), *on_stamp)]


def paste_crops(crops: FloatArray, crop_of: npt.NDArray[np.intp], stamps: Stamps) -> None:
    """Add stamps to the crop that each belongs to, in place.

    Args:
        crops: (B, C, H, W) canvases.
        crop_of: crop of each object, by object row.
        stamps: what to add.
    """
    height, width = crops.shape[-2:]
    for n, crop in enumerate(crop_of[stamps.index]):
        window = _window(int(stamps.top[n]), int(stamps.left[n]), stamps.light.shape[-1], height, width)
        if window is not None:
            on_canvas, on_stamp = window
            crops[(crop, slice(None), *on_canvas)] += stamps.light[(n, slice(None), *on_stamp)]


def paste_outlines(
    labels: npt.NDArray[np.int32], best: FloatArray, stamps: Stamps, channel: int, *, body: bool
) -> None:
    """Write object row + 1 wherever an object's outline holds the most light of its channel so far.

    Args:
        labels: (H, W) int32, changed in place; 0 is background.
        best: (H, W) float32 light of the object that owns each pixel, changed in place.
        stamps: rendered with masks.
        channel: whose light decides between overlapping objects.
        body: outlines of bodies (else of nuclei).

    Raises:
        ValueError: the stamps were rendered without masks.
    """
    outlines = stamps.body if body else stamps.nucleus
    if outlines is None:
        raise ValueError("stamps hold no outlines: render(objects, masks=True)")
    for n, row in enumerate(stamps.index):
        window = _window(int(stamps.top[n]), int(stamps.left[n]), outlines.shape[-1], *labels.shape)
        if window is not None:
            on_canvas, on_stamp = window
            light = stamps.light[(n, channel, *on_stamp)]
            wins = outlines[(n, *on_stamp)] & (light > best[on_canvas])
            labels[on_canvas][wins] = row + 1
            best[on_canvas][wins] = light[wins]


def _window(
    top: int, left: int, side: int, height: int, width: int
) -> tuple[tuple[slice, slice], tuple[slice, slice]] | None:
    first_row, first_col = max(top, 0), max(left, 0)
    last_row, last_col = min(top + side, height), min(left + side, width)
    if first_row >= last_row or first_col >= last_col:
        return None
    return (
        (slice(first_row, last_row), slice(first_col, last_col)),
        (slice(first_row - top, last_row - top), slice(first_col - left, last_col - left)),
    )


def _render_batch(objects: Objects, index: npt.NDArray[np.intp], side: int, *, masks: bool) -> Stamps:
    top = np.floor(objects.row).astype(np.int64) - side // 2
    left = np.floor(objects.col).astype(np.int64) - side // 2
    # Offsets of the pixel centres from the object's centre, (N, S).
    down = np.arange(side, dtype=np.float32) - (objects.row - top)[:, None].astype(np.float32)
    right = np.arange(side, dtype=np.float32) - (objects.col - left)[:, None].astype(np.float32)
    textures = _textures(objects, side)
    lobes = _lobes(objects, down, right)
    inside = np.where(objects.ribbon[:, None, None], lobes, _ellipse(objects, down, right))
    inside += (objects.irregularity * 0.45)[:, None, None] * textures[:, 0]
    depth = np.sqrt(np.maximum(inside, 0.0))
    nuclear_depth = np.sqrt(np.clip(lobes, 0.0, 1.3))
    shell = np.exp(np.square(inside - 0.22) * np.float32(-18.0)) * (inside > 0)
    light = np.empty((len(objects), 3, side, side), dtype=np.float32)
    light[:, 0] = _nucleus_light(objects, nuclear_depth, textures[:, 2])
    light[:, 1] = _cytoplasm_light(objects, depth, nuclear_depth, shell, textures[:, 1], down, right)
    ring = objects.cd45_ring[:, None, None]
    cd45 = (depth + ring * (shell - depth)) * np.maximum(1.0 + 0.6 * textures[:, 3], 0.0)
    light[:, 2] = objects.cd45[:, None, None] * cd45
    if objects.haze.any():
        dirt = depth * np.maximum(1.0 + objects.ck_grain[:, None, None] * textures[:, 2], 0.1)
        light += objects.haze[:, :, None, None] * dirt[:, None]
    blurs = [_blur_matrices(np.sqrt(objects.defocus_px**2 + np.float32(sigma**2)), side) for sigma in PSF_PX]
    for channel, blur in enumerate(blurs):
        light[:, channel] = blur @ light[:, channel] @ blur.transpose(0, 2, 1)
    body = nucleus = None
    if masks:
        body = _outline(inside, blurs[1])
        nucleus = _outline(lobes, blurs[0])
    return Stamps(index=index, top=top, left=left, light=light, body=body, nucleus=nucleus)


def _outline(inside: FloatArray, blur: FloatArray) -> npt.NDArray[np.bool_]:
    solid = (inside > 0).astype(np.float32)
    # A body smaller than the blur peaks below one: its edge is relative to its own peak.
    spread = blur @ solid @ blur.transpose(0, 2, 1)
    peak = np.maximum(spread.max(axis=(1, 2), keepdims=True), 1e-6)
    return np.asarray(spread >= _MASK_LEVEL * peak)


def _ellipse(objects: Objects, down: FloatArray, right: FloatArray) -> FloatArray:
    """1 at the centre, 0 on the outline of the body, negative outside; (N, S, S)."""
    long_axis = objects.radius_px * np.sqrt(objects.axis_ratio)
    short_axis = objects.radius_px / np.sqrt(objects.axis_ratio)
    cos, sin = np.cos(objects.angle), np.sin(objects.angle)
    a = (cos / long_axis) ** 2 + (sin / short_axis) ** 2
    c = (sin / long_axis) ** 2 + (cos / short_axis) ** 2
    b = 2.0 * cos * sin * (1.0 / long_axis**2 - 1.0 / short_axis**2)
    rows = np.stack([1.0 - c[:, None] * down**2, -b[:, None] * down, np.broadcast_to(-a[:, None], down.shape)], axis=2)
    cols = np.stack([np.ones_like(right), right, right**2], axis=1)
    return np.asarray(rows @ cols, dtype=np.float32)


def _lobes(objects: Objects, down: FloatArray, right: FloatArray) -> FloatArray:
    """1 in the middle of a single lobe, 0 on the outline of the union of lobes, negative outside; (N, S, S)."""
    scale = np.sqrt(-np.log(_LOBE_EDGE)) / np.maximum(objects.lobe_radius_px, 0.3)
    used = max(int(objects.lobe_weights.sum(axis=1).max(initial=1.0)), 1)
    far_down = (down[:, :, None] - objects.lobe_rows[:, None, :used]) * scale[:, None, None]
    far_right = (right[:, :, None] - objects.lobe_cols[:, None, :used]) * scale[:, None, None]
    rows = np.exp(-(far_down**2)) * objects.lobe_weights[:, None, :used]
    total = rows @ np.exp(-(far_right**2)).transpose(0, 2, 1)
    return np.asarray(1.0 - np.log(np.maximum(total, 1e-6)) / np.log(_LOBE_EDGE), dtype=np.float32)


def _nucleus_light(objects: Objects, depth: FloatArray, texture: FloatArray) -> FloatArray:
    grain = np.maximum(1.0 + objects.dapi_texture[:, None, None] * texture, 0.1)
    return np.asarray(objects.dapi[:, None, None] * depth * grain, dtype=np.float32)


def _cytoplasm_light(
    objects: Objects,
    depth: FloatArray,
    nuclear_depth: FloatArray,
    shell: FloatArray,
    texture: FloatArray,
    down: FloatArray,
    right: FloatArray,
) -> FloatArray:
    ring = objects.ck_ring[:, None, None]
    light = depth + ring * (shell - depth)
    grain = np.maximum(1.0 + objects.ck_grain[:, None, None] * texture, 0.05)
    slope = objects.ck_polarity / objects.radius_px
    toward = (slope * np.sin(objects.angle))[:, None, None] * down[:, :, None]
    toward = toward + (slope * np.cos(objects.angle))[:, None, None] * right[:, None, :]
    free = 1.0 - objects.ck_exclusion[:, None, None] * np.minimum(nuclear_depth, 1.0)
    return np.asarray(
        objects.ck[:, None, None] * light * grain * np.maximum(1.0 + toward, 0.1) * free, dtype=np.float32
    )


def _textures(objects: Objects, side: int) -> FloatArray:
    """(N, M, S, S) smooth random maps of unit variance, about 4 px between nodes (more on the largest stamps)."""
    nodes = min(side // 4, TEXTURE_NODES)
    weights = _interpolation(side, nodes)
    return np.asarray(weights @ objects.textures[:, :, :nodes, :nodes] @ weights.T, dtype=np.float32)


@lru_cache(maxsize=8)
def _interpolation(side: int, nodes: int) -> FloatArray:
    """(S, T) weights of the texture nodes along one axis; rows have unit norm so that the variance stays one."""
    spacing = side / nodes
    at = (np.arange(nodes) + 0.5) * spacing - 0.5
    weights = np.exp(-0.5 * ((np.arange(side)[:, None] - at) / (0.6 * spacing)) ** 2)
    return np.asarray(weights / np.linalg.norm(weights, axis=1, keepdims=True), dtype=np.float32)


def _blur_matrices(sigma: FloatArray, side: int) -> FloatArray:
    """(N, S, S) Gaussian blur along one axis: row i holds the weights of all pixels for pixel i."""
    table = _blur_table(side)
    step = np.rint(np.minimum(sigma, _BLUR_MAXIMUM) * _BLUR_STEPS).astype(np.intp)
    return np.asarray(table[step])


_BLUR_STEPS = 32
_BLUR_MAXIMUM = 4.0


@lru_cache(maxsize=8)
def _blur_table(side: int) -> FloatArray:
    """(B, S, S) blur matrices for standard deviations in steps of 1/32 px; far below what is visible."""
    sigma = np.maximum(np.arange(int(_BLUR_MAXIMUM * _BLUR_STEPS) + 1) / _BLUR_STEPS, 1e-3)
    far = np.arange(side)[:, None] - np.arange(side)[None, :]
    weights = np.exp(-0.5 * (far[None] / sigma[:, None, None]) ** 2)
    kernel_sum = np.exp(-0.5 * (np.arange(-24, 25)[None] / sigma[:, None]) ** 2).sum(axis=1)
    return np.asarray(weights / kernel_sum[:, None, None], dtype=np.float32)
