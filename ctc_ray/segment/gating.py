"""Empty background: which tiles of a field can hold an object, and in which windows they are computed.

On a CellSearch field most of the CK page is empty. A tile is kept where the image, averaged over about half a cell, rises above
its surroundings by `CONTRAST` of the normalised range and by `NOISE_FACTOR` times the noise. The network then computes the
kept tiles with everything they need (`windows.py`; on sparse fields up to `HALO_PX`). What is lost can only be an object
fainter than that; `benchmarks/segment_gating.py` counts how many there are.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from ctc_ray.errors import ConfigError
from ctc_ray.segment.inference import Window
from ctc_ray.segment.network import NetworkConfig
from ctc_ray.segment.windows import Box, Reach, union_of

FloatArray = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

TILE_PX = 16
"""Side of a tile; about a cell."""
CONTRAST = 0.02
"""Least rise above the surroundings, in units of the normalised range (0 at the 1, 1 at the 99.8 percentile); it decides in
bright fields, where noise is small."""
NOISE_FACTOR = 5.0
"""Least rise in units of the noise of that average: in a field with few cells the 99.8 percentile is little above the noise."""
MARGIN_PX = 4
"""A tile is kept too where a neighbouring tile rises this near to it: objects reach across borders."""
HALO_PX = 48
"""Pixels around the kept tiles that the network looks at. Its receptive field reaches 92 px, but what lies beyond 48 px moves a
probability by less than 0.01 and a distance by less than 0.15 px, as much as bfloat16 does."""
CROWDED = 0.35
"""Where a larger share of the field is bright, nothing is skipped: its median would be no background."""
MOST_ACTIVE = 0.06
"""With a larger share of active tiles the whole field is computed: many small pieces cost more than they save."""
_BLOCK_PX = 4
_SURROUNDINGS_PX = 32
_NEIGHBOURHOOD = 9
_BRIGHT = 0.25
_LARGEST_GRADIENT = 0.1
_WORTHWHILE = 0.85


def gate_constants() -> dict[str, float]:
    """What decides which cells are found when the background is skipped; part of the segmentation's fingerprint."""
    return {
        "tile_px": TILE_PX,
        "contrast": CONTRAST,
        "noise_factor": NOISE_FACTOR,
        "margin_px": MARGIN_PX,
        "halo_px": HALO_PX,
        "crowded": CROWDED,
        "most_active": MOST_ACTIVE,
    }


