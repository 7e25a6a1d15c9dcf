"""`StarDist`: weights, network and post-processing as one object."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from ctc_ray.errors import ConfigError, SchemaError
from ctc_ray.segment.gating import active_tiles, gated_windows, tiled_windows
from ctc_ray.segment.inference import FieldNetwork, Window
from ctc_ray.segment.instances import (
    DEFAULT_MAX_CANDIDATES,
    Candidates,
    FloatArray,
    Instances,
    candidates_at,
    instances_from_candidates,
    normalize_percentile,
    pad_to_multiple,
)
from ctc_ray.segment.weights import Thresholds, Weights, load_weights

Precision = Literal["auto", "fp32", "bf16"]


def native_bf16(device: torch.device | None = None) -> bool:
    """Whether the device multiplies bfloat16 in hardware (avx512_bf16 or amx_bf16 on a CPU, CUDA otherwise)."""
    if device is not None and device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux: no flags to read, so nothing is assumed
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def resolve_precision(precision: str, device: torch.device | None = None) -> Literal["fp32", "bf16"]:
    """Turn `auto` into what this device has natively; pass the others through.

    Raises:
        ConfigError: the precision is unknown.
    """
    if precision == "auto":
        return "bf16" if native_bf16(device) else "fp32"
    if precision == "bf16":
        return "bf16"
    if precision == "fp32":
        return "fp32"
    raise ConfigError(f"precision is {precision!r}; known: {', '.join(get_args(Precision))}")


class StarDist:
    """Finds star-convex objects in an image.

    Attributes:
        weights: network, thresholds and fingerprint.
        precision: `fp32` or `bf16`, resolved.
        device: where the network runs.
    """

    def __init__(
        self,
        weights: Weights,
        *,
        precision: str = "auto",
        device: str | torch.device | None = None,
        percentiles: tuple[float, float] = (1.0, 99.8),
        skip_background: bool = False,
    ) -> None:
        """Put the network on a device.

        Args:
            weights: from `load_weights`.
            precision: `auto`, `fp32` or `bf16`.
            device: default `cuda` where there is one, else `cpu`.
            percentiles: grey levels of an image that become 0 and 1.
            skip_background: whether parts of an image that are empty are left out (`gating.py`): quicker on sparse
                fields; an object that hardly rises above the noise may be lost.

        Raises:
            ConfigError: the precision is unknown.
        """
        self._percentiles = percentiles
        self._skip_background = skip_background
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.precision = resolve_precision(precision, self.device)
        self.weights = weights
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        self._network = FieldNetwork(weights.network.eval(), dtype=dtype, device=self.device)

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str] | None = None,
        *,
        precision: str = "auto",
        device: str | torch.device | None = None,
        percentiles: tuple[float, float] = (1.0, 99.8),
        skip_background: bool = False,
    ) -> StarDist:
        """Load a model.

        Args:
            source: None for the shipped default, a weight folder (Keras or safetensors), or a published name.
            precision: `auto` (bf16 where the processor has it natively, else fp32), `fp32` or `bf16`.
            device: default `cuda` where there is one, else `cpu`.
            percentiles: grey levels of an image that become 0 and 1.
            skip_background: whether empty parts of an image are left out, see above.

        Raises:
            WeightsError: the weights cannot be found or read.
            ConfigError: the precision is unknown.
        """
        return cls(
            load_weights(source),
            precision=precision,
            device=device,
            percentiles=percentiles,
            skip_background=skip_background,
        )

    @property
    def thresholds(self) -> Thresholds:
        """Where predictions are cut by default."""
        return self.weights.thresholds

    def maps(self, image: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
        """Object probability and star distances, as the stock `predict` gives them.

        Args:
            image: (H, W), or (H, W, C) for a network of C channels; any real dtype, normalised inside (1-99.8 %).

        Returns:
            prob (H', W') float32, 0 to 1, and dist (H', W', n_rays) float32, pixels, at least 0.001. Sides are those
            of the padded image over the grid, less the padding over the grid (both rounded down).

        Raises:
            SchemaError: the image has another number of axes or channels, or no pixels.
        """
        padded, shape = self._padded(image)
        prob, dist = self._network.maps(padded, self._network.whole((padded.shape[1], padded.shape[2])))
        config = self._network.config
        rows, columns = (
            size - ((-side) % step) // grid
            for size, side, step, grid in zip(prob.shape, shape, config.multiple, config.grid, strict=True)
        )
        return prob[:rows, :columns], np.maximum(np.float32(1e-3), dist[:rows, :columns])

    def candidates(
        self,
        image: npt.ArrayLike,
        *,
        prob_thresh: float | None = None,
        max_candidates: int = DEFAULT_MAX_CANDIDATES,
        n_tiles: tuple[int, int] | None = None,
    ) -> Candidates:
        """The network's part of `predict`: positions above the probability threshold, not yet suppressed.

        Args:
            image: as for `maps`.
            prob_thresh: default from the weights.
            max_candidates: cap, see `candidates_at`.
            n_tiles: as for `predict`.

        Raises:
            SchemaError: as for `maps`.
        """
        padded, shape = self._padded(image)
        padded_shape = padded.shape[1], padded.shape[2]
        network = self._network
        found = network.peaks(
            padded,
            self._windows(padded, n_tiles),
            prob_thresh=self.thresholds.prob if prob_thresh is None else prob_thresh,
        )
        grid = network.config.grid
        return candidates_at(
            found.positions,
            found.prob,
            found.dist,
            map_shape=(padded_shape[0] // grid[0], padded_shape[1] // grid[1]),
            shape=shape,
            grid=grid,
            max_candidates=max_candidates,
        )

    def predict(
        self,
        image: npt.ArrayLike,
        *,
        prob_thresh: float | None = None,
        nms_thresh: float | None = None,
        max_candidates: int = DEFAULT_MAX_CANDIDATES,
        n_tiles: tuple[int, int] | None = None,
    ) -> Instances:
        """Find the objects of an image, as the stock `predict_instances(sparse=True)` does on a normalised image.

        Args:
            image: as for `maps`.
            prob_thresh: default from the weights.
            nms_thresh: default from the weights.
            max_candidates: cap, see `candidates_at`.
            n_tiles: rows and columns of tiles that the network computes one after another, to bound its memory on large
                images; each with all pixels that have an influence, so that the result is the same.

        Raises:
            SchemaError: as for `maps`.
        """
        found = self.candidates(image, prob_thresh=prob_thresh, max_candidates=max_candidates, n_tiles=n_tiles)
        return instances_from_candidates(found, nms_thresh=self.thresholds.nms if nms_thresh is None else nms_thresh)

    def _windows(self, padded: FloatArray, n_tiles: tuple[int, int] | None) -> list[Window]:
        config, shape = self._network.config, (padded.shape[1], padded.shape[2])
        if n_tiles is not None:
            return tiled_windows(n_tiles, config, shape)
        if self._skip_background:
            return gated_windows(active_tiles(padded.max(axis=0)), config, shape)
        return self._network.whole(shape)

    def _padded(self, image: npt.ArrayLike) -> tuple[FloatArray, tuple[int, int]]:
        """Normalised and padded image (C, H', W'), and the shape (H, W) before padding."""
        pixels = self._checked(np.asarray(image))
        padded = pad_to_multiple(normalize_percentile(pixels, *self._percentiles), self._network.config.multiple)
        return np.ascontiguousarray(np.moveaxis(padded, -1, 0)), (pixels.shape[0], pixels.shape[1])

    def _checked(self, pixels: np.ndarray) -> np.ndarray:
        channels = self.weights.network.config.n_channel_in
        if pixels.ndim == 2 and channels == 1:
            pixels = pixels[..., None]
        if pixels.ndim != 3 or pixels.shape[-1] != channels or 0 in pixels.shape:
            expected = "(H, W)" if channels == 1 else f"(H, W, {channels})"
            raise SchemaError(f"image has shape {pixels.shape}; this network reads {expected}")
        if np.iscomplexobj(pixels) or not (np.issubdtype(pixels.dtype, np.number) or pixels.dtype == bool):
            raise SchemaError(f"image has dtype {pixels.dtype}; a real number type is needed")
        return pixels
