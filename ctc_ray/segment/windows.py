"""Which part of a field each layer of the U-Net must see, so that a part of the output is exact.

A position of the output maps depends on the pixels within the network's receptive field and on no others. `Reach` follows that
dependence backwards, layer by layer, and gives for a rectangle of the maps the rectangle that every layer must supply. A field
can then be computed in windows (to skip empty background, or to bound memory) with the numbers of the whole field.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ctc_ray.segment.network import NetworkConfig


class Box(NamedTuple):
    """A rectangle of rows [top, bottom) and columns [left, right), in positions of one level's maps."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.bottom - self.top, self.right - self.left

    @property
    def area(self) -> int:
        """Number of positions."""
        return (self.bottom - self.top) * (self.right - self.left)

    def grown(self, margin: tuple[int, int], shape: tuple[int, int]) -> Box:
        """Larger by a margin (rows, columns) on every side, cut at the maps' shape."""
        return Box(
            max(0, self.top - margin[0]),
            max(0, self.left - margin[1]),
            min(shape[0], self.bottom + margin[0]),
            min(shape[1], self.right + margin[1]),
        )

    def coarser(self, factor: tuple[int, int]) -> Box:
        """The positions of the next coarser level that cover this rectangle."""
        return Box(
            self.top // factor[0], self.left // factor[1], -(-self.bottom // factor[0]), -(-self.right // factor[1])
        )

    def finer(self, factor: tuple[int, int]) -> Box:
        """The positions of the next finer level that this rectangle covers."""
        return Box(self.top * factor[0], self.left * factor[1], self.bottom * factor[0], self.right * factor[1])

    def within(self, outer: Box) -> Box:
        """The same rectangle, counted from the corner of another one."""
        return Box(self.top - outer.top, self.left - outer.left, self.bottom - outer.top, self.right - outer.left)

    def intersection(self, other: Box) -> Box:
        """What both have in common."""
        return Box(
            max(self.top, other.top),
            max(self.left, other.left),
            min(self.bottom, other.bottom),
            min(self.right, other.right),
        )

    def union(self, other: Box) -> Box:
        """The smallest rectangle that holds both."""
        return Box(
            min(self.top, other.top),
            min(self.left, other.left),
            max(self.bottom, other.bottom),
            max(self.right, other.right),
        )

    @property
    def slices(self) -> tuple[slice, slice]:
        """For indexing maps (..., H, W) as `maps[(..., *box.slices)]`."""
        return slice(self.top, self.bottom), slice(self.left, self.right)


@dataclass(frozen=True)
class Needs:
    """What a rectangle of the output maps needs from each part of the network.

    Attributes:
        image: pixels of the padded image, aligned to `NetworkConfig.multiple`.
        inputs: for each level of the decoder, finest first, the positions of its first convolution's input.
        outputs: for each level of the decoder, finest first, the positions of its last convolution's output.
        coarsest: positions of the bottom's output.
    """

    image: Box
    inputs: tuple[Box, ...]
    outputs: tuple[Box, ...]
    coarsest: Box


class Reach:
    """Follows the receptive field of one network configuration on one padded image size."""

    def __init__(self, config: NetworkConfig, padded: tuple[int, int]) -> None:
        """Prepare.

        Args:
            config: architecture.
            padded: (rows, columns) of the padded image, multiples of `config.multiple`.
        """
        self._config = config
        self._padded = padded
        radius = config.unet_kernel_size[0] // 2, config.unet_kernel_size[1] // 2
        self._features = radius if config.net_conv_after_unet > 0 else (0, 0)
        per_depth = config.unet_n_conv_per_depth
        self._block = radius[0] * per_depth, radius[1] * per_depth

    def shape_of(self, level: int) -> tuple[int, int]:
        """Rows and columns of the maps of a U-Net level; level 0 has the output's grid."""
        config = self._config
        rows, columns = (side // grid for side, grid in zip(self._padded, config.grid, strict=True))
        return rows // config.unet_pool[0] ** level, columns // config.unet_pool[1] ** level

    def needs_of(self, region: Box, halo_px: int | None = None) -> Needs:
        """What a rectangle of the output maps needs.

        Args:
            region: positions of the grid.
            halo_px: look no further than this around the region (rounded up to whole blocks of pixels); None for
                everything that has an influence.
        """
        needs = self._exact_needs(region)
        if halo_px is None:
            return needs
        near = region.finer(self._config.grid).grown((halo_px, halo_px), self._padded)
        image = needs.image.intersection(near.coarser(self._config.multiple).finer(self._config.multiple))
        extents = self.extents_of(image)
        return Needs(
            image,
            tuple(box.intersection(extent) for box, extent in zip(needs.inputs, extents[:-1], strict=True)),
            tuple(box.intersection(extent) for box, extent in zip(needs.outputs, extents[:-1], strict=True)),
            needs.coarsest.intersection(extents[-1]),
        )

    def extents_of(self, image: Box) -> list[Box]:
        """A rectangle of whole blocks of pixels, in positions of each U-Net level and of the bottom."""
        (rows, columns), pool = self._config.grid, self._config.unet_pool
        extents = [Box(image.top // rows, image.left // columns, image.bottom // rows, image.right // columns)]
        for _ in range(self._config.unet_n_depth):
            extents.append(extents[-1].coarser(pool))
        return extents

    def _exact_needs(self, region: Box) -> Needs:
        config, depth = self._config, self._config.unet_n_depth
        inputs: list[Box] = []
        outputs: list[Box] = []
        wanted = region.grown(self._features, self.shape_of(0))
        for level in range(depth):
            outputs.append(wanted)
            inputs.append(wanted.grown(self._block, self.shape_of(level)))
            wanted = inputs[-1].coarser(config.unet_pool)
        coarsest = wanted
        wanted = coarsest.grown(self._block, self.shape_of(depth))
        for level in reversed(range(depth)):
            wanted = wanted.finer(config.unet_pool).union(inputs[level]).grown(self._block, self.shape_of(level))
        return Needs(self._pixels(wanted), tuple(inputs), tuple(outputs), coarsest)

    def _pixels(self, wanted: Box) -> Box:
        """From positions at the top of the U-Net through the stem to whole blocks of pixels."""
        config, shape = self._config, self.shape_of(0)
        for pool in reversed(config.stem_pools):
            shape = shape[0] * pool[0], shape[1] * pool[1]
            wanted = wanted.finer(pool).grown(self._block, shape)
        return wanted.coarser(config.multiple).finer(config.multiple)


def union_of(boxes: Sequence[Box]) -> Box:
    """The smallest rectangle that holds all of at least one."""
    union = boxes[0]
    for box in boxes[1:]:
        union = union.union(box)
    return union
