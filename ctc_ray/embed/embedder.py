"""A batch of crops in, a vector for each out.

Shape letters: N crops, C channels, H rows, W columns, D embedding width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812  (the name torch's own documentation uses)
from torch import nn

from ctc_ray.errors import SchemaError, WeightsError
from ctc_ray.pretrain.encoder import DEFAULT_FOLDER, EncoderSpec, decode_encoder, load_folder
from ctc_ray.pretrain.intensity import IntensityRule, RuleName, scale_for_network, to_fraction
from ctc_ray.pretrain.precision import Resolved, autocast, default_device, resolve_precision
from ctc_ray.schema import CROP_SIZE_PX

Precision = Literal["auto", "fp32", "bf16"]
DEFAULT_NAME: Final = "default"
"""Name of the encoder that ships with the package."""
_DEFAULT_BATCH: Final = 256


class Embedder:
    """Turns crops into vectors with one encoder; the vector of a crop does not depend on its neighbours in the batch.

    Args:
        backbone: in eval mode, float32.
        spec: the encoder's description.
        precision: `auto` takes bf16 where the hardware multiplies it.
        intensity: name of another intensity rule than the encoder's own (`reference` or `minmax`).
        device: where to compute; the GPU where there is one by default.
        batch_size: crops a forward pass.

    Example:
        >>> embed = Embedder.load()
        >>> vectors = embed(crops)  # (N, C, 48, 48) uint8 or uint16 -> (N, D) float32
    """

    def __init__(
        self,
        backbone: nn.Module,
        spec: EncoderSpec,
        *,
        precision: Precision = "auto",
        intensity: RuleName | None = None,
        device: torch.device | None = None,
        batch_size: int = _DEFAULT_BATCH,
    ) -> None:
        self.spec = spec
        self.rule = spec.intensity if intensity in (None, spec.intensity.name) else _named_rule(intensity, spec)
        self.device = device or default_device()
        self.precision: Resolved = resolve_precision(precision, self.device)
        self._backbone = backbone.eval().to(self.device)
        self._batch_size = batch_size

    @classmethod
    def load(
        cls,
        name_or_folder: str | Path | None = None,
        precision: Precision = "auto",
        *,
        intensity: RuleName | None = None,
        device: torch.device | None = None,
        batch_size: int = _DEFAULT_BATCH,
    ) -> Embedder:
        """Load an encoder.

        Args:
            name_or_folder: folder with `encoder.safetensors` and `encoder.json`; None or `default` takes the encoder
                that ships with the package.
            precision: see the class.
            intensity: see the class.
            device: see the class.
            batch_size: see the class.

        Raises:
            WeightsError: there is no encoder of that name, or it is damaged.
        """
        folder = DEFAULT_FOLDER if name_or_folder in (None, DEFAULT_NAME) else Path(str(name_or_folder))
        if not folder.is_dir():
            raise WeightsError(
                f"there is no encoder {str(name_or_folder)!r}: give the folder that `ctc-ray pretrain` or "
                f"`import-encoder` wrote (COHORT/encoders/<id>), or {DEFAULT_NAME!r} for the shipped one"
            )
        backbone, spec = load_folder(folder)
        return cls(backbone, spec, precision=precision, intensity=intensity, device=device, batch_size=batch_size)

    @classmethod
    def from_files(cls, weights: bytes, description: bytes, where: str, **options: Any) -> Embedder:
        """Load an encoder from the bytes of its two files, as a worker reads them from a cohort.

        Args:
            weights: `encoder.safetensors`.
            description: `encoder.json`.
            where: their place, for messages.
            options: as the class takes them.

        Raises:
            WeightsError: they are damaged or do not belong together.
        """
        backbone, spec = decode_encoder(weights, description, where)
        return cls(backbone, spec, **options)

    @property
    def width(self) -> int:
        """Embedding width D."""
        return self.spec.width

    def __call__(self, crops_NCHW: npt.NDArray[Any], *, full_scale: float | None = None) -> npt.NDArray[np.float32]:
        """Embed crops.

        Args:
            crops_NCHW: (N, C, 48, 48) uint8 or uint16 counts; read-only views are fine.
            full_scale: count of a saturated pixel; None takes the dtype's maximum. 12-bit counts in uint16 have 4095.

        Returns:
            (N, D) float32, in the order of the crops.

        Raises:
            SchemaError: another dtype, shape or number of channels.
        """
        crops_NCHW = np.asarray(crops_NCHW)
        expected = (self.spec.channels, CROP_SIZE_PX, CROP_SIZE_PX)
        if crops_NCHW.ndim != 4 or crops_NCHW.shape[1:] != expected:
            raise SchemaError(
                f"crops have shape {crops_NCHW.shape}, this encoder takes (N, {', '.join(map(str, expected))})"
            )
        vectors = np.empty((len(crops_NCHW), self.width), np.float32)
        for start in range(0, len(crops_NCHW), self._batch_size):
            stop = min(start + self._batch_size, len(crops_NCHW))
            vectors[start:stop] = self._embed_batch(crops_NCHW[start:stop], full_scale)
        return vectors

    @torch.inference_mode()
    def _embed_batch(self, crops_NCHW: npt.NDArray[Any], full_scale: float | None) -> npt.NDArray[np.float32]:
        # Scaling stays in fp32; only the network computes in bf16.
        scaled = scale_for_network(to_fraction(crops_NCHW, full_scale).to(self.device), self.rule)
        side = self.spec.input_size_px
        if scaled.shape[-1] != side:
            scaled = F.interpolate(scaled, size=(side, side), mode="bilinear", align_corners=False)
        with autocast(self.precision, self.device):
            vectors = self._backbone(scaled)
        result: npt.NDArray[np.float32] = vectors.float().cpu().numpy()
        return result


def _named_rule(name: RuleName | None, spec: EncoderSpec) -> IntensityRule:
    if name == "constants":
        raise SchemaError(
            f"this encoder has no intensity constants (its rule is {spec.intensity.name}): use its own rule or `minmax`"
        )
    return IntensityRule(name or spec.intensity.name)
