"""The StarDist U-Net in torch, for every 2D U-Net configuration that the stock package can write.

The layer names are those of the Keras model, so that a weight file maps onto the module by name alone. Only the stem
(the convolutions that bring the image to the grid) is renamed: Keras numbers it by a counter of the process that built
the model (`conv2d_1` in one file is `conv2d` in the next), here it is `stem_0`, `stem_1`, ... in the order of layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ctc_ray.errors import WeightsError

MAX_FILTERS = 8192
"""A level of more filters is refused: its layers would not fit in memory. The widest published level has 256."""
MAX_SIDE = 64
"""Largest grid, pool or kernel side, in pixels."""
MAX_EXPANSION = 16

_READABLE: tuple[tuple[Any, ...], ...] = (
    ("n_dim", 2),
    ("axes", "YXC", "YX"),
    ("backbone", "unet"),
    ("n_classes", None),
    ("unet_batch_norm", False),
)
"""Keys of a configuration and the values that this network can have."""
_RANGES = {
    "n_channel_in": (1, 1024),
    "n_rays": (3, 1024),
    "unet_n_depth": (0, 8),
    "unet_n_filter_base": (1, MAX_FILTERS),
    "unet_n_conv_per_depth": (1, 16),
    "net_conv_after_unet": (0, MAX_FILTERS),
}
_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "elu": nn.ELU, "linear": nn.Identity}


@dataclass(frozen=True)
class NetworkConfig:
    """The part of a StarDist `config.json` that decides the network.

    Defaults are those of `2D_versatile_fluo` (1,425,185 parameters).

    Source: stardist `models/model2d.py`, `Config2D`.
    """

    n_channel_in: int = 1
    """Image channels."""
    n_rays: int = 32
    """Rays of a polygon."""
    grid: tuple[int, int] = (2, 2)
    """Pixels (row, column) between two positions of the output maps; powers of two."""
    unet_n_depth: int = 3
    """Levels below the top one."""
    unet_kernel_size: tuple[int, int] = (3, 3)
    """Side of the convolutions, odd."""
    unet_n_filter_base: int = 32
    """Filters of the top level."""
    unet_n_conv_per_depth: int = 2
    """Convolutions of each level."""
    unet_pool: tuple[int, int] = (2, 2)
    """Pooling from level to level."""
    unet_activation: str = "relu"
    """Activation after each convolution."""
    unet_last_activation: str = "relu"
    """Activation after the last convolution of the U-Net."""
    unet_expansion: float = 2
    """Growth of the number of filters from level to level."""
    unet_prefix: str = ""
    """Text before the names of the U-Net's layers."""
    net_conv_after_unet: int = 128
    """Filters of the layer `features`; 0 leaves the layer out."""

    @classmethod
    def from_stardist(cls, config: Mapping[str, Any]) -> NetworkConfig:
        """Read the values of a StarDist `config.json`.

        Raises:
            WeightsError: the configuration describes a network that is not a plain 2D U-Net, or a value is impossible.

        Source: stardist `models/model2d.py`, `Config2D`; keys that are absent take its defaults. `unet_dropout` and the
        `train_*` keys change nothing at inference and are not read.
        """
        for key, *allowed in _READABLE:
            value = config.get(key, allowed[0])
            if value not in allowed:
                raise WeightsError(
                    f"StarDist config has {key}={value!r}; this network reads {key}={allowed[0]!r} only. "
                    "Export a single-class 2D U-Net model without batch normalisation."
                )
        values = {key: config[key] for key in cls.__dataclass_fields__ if key in config}
        if values.get("unet_last_activation", "") is None:  # as in CSBDeep's `unet_block`
            values["unet_last_activation"] = values.get("unet_activation", cls.unet_activation)
        # The stock class's own default, unlike ours, which is that of 2D_versatile_fluo.
        values.setdefault("grid", (1, 1))
        for key in ("grid", "unet_kernel_size", "unet_pool"):
            if isinstance(values.get(key), list):
                values[key] = tuple(values[key])
        built = cls(**values)
        built._check()
        return built

    def to_stardist(self) -> dict[str, Any]:
        """The configuration as a dictionary that `from_stardist` reads back (and the stock package accepts)."""
        fixed = {"n_dim": 2, "axes": "YXC", "n_channel_out": 1 + self.n_rays, "backbone": "unet", "n_classes": None}
        own = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return fixed | own | {"unet_batch_norm": False, "unet_dropout": 0.0}

    @property
    def multiple(self) -> tuple[int, int]:
        """What both sides (rows, columns) of the network's input must be a multiple of, in pixels."""
        (pool_row, pool_column), (grid_row, grid_column) = self.unet_pool, self.grid
        return pool_row**self.unet_n_depth * grid_row, pool_column**self.unet_n_depth * grid_column

    @property
    def stem_pools(self) -> list[tuple[int, int]]:
        """Pooling factors (rows, columns) of the stem's blocks, first block first; their product is the grid."""
        pools: list[tuple[int, int]] = []
        rows, columns = 1, 1
        while (rows, columns) != self.grid:
            pools.append((1 + (self.grid[0] > rows), 1 + (self.grid[1] > columns)))
            rows, columns = rows * pools[-1][0], columns * pools[-1][1]
        return pools

    def _check(self) -> None:
        for key in ("grid", "unet_kernel_size", "unet_pool"):
            sides = getattr(self, key)
            if not isinstance(sides, tuple) or len(sides) != 2 or not all(_whole(side, 1, MAX_SIDE) for side in sides):
                raise WeightsError(
                    f"StarDist config has {key}={sides!r}; two whole numbers from 1 to {MAX_SIDE} are needed"
                )
        for key, (least, most) in _RANGES.items():
            if not _whole(getattr(self, key), least, most):
                raise WeightsError(
                    f"StarDist config has {key}={getattr(self, key)!r}; a whole number from {least} to {most} is needed"
                )
        for key in ("unet_activation", "unet_last_activation"):
            if getattr(self, key) not in list(_ACTIVATIONS):  # a list: what JSON holds need not have a hash
                raise WeightsError(
                    f"StarDist config has {key}={getattr(self, key)!r}; known activations: {', '.join(_ACTIVATIONS)}"
                )
        if not isinstance(self.unet_prefix, str):
            raise WeightsError(f"StarDist config has unet_prefix={self.unet_prefix!r}; a text is needed")
        if any(side & (side - 1) for side in self.grid):
            raise WeightsError(f"StarDist config has grid={self.grid}; both sides must be powers of two")
        if any(side % 2 == 0 for side in self.unet_kernel_size):
            raise WeightsError(f"StarDist config has unet_kernel_size={self.unet_kernel_size}; both sides must be odd")
        self._check_filters()

    def _check_filters(self) -> None:
        expansion = self.unet_expansion
        if isinstance(expansion, bool) or not isinstance(expansion, int | float) or not 0 < expansion <= MAX_EXPANSION:
            raise WeightsError(
                f"StarDist config has unet_expansion={expansion!r}; a number above 0 and up to {MAX_EXPANSION} is needed"
            )
        fewest, most = (int(pick(1.0, expansion**self.unet_n_depth) * self.unet_n_filter_base) for pick in (min, max))
        if fewest < 1 or most > MAX_FILTERS:
            raise WeightsError(
                f"StarDist config has levels of {fewest} to {most} filters (unet_n_filter_base="
                f"{self.unet_n_filter_base}, unet_expansion={expansion}, unet_n_depth={self.unet_n_depth}); "
                f"1 to {MAX_FILTERS} can be built"
            )


