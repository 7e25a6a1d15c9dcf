"""The StarDist network at work: the maps of a field, computed in windows and strips that stay in the processor's cache.

The numbers are those of `StarDistNetwork` (to the rounding of a sum's order); what differs is the order of the work:

- a convolution, its bias and its activation are one pass (`convolution.py`);
- the wide layers at the top of the U-Net run in strips of rows, so that a map of 180 MB is never written and read again;
- the layers after the last upsampling run only where the caller asks for output, the layers before them only where those
  need it (`windows.py`), and distances only at positions that may be objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ctc_ray.segment.convolution import FrozenConvolution, FrozenUpConvolution
from ctc_ray.segment.network import StarDistNetwork
from ctc_ray.segment.windows import Box, Needs, Reach, union_of

FloatArray = npt.NDArray[np.float32]
STRIP_BYTES = 10_000_000
"""Size of the widest map of a strip on a CPU: a few strips fit into the last cache, and a strip's borders stay cheap."""


@dataclass(frozen=True)
class Window:
    """A part of a field that is computed in one go.

    Attributes:
        regions: rectangles of the output maps that are wanted; they do not overlap.
        halo_px: pixels around the regions that are looked at; None for all that have an influence, and then the numbers
            are those of the whole field.
    """

    regions: tuple[Box, ...]
    halo_px: int | None = None


@dataclass(frozen=True)
class Peaks:
    """Positions of the output maps whose probability is above a cut, in row-major order.

    Attributes:
        positions: (M, 2) int64, (row, column) on the grid.
        prob: (M,) float32, 0 to 1.
        dist: (M, n_rays) float32, pixels, not clipped.
    """

    positions: npt.NDArray[np.int64]
    prob: FloatArray
    dist: FloatArray


@dataclass(frozen=True)
class _Coarse:
    """What a decoder level starts from: maps of the next coarser level over `held`, and the skip connection over `extent`."""

    maps: torch.Tensor
    held: Box
    skip: torch.Tensor
    extent: Box


