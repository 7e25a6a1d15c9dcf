"""A batch of crops in, a vector for each out.

Shape letters: N crops, C channels, H rows, W columns, D embedding width, L counts that a dtype can hold.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812  (the name torch's own documentation uses)
from torch import nn

from ctc_ray.embed.frozen_xcit import freeze_xcit
from ctc_ray.errors import SchemaError, WeightsError
from ctc_ray.pretrain.encoder import DEFAULT_FOLDER, EncoderSpec, decode_encoder, load_folder
from ctc_ray.pretrain.intensity import IntensityRule, RuleName, full_scale_of, scale_for_network, to_fraction
from ctc_ray.pretrain.precision import Resolved, autocast, default_device, resolve_precision
from ctc_ray.schema import CROP_SIZE_PX

Precision = Literal["auto", "fp32", "bf16"]
DEFAULT_NAME: Final = "default"
"""Name of the encoder that ships with the package."""
_BATCH_SIZE: Final = {"cpu": 64, "cuda": 1024}
"""Crops a forward pass where nobody says otherwise: on a processor what comes between layers stays in its cache (32 to 128 are
equally fast within the noise of `benchmarks/embed.py`), a GPU needs enough to be busy."""


class Embedder:
    """Turns crops into vectors with one encoder; the vector of a crop does not depend on its neighbours in the batch.

    Args:
        backbone: in eval mode, float32.
        spec: the encoder's description.
        precision: `auto` takes bf16 where the hardware multiplies it.
        intensity: name of another intensity rule than the encoder's own (`reference` or `minmax`).
        device: where to compute; the GPU where there is one by default.
        batch_size: crops a forward pass; None takes what suits the device.

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
        batch_size: int | None = None,
    ) -> None:
        self.spec = spec
        self.rule = spec.intensity if intensity in (None, spec.intensity.name) else _named_rule(intensity, spec)
        self.device = device or default_device()
        self.precision: Resolved = resolve_precision(precision, self.device)
        frozen = freeze_xcit(backbone.eval().cpu(), spec.input_size_px, _DTYPES[self.precision])
        self._network = (backbone if frozen is None else frozen).to(self.device)
        # What is not frozen keeps float32 weights, which autocast casts at each use.
        self._autocast: Resolved = "fp32" if frozen is not None else self.precision
        self._batch_size = batch_size or _BATCH_SIZE.get(self.device.type, 256)
        self._tables: dict[tuple[str, float | None], torch.Tensor] = {}

    @classmethod
    def load(
        cls,
        name_or_folder: str | Path | None = None,
        precision: Precision = "auto",
        *,
        intensity: RuleName | None = None,
        device: torch.device | None = None,
        batch_size: int | None = None,
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
        scaled = self._scaled(crops_NCHW, full_scale)
        side = self.spec.input_size_px
        if scaled.shape[-1] != side:
            scaled = F.interpolate(scaled, size=(side, side), mode="bilinear", align_corners=False)
        with autocast(self._autocast, self.device):
            vectors = self._network(scaled)
        result: npt.NDArray[np.float32] = vectors.float().cpu().numpy()
        return result

    def _scaled(self, crops_NCHW: npt.NDArray[Any], full_scale: float | None) -> torch.Tensor:
        """The network's input (N, C, H, W) float32 on the device."""
        if self.rule.name == "minmax":  # depends on the crop
            return scale_for_network(to_fraction(crops_NCHW, full_scale).to(self.device), self.rule)
        key = (crops_NCHW.dtype.name, full_scale)
        if key not in self._tables:
            self._tables[key] = _table(self.rule, crops_NCHW.dtype, self.spec.channels, full_scale).to(self.device)
        table_CL = self._tables[key]
        # Widened here: as int32 it is a copy, which read-only crops from Arrow need anyway.
        index = torch.from_numpy(crops_NCHW.astype(np.int32)).to(self.device)
        index += torch.arange(len(table_CL), dtype=torch.int32, device=self.device).view(-1, 1, 1) * table_CL.shape[1]
        return table_CL.view(-1).index_select(0, index.view(-1)).view(index.shape)


_DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _table(rule: IntensityRule, dtype: np.dtype[Any], channels: int, full_scale: float | None) -> torch.Tensor:
    """What every count of a dtype becomes, (C, L) float32: a lookup a pixel instead of a logarithm and a root."""
    counts = np.arange(int(full_scale_of(dtype)) + 1).astype(dtype)
    every = np.broadcast_to(counts, (1, channels, 1, len(counts)))
    return scale_for_network(to_fraction(every, full_scale), rule)[0, :, 0].contiguous()


def _named_rule(name: RuleName | None, spec: EncoderSpec) -> IntensityRule:
    if name == "constants":
        raise SchemaError(
            f"this encoder has no intensity constants (its rule is {spec.intensity.name}): use its own rule or `minmax`"
        )
    return IntensityRule(name or spec.intensity.name)