def _whole(value: object, least: int, most: int) -> bool:
    """Whether a value from JSON is a whole number in a range; True and 2.0 are none."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


class StarDistNetwork(nn.Module):
    """Image to object probability and star distances, at grid resolution.

    Source: stardist `models/model2d.py` (`StarDist2D._build`) and CSBDeep `internals/blocks.py` (`unet_block`). All
    convolutions have a bias, stride 1 and zero padding; upsampling is nearest; upsampled maps come before the skip.
    """

    def __init__(self, config: NetworkConfig) -> None:
        """Build the layers with Keras' initial distribution (Glorot uniform, zero bias)."""
        super().__init__()
        self.config = config
        self.convolutions = nn.ModuleDict()
        self.activation = _ACTIVATIONS[config.unet_activation]()
        self.last_activation = _ACTIVATIONS[config.unet_last_activation]()
        channels = self._build_stem()
        channels = self._build_unet(channels)
        if config.net_conv_after_unet > 0:
            channels = self._add("features", channels, config.net_conv_after_unet)
        self._add("prob", channels, 1, kernel=(1, 1))
        self._add("dist", channels, config.n_rays, kernel=(1, 1))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the network.

        Args:
            images: (N, C, H, W) normalised images; H and W multiples of `config.multiple`.

        Returns:
            Probability *logits* (N, 1, H/grid, W/grid) and distances in pixels (N, n_rays, H/grid, W/grid), float32
            whatever the precision of the other layers.
        """
        features = self.features(images)
        # The heads run in float32: a distance of 20 px has steps of 0.125 px in bfloat16.
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            return self.convolutions["prob"](features), self.convolutions["dist"](features)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """What both heads read: (N, net_conv_after_unet, H/grid, W/grid)."""
        config = self.config
        layer, index = images, 0
        for pool in config.stem_pools:
            for _ in range(config.unet_n_conv_per_depth):
                layer = self._activated(f"stem_{index}", layer)
                index += 1
            layer = nn.functional.max_pool2d(layer, pool)
        layer = self._unet(layer)
        return self._activated("features", layer) if config.net_conv_after_unet > 0 else layer

    def _unet(self, layer: torch.Tensor) -> torch.Tensor:
        config, name = self.config, self._name
        per_depth = config.unet_n_conv_per_depth
        skips: list[torch.Tensor] = []
        for depth in range(config.unet_n_depth):
            for conv in range(per_depth):
                layer = self._activated(name(f"down_level_{depth}_no_{conv}"), layer)
            skips.append(layer)
            layer = nn.functional.max_pool2d(layer, config.unet_pool)
        for conv in [*range(per_depth - 1), per_depth]:
            layer = self._activated(name(f"middle_{conv}"), layer)
        for depth in reversed(range(config.unet_n_depth)):
            upsampled = nn.functional.interpolate(
                layer, scale_factor=tuple(map(float, config.unet_pool)), mode="nearest"
            )
            layer = torch.cat([upsampled, skips[depth]], dim=1)
            for conv in [*range(per_depth - 1), per_depth]:
                last = depth == 0 and conv == per_depth
                activation = self.last_activation if last else self.activation
                layer = activation(self.convolutions[name(f"up_level_{depth}_no_{conv}")](layer))
        return layer

    def _activated(self, name: str, layer: torch.Tensor) -> torch.Tensor:
        activated: torch.Tensor = self.activation(self.convolutions[name](layer))
        return activated

    def _name(self, name: str) -> str:
        return self.config.unet_prefix + name

    def _build_stem(self) -> int:
        config, channels, index = self.config, self.config.n_channel_in, 0
        for _ in config.stem_pools:
            for _ in range(config.unet_n_conv_per_depth):
                channels = self._add(f"stem_{index}", channels, config.unet_n_filter_base)
                index += 1
        return channels

    def _build_unet(self, channels: int) -> int:
        config, name, filters = self.config, self._name, self._filters
        per_depth = config.unet_n_conv_per_depth
        skips: list[int] = []
        for depth in range(config.unet_n_depth):
            for conv in range(per_depth):
                channels = self._add(name(f"down_level_{depth}_no_{conv}"), channels, filters(depth))
            skips.append(channels)
        for conv in range(per_depth - 1):
            channels = self._add(name(f"middle_{conv}"), channels, filters(config.unet_n_depth))
        channels = self._add(name(f"middle_{per_depth}"), channels, filters(max(0, config.unet_n_depth - 1)))
        for depth in reversed(range(config.unet_n_depth)):
            channels += skips[depth]
            for conv in range(per_depth - 1):
                channels = self._add(name(f"up_level_{depth}_no_{conv}"), channels, filters(depth))
            channels = self._add(name(f"up_level_{depth}_no_{per_depth}"), channels, filters(max(0, depth - 1)))
        return channels

    def _filters(self, depth: int) -> int:
        return int(self.config.unet_n_filter_base * self.config.unet_expansion**depth)

    def _add(self, name: str, channels_in: int, channels_out: int, kernel: tuple[int, int] | None = None) -> int:
        kernel = kernel or self.config.unet_kernel_size
        convolution = nn.Conv2d(channels_in, channels_out, kernel, padding=(kernel[0] // 2, kernel[1] // 2))
        nn.init.xavier_uniform_(convolution.weight)
        nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]  # the bias is there: Conv2d's default
        self.convolutions[name] = convolution
        return channels_out


def num_parameters(network: nn.Module) -> int:
    """Number of trained values of a network."""
    return sum(math.prod(parameter.shape) for parameter in network.parameters())
