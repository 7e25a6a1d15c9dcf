"""`StarDist`: weights, network and post-processing as one object."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from ctc_ray.errors import ConfigError, SchemaError
from ctc_ray.segment.instances import (
    DEFAULT_MAX_CANDIDATES,
    Candidates,
    FloatArray,
    Instances,
    instances_from_candidates,
    normalize_percentile,
    pad_to_multiple,
    select_candidates,
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
    ) -> None:
        """Put the network on a device.

        Args:
            weights: from `load_weights`.
            precision: `auto`, `fp32` or `bf16`.
            device: default `cuda` where there is one, else `cpu`.
            percentiles: grey levels of an image that become 0 and 1.

        Raises:
            ConfigError: the precision is unknown.
        """
        self._percentiles = percentiles
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.precision = resolve_precision(precision, self.device)
        self.weights = weights
        self._dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        network = weights.network.eval().to(self.device).to(memory_format=torch.channels_last)
        if self.precision == "bf16":
            for name, layer in network.convolutions.items():
                if name not in ("prob", "dist"):  # the heads stay in float32, see StarDistNetwork.forward
                    layer.to(torch.bfloat16)
        self._network = network

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str] | None = None,
        *,
        precision: str = "auto",
        device: str | torch.device | None = None,
        percentiles: tuple[float, float] = (1.0, 99.8),
    ) -> StarDist:
        """Load a model.

        Args:
            source: None for the shipped default, a weight folder (Keras or safetensors), or a published name.
            precision: `auto` (bf16 where the processor has it natively, else fp32), `fp32` or `bf16`.
            device: default `cuda` where there is one, else `cpu`.
            percentiles: grey levels of an image that become 0 and 1.

        Raises:
            WeightsError: the weights cannot be found or read.
            ConfigError: the precision is unknown.
        """
        return cls(load_weights(source), precision=precision, device=device, percentiles=percentiles)

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
        prob, dist, shape = self._padded_maps(image)
        rows, columns = (
            size - ((-side) % step) // grid
            for size, side, step, grid in zip(
                prob.shape, shape, self.weights.network.config.multiple, self.weights.network.config.grid, strict=True
            )
        )
        return prob[:rows, :columns], np.maximum(np.float32(1e-3), dist[:rows, :columns])

    def candidates(
        self, image: npt.ArrayLike, *, prob_thresh: float | None = None, max_candidates: int = DEFAULT_MAX_CANDIDATES
    ) -> Candidates:
        """The network's part of `predict`: positions above the probability threshold, not yet suppressed.

        Args:
            image: as for `maps`.
            prob_thresh: default from the weights.
            max_candidates: cap, see `select_candidates`.

        Raises:
            SchemaError: as for `maps`.
        """
        prob, dist, shape = self._padded_maps(image)
        return select_candidates(
            prob,
            dist,
            shape=shape,
            grid=self.weights.network.config.grid,
            prob_thresh=self.thresholds.prob if prob_thresh is None else prob_thresh,
            max_candidates=max_candidates,
        )

    def predict(
        self,
        image: npt.ArrayLike,
        *,
        prob_thresh: float | None = None,
        nms_thresh: float | None = None,
        max_candidates: int = DEFAULT_MAX_CANDIDATES,
    ) -> Instances:
        """Find the objects of an image, as the stock `predict_instances(sparse=True)` does on a normalised image.

        Args:
            image: as for `maps`.
            prob_thresh: default from the weights.
            nms_thresh: default from the weights.
            max_candidates: cap, see `select_candidates`.

        Raises:
            SchemaError: as for `maps`.
        """
        found = self.candidates(image, prob_thresh=prob_thresh, max_candidates=max_candidates)
        return instances_from_candidates(found, nms_thresh=self.thresholds.nms if nms_thresh is None else nms_thresh)

    def _padded_maps(self, image: npt.ArrayLike) -> tuple[FloatArray, FloatArray, tuple[int, int]]:
        pixels = self._checked(np.asarray(image))
        config = self.weights.network.config
        padded = pad_to_multiple(normalize_percentile(pixels, *self._percentiles), config.multiple)
        batch = (
            torch.from_numpy(padded)
            .permute(2, 0, 1)[None]
            .to(self.device, self._dtype, memory_format=torch.channels_last)
        )
        with torch.inference_mode():
            logits, dist = self._network(batch)
            prob = torch.sigmoid(logits)[0, 0].cpu().numpy()
            rays = dist[0].permute(1, 2, 0).cpu().numpy()
        return prob, rays, (pixels.shape[0], pixels.shape[1])

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