class FieldNetwork:
    """A network frozen on a device, for fields of any size."""

    def __init__(self, network: StarDistNetwork, *, dtype: torch.dtype, device: torch.device) -> None:
        """Freeze.

        Args:
            network: trained network, float32.
            dtype: of all layers but the two heads, which stay in float32: a distance of 20 px has steps of 0.125 px in
                bfloat16.
            device: where it runs.
        """
        self.config = network.config
        self._dtype, self._device = dtype, device
        self._strips = device.type == "cpu"
        last = self._name(f"up_level_0_no_{self.config.unet_n_conv_per_depth}")
        self._layers: dict[str, FrozenConvolution] = {}
        for name, layer in network.convolutions.items():
            if isinstance(layer, nn.Conv2d) and name not in ("prob", "dist"):
                activation = network.last_activation if name == last else network.activation
                self._layers[name] = FrozenConvolution(layer, activation, dtype=dtype, device=device)
        self._joins = self._split_joins(network) if device.type == "cpu" else {}
        heads = network.convolutions["prob"], network.convolutions["dist"]
        (self._prob_weight, self._prob_bias), (self._dist_weight, self._dist_bias) = (
            _head(head, device) for head in heads
        )

    def peaks(self, image: FloatArray, windows: Sequence[Window], *, prob_thresh: float) -> Peaks:
        """Find the positions above a probability.

        Args:
            image: (C, H, W) normalised and padded; sides are multiples of `config.multiple`.
            windows: what is computed.
            prob_thresh: cut; only strictly larger probabilities count.

        Returns:
            The positions inside the windows' regions.
        """
        found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        with torch.inference_mode():
            for region, features, prob in self._regions(image, windows):
                rows, columns = torch.nonzero(prob > prob_thresh, as_tuple=True)
                if len(rows):
                    dist = features[rows, columns].float() @ self._dist_weight + self._dist_bias
                    positions = torch.stack([rows + region.top, columns + region.left], dim=1)
                    found.append((positions, prob[rows, columns], dist))
        if not found:
            empty = np.zeros((0, 2), dtype=np.int64)
            return Peaks(empty, np.zeros(0, dtype=np.float32), np.zeros((0, self.config.n_rays), dtype=np.float32))
        points, probs, dists = (torch.cat(part).cpu().numpy() for part in zip(*found, strict=True))
        order = np.lexsort((points[:, 1], points[:, 0]))
        return Peaks(points[order], probs[order], dists[order])

    def maps(self, image: FloatArray, windows: Sequence[Window]) -> tuple[FloatArray, FloatArray]:
        """Probability and distances everywhere.

        Args:
            image: as for `peaks`.
            windows: what is computed; zeros elsewhere.

        Returns:
            prob (H', W') float32, 0 to 1, and dist (H', W', n_rays) float32, pixels, of the padded image.
        """
        shape = Reach(self.config, (image.shape[1], image.shape[2])).shape_of(0)
        prob_map = np.zeros(shape, dtype=np.float32)
        dist_map = np.zeros((*shape, self.config.n_rays), dtype=np.float32)
        with torch.inference_mode():
            for region, features, prob in self._regions(image, windows):
                prob_map[region.slices] = prob.cpu().numpy()
                dist_map[region.slices] = (features.float() @ self._dist_weight + self._dist_bias).cpu().numpy()
        return prob_map, dist_map

    def whole(self, padded: tuple[int, int]) -> list[Window]:
        """One window over all of a padded image, in strips of rows."""
        rows, columns = Reach(self.config, padded).shape_of(0)
        return [Window((Box(0, 0, rows, columns),))]

    def _row_strips(self, box: Box, channels: int) -> list[Box]:
        """A rectangle of the output maps in pieces of rows whose maps of so many channels fit the cache."""
        rows = self._strip_rows((box.right - box.left) * channels)
        return [Box(top, box.left, min(top + rows, box.bottom), box.right) for top in range(box.top, box.bottom, rows)]

    def _strip_rows(self, values_per_row: int) -> int:
        if not self._strips:
            return 1 << 30
        bytes_per_row = values_per_row * torch.finfo(self._dtype).bits // 8
        return max(8, STRIP_BYTES // max(1, bytes_per_row))

    def _regions(
        self, image: FloatArray, windows: Sequence[Window]
    ) -> Iterator[tuple[Box, torch.Tensor, torch.Tensor]]:
        """Features (H, W, C) and probability (H, W) of each wanted region, one at a time."""
        pixels = torch.from_numpy(image)[None].to(self._device, self._dtype)
        reach = Reach(self.config, (image.shape[1], image.shape[2]))
        for window in windows:
            needs = reach.needs_of(union_of(window.regions), window.halo_px)
            maps = pixels[(..., *needs.image.slices)].contiguous(memory_format=torch.channels_last)
            fine = self._coarse_part(maps, needs, reach.extents_of(needs.image))
            for wanted in window.regions:
                for strip in self._row_strips(wanted, 2 * self.config.unet_n_filter_base):
                    needs = reach.needs_of(strip)
                    up, held = self._top(fine, needs, reach.shape_of(0))
                    for region in self._row_strips(strip, self.config.net_conv_after_unet or up.shape[1]):
                        features = self._features(
                            up, held, reach.needs_of(region).outputs[0], region, reach.shape_of(0)
                        )
                        yield region, features, torch.sigmoid(self._logits(features))

    def _coarse_part(self, maps: torch.Tensor, needs: Needs, extents: Sequence[Box]) -> _Coarse:
        """All layers but those of the finest decoder level."""
        config = self.config
        index = 0
        for pool in config.stem_pools:
            names = [f"stem_{index + conv}" for conv in range(config.unet_n_conv_per_depth)]
            _, maps = self._block(names, maps, pool, keep=False)
            index += len(names)
        skips: list[torch.Tensor] = []
        for level in range(config.unet_n_depth):
            names = [self._name(f"down_level_{level}_no_{conv}") for conv in range(config.unet_n_conv_per_depth)]
            skip, maps = self._block(names, maps, config.unet_pool, keep=True)
            skips.append(skip)
        for conv in self._up_convs():
            maps = self._layers[self._name(f"middle_{conv}")](maps)
        held = extents[-1]
        for level in range(config.unet_n_depth - 1, 0, -1):
            box = needs.inputs[level]
            names = [self._name(f"up_level_{level}_no_{conv}") for conv in self._up_convs()]
            maps = self._joined(names[0], _Coarse(maps, held, skips[level], extents[level]), box)
            for name in names[1:]:
                maps = self._layers[name](maps)
            held = needs.outputs[level]
            maps = maps[(..., *held.within(box).slices)]
        return _Coarse(maps, held, skips[0], extents[0])

    def _block(
        self, names: Sequence[str], maps: torch.Tensor, pool: tuple[int, int], *, keep: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Convolutions, then pooling: what came before the pooling (empty unless `keep`) and what came after."""
        height, width = maps.shape[2:]
        channels = max(self._layers[name].channels_out for name in names)
        rows = self._strip_rows(width * channels) // pool[0] * pool[0]
        margin = len(names) * (self.config.unet_kernel_size[0] // 2)
        pooled = self._empty(channels, height // pool[0], width // pool[1])
        before = self._empty(channels, height if keep else 0, width)
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            box = Box(top, 0, bottom, width)
            around = box.grown((margin, 0), (height, width))
            strip, around = self._convolved(names, maps[(..., *around.slices)], around, height)
            strip = strip[(..., *box.within(around).slices)]
            if keep:
                before[:, :, top:bottom] = strip
            pooled[:, :, top // pool[0] : bottom // pool[0]] = _max_pooled(strip, pool)
        return before, pooled

    def _empty(self, channels: int, height: int, width: int) -> torch.Tensor:
        shape = (1, channels, height, width)
        return torch.empty(shape, dtype=self._dtype, device=self._device, memory_format=torch.channels_last)

    def _convolved(self, names: Sequence[str], maps: torch.Tensor, box: Box, height: int) -> tuple[torch.Tensor, Box]:
        """Convolutions one after another; rows that saw a cut instead of their neighbours are dropped as they arise."""
        for name in names:
            maps, box = self._whole_rows(self._layers[name](maps), box, height)
        return maps, box

    def _whole_rows(self, maps: torch.Tensor, box: Box, height: int) -> tuple[torch.Tensor, Box]:
        """What one convolution gave, without the rows beside a cut; the first and last row of the field are no cut."""
        radius = self.config.unet_kernel_size[0] // 2
        top = box.top + (radius if box.top > 0 else 0)
        bottom = box.bottom - (radius if box.bottom < height else 0)
        inner = Box(top, box.left, bottom, box.right)
        return maps[(..., *inner.within(box).slices)], inner

    def _joined(self, name: str, coarse: _Coarse, box: Box) -> torch.Tensor:
        """Upsampled maps beside the skip connection, over a rectangle of this level, through the level's first convolution."""
        pool = self.config.unet_pool
        source = box.coarser(pool)
        small = coarse.maps[(..., *source.within(coarse.held).slices)]
        skip = coarse.skip[(..., *box.within(coarse.extent).slices)]
        inside = box.within(source.finer(pool))
        if name in self._joins:
            return self._joins[name](small, skip, (inside.top, inside.left))
        upsampled = nn.functional.interpolate(small, scale_factor=(float(pool[0]), float(pool[1])), mode="nearest")
        return self._layers[name](torch.cat([upsampled[(..., *inside.slices)], skip], dim=1))

    def _split_joins(self, network: StarDistNetwork) -> dict[str, FrozenUpConvolution]:
        """First convolutions of the decoder levels that can do without upsampling and concatenation."""
        config, joins = self.config, {}
        for level in range(config.unet_n_depth):
            name = self._name(f"up_level_{level}_no_{self._up_convs()[0]}")
            layer = network.convolutions[name]
            below = self._name(
                f"middle_{config.unet_n_conv_per_depth}"
                if level == config.unet_n_depth - 1
                else f"up_level_{level + 1}_no_{config.unet_n_conv_per_depth}"
            )
            last = level == 0 and config.unet_n_conv_per_depth == 1
            activation = network.last_activation if last else network.activation
            if isinstance(layer, nn.Conv2d) and FrozenUpConvolution.splits(
                layer, activation, config.unet_pool, self._dtype
            ):
                joins[name] = FrozenUpConvolution(
                    layer, activation, channels_up=self._layers[below].channels_out, dtype=self._dtype
                )
        return joins

    def _top(self, fine: _Coarse, needs: Needs, shape: tuple[int, int]) -> tuple[torch.Tensor, Box]:
        """The finest decoder level over one strip, and the rectangle that it covers."""
        names = [self._name(f"up_level_0_no_{conv}") for conv in self._up_convs()]
        joined = self._joined(names[0], fine, needs.inputs[0])
        maps, box = self._whole_rows(joined, needs.inputs[0], shape[0])
        return self._convolved(names[1:], maps, box, shape[0])

    def _features(self, up: torch.Tensor, held: Box, needed: Box, region: Box, shape: tuple[int, int]) -> torch.Tensor:
        """What both heads read, over one region: (H, W, C)."""
        maps, box = up[(..., *needed.within(held).slices)], needed
        if self.config.net_conv_after_unet > 0:
            maps, box = self._convolved(["features"], maps, box, shape[0])
        return maps[(..., *region.within(box).slices)][0].permute(1, 2, 0)

    def _logits(self, features: torch.Tensor) -> torch.Tensor:
        """Probability logits (H, W), float32."""
        height, width, channels = features.shape
        flat = features.reshape(height * width, channels).float()
        return (torch.mv(flat, self._prob_weight[:, 0]) + self._prob_bias).reshape(height, width)

    def _up_convs(self) -> list[int]:
        """Numbers of the convolutions after the pooling turns back; Keras' names leave one out."""
        per_depth = self.config.unet_n_conv_per_depth
        return [*range(per_depth - 1), per_depth]

    def _name(self, name: str) -> str:
        return self.config.unet_prefix + name


def _head(head: nn.Module, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A convolution of one pixel as a matrix (C, C') and a bias (C',), float32."""
    weight, bias = head.get_parameter("weight"), head.get_parameter("bias")
    return weight.detach()[:, :, 0, 0].T.float().contiguous().to(device), bias.detach().float().to(device)


def _max_pooled(maps: torch.Tensor, pool: tuple[int, int]) -> torch.Tensor:
    """Maxima of whole blocks of pixels; several times quicker than `max_pool2d`, which also finds where they were."""
    return _max_over(_max_over(maps, 2, pool[0]), 3, pool[1])


def _max_over(maps: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    index: list[slice] = [slice(None)] * maps.ndim
    parts = []
    for start in range(size):
        index[dim] = slice(start, None, size)
        parts.append(maps[tuple(index)])
    largest = parts[0]
    for part in parts[1:]:
        largest = torch.maximum(largest, part)
    return largest