def active_tiles(image: FloatArray) -> Mask:
    """Tiles of `TILE_PX` pixels that may hold an object.

    Args:
        image: (H, W) normalised.

    Returns:
        (ceil(H / TILE_PX), ceil(W / TILE_PX)) bool; all true for a crowded image.
    """
    blocks = _block_means(image, _BLOCK_PX)
    tiles = -(-image.shape[0] // TILE_PX), -(-image.shape[1] // TILE_PX)
    per_tile = TILE_PX // _BLOCK_PX
    if float((blocks > np.percentile(blocks, 5) + _BRIGHT).mean()) > CROWDED:
        return np.ones(tiles, dtype=bool)
    rise, noise = _rise_of(blocks)
    reach = 2 * (MARGIN_PX // _BLOCK_PX) + 1
    grown = ndimage.maximum_filter(rise > max(CONTRAST, NOISE_FACTOR * noise), size=reach, mode="constant", cval=False)
    rows, columns = tiles[0] * per_tile - blocks.shape[0], tiles[1] * per_tile - blocks.shape[1]
    grown = np.pad(grown, ((0, rows), (0, columns)))
    return np.asarray(grown.reshape(tiles[0], per_tile, tiles[1], per_tile).any(axis=(1, 3)), dtype=np.bool_)


def _surroundings(blocks: FloatArray, background: float) -> FloatArray:
    """Grey level around each block: a low percentile of the medians of the neighbourhood, so that a group of cells is none.

    A clump may fill even that, so it is never far above the field's median.
    """
    side = _SURROUNDINGS_PX // _BLOCK_PX
    rows, columns = -(-blocks.shape[0] // side), -(-blocks.shape[1] // side)
    short = rows * side - blocks.shape[0], columns * side - blocks.shape[1]
    padded = np.pad(blocks, ((0, short[0]), (0, short[1])), mode="edge")
    medians = np.median(padded.reshape(rows, side, columns, side), axis=(1, 3))
    around = ndimage.percentile_filter(medians, 40, size=_NEIGHBOURHOOD, mode="nearest")
    around = np.minimum(around, background + _LARGEST_GRADIENT).astype(np.float32)
    spread: FloatArray = around.repeat(side, axis=0).repeat(side, axis=1)[: blocks.shape[0], : blocks.shape[1]]
    return spread


def background_rise(image: FloatArray) -> tuple[FloatArray, float]:
    """How far a normalised image (H, W), averaged over about half a cell, rises above its surroundings.

    Returns:
        (ceil(H / 4), ceil(W / 4)) float32, in units of the normalised range, and the noise of that average (a robust standard
        deviation).
    """
    return _rise_of(_block_means(image, _BLOCK_PX))


def _rise_of(blocks: FloatArray) -> tuple[FloatArray, float]:
    rise = ndimage.uniform_filter(blocks, size=2, mode="nearest") - _surroundings(blocks, float(np.median(blocks)))
    return rise, 1.4826 * float(np.median(np.abs(rise - np.median(rise))))


def gated_windows(active: Mask, config: NetworkConfig, padded: tuple[int, int]) -> list[Window]:
    """Windows that cover the active tiles and cost least.

    Args:
        active: from `active_tiles`.
        config: architecture.
        padded: (rows, columns) of the padded image.

    Returns:
        Windows without overlapping regions; a single one where separate windows would cost as much as the whole field.
    """
    reach = Reach(config, padded)
    if active.mean() > MOST_ACTIVE:
        return [Window((Box(0, 0, *reach.shape_of(0)),))]
    groups = [
        (regions, reach.needs_of(union_of(regions), HALO_PX).image) for regions in _components(active, config, padded)
    ]
    whole = Box(0, 0, *padded).area * _WORTHWHILE
    if sum(image.area for _, image in groups) < 3 * whole:
        groups = _merged(groups, reach)
    if sum(image.area for _, image in groups) > whole:
        return [Window(tuple(region for regions, _ in groups for region in regions))]
    return [Window(tuple(regions), HALO_PX) for regions, _ in groups]


def tiled_windows(n_tiles: tuple[int, int], config: NetworkConfig, padded: tuple[int, int]) -> list[Window]:
    """Windows for a large image: as many rows and columns of tiles as asked for, without overlap in the output.

    Args:
        n_tiles: (rows, columns) of tiles.
        config: architecture.
        padded: (rows, columns) of the padded image.

    Raises:
        ConfigError: a number of tiles is below 1.
    """
    if min(n_tiles) < 1:
        raise ConfigError(f"n_tiles is {n_tiles}; both numbers must be at least 1")
    shape = Reach(config, padded).shape_of(0)
    rows, columns = (
        np.unique(np.linspace(0, side, count + 1).round().astype(int))
        for side, count in zip(shape, n_tiles, strict=True)
    )
    return [
        Window((Box(int(top), int(left), int(bottom), int(right)),))
        for top, bottom in itertools.pairwise(rows)
        for left, right in itertools.pairwise(columns)
    ]


def _block_means(image: FloatArray, side: int) -> FloatArray:
    """Means of whole blocks; the last rows and columns, if they fill no block, are repeated to fill one."""
    pad_rows, pad_columns = ((-length) % side for length in image.shape)
    if pad_rows or pad_columns:
        image = np.pad(image, ((0, pad_rows), (0, pad_columns)), mode="edge")
    rows, columns = image.shape
    means: FloatArray = image.reshape(rows // side, side, columns // side, side).mean(axis=(1, 3), dtype=np.float32)
    return means


def _components(active: Mask, config: NetworkConfig, padded: tuple[int, int]) -> list[list[Box]]:
    """Touching tiles together, each group as rectangles of the output maps."""
    labels, _ = ndimage.label(active, structure=np.ones((3, 3)))
    rows, columns = (side // grid for side, grid in zip(padded, config.grid, strict=True))
    high, wide = TILE_PX // config.grid[0], TILE_PX // config.grid[1]
    groups: list[list[Box]] = []
    for index, place in enumerate(ndimage.find_objects(labels), start=1):
        boxes = []
        for box in _rectangles(labels[place] == index):
            top, left = box.top + place[0].start, box.left + place[1].start
            bottom, right = box.bottom + place[0].start, box.right + place[1].start
            cut = Box(top * high, left * wide, min(bottom * high, rows), min(right * wide, columns))
            if cut.top < cut.bottom and cut.left < cut.right:
                boxes.append(cut)
        if boxes:
            groups.append(boxes)
    return groups


def _rectangles(mask: Mask) -> list[Box]:
    """A mask as rectangles without overlap: runs of each row, joined with equal runs of the rows below."""
    open_runs: dict[tuple[int, int], int] = {}
    boxes: list[Box] = []
    for row in range(len(mask) + 1):
        line = mask[row] if row < len(mask) else np.zeros(mask.shape[1], dtype=bool)
        edges = np.flatnonzero(np.diff(np.concatenate(([0], line.astype(np.int8), [0]))))
        runs = set(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
        ended = [run for run in open_runs if run not in runs]
        boxes.extend(Box(open_runs.pop(run), run[0], row, run[1]) for run in ended)
        for run in runs:
            open_runs.setdefault(run, row)
    return sorted(boxes)


def _merged(groups: Sequence[tuple[list[Box], Box]], reach: Reach) -> list[tuple[list[Box], Box]]:
    """Join windows while one that holds both costs no more than the two."""
    left = list(groups)
    done: list[tuple[list[Box], Box]] = []
    while left:
        regions, image = left.pop()
        others = np.asarray([other for _, other in left], dtype=np.int64).reshape(-1, 4)
        low, high = np.minimum(others[:, :2], image[:2]), np.maximum(others[:, 2:], image[2:])
        areas = np.prod(others[:, 2:] - others[:, :2], axis=1)
        partners = np.flatnonzero(np.prod(high - low, axis=1) <= areas + image.area)
        if not len(partners):
            done.append((regions, image))
            continue
        joined = [*regions, *left.pop(int(partners[0]))[0]]
        # It may now be worth joining with one that was left alone before.
        left.append((joined, reach.needs_of(union_of(joined), HALO_PX).image))
        left.extend(done)
        done = []
    return done
