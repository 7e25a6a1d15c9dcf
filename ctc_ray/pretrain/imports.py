"""Import of published encoder weights in the reference's naming; nothing in the file is executed."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any, Final

import safetensors
import safetensors.torch
import torch

from ctc_ray.errors import WeightsError
from ctc_ray.pretrain.encoder import (
    DEFAULT_ARCHITECTURE,
    EncoderSpec,
    build_backbone,
    embedding_width,
    encode_encoder,
    load_strictly,
)
from ctc_ray.pretrain.intensity import IntensityRule

_PREFIX: Final = "backbone."
_PUBLISHED_INPUT_PX: Final = 224
"""Source: reference `data_augmentation`, inference: bilinear 48 -> 224, /255, to -1..1."""


def read_published(file: Path) -> dict[str, torch.Tensor]:
    """Read the backbone of a published checkpoint.

    Args:
        file: `ctc_dino.pt` or a `.safetensors` file, holding `backbone.*` tensors at the top or below one key
            (`state_dict`, `model`, `student` or `teacher`).

    Returns:
        Tensors by timm's names, without the prefix.

    Raises:
        WeightsError: the file is not there, holds more than tensors, or no `backbone.*` tensors.
    """
    if not file.is_file():
        raise WeightsError(f"{file} does not exist: give the path of the downloaded weights")
    try:
        if file.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, safetensors.SafetensorError, ValueError) as error:
        raise WeightsError(
            f"{file} is not a file of plain weights ({str(error).splitlines()[0]}): download it again, or save its state_dict"
        ) from error
    state = _find_state(content)
    if state is None:
        found = ", ".join(list(content)[:5]) if isinstance(content, dict) else type(content).__name__
        raise WeightsError(f"{file} holds no tensors named {_PREFIX}*: it has {found}")
    return state


def _find_state(content: Any) -> dict[str, torch.Tensor] | None:
    if not isinstance(content, dict):
        return None
    own = {
        str(name).removeprefix(_PREFIX): value
        for name, value in content.items()
        if str(name).startswith(_PREFIX) and isinstance(value, torch.Tensor)
    }
    if own:
        return own
    for key in ("state_dict", "model", "teacher", "student"):
        found = _find_state(content.get(key))
        if found is not None:
            return found
    return None


def encode_published(file: Path, architecture: str = DEFAULT_ARCHITECTURE) -> tuple[dict[str, bytes], EncoderSpec]:
    """Turn published weights into an encoder with the reference's preprocessing.

    Args:
        file: see `read_published`.
        architecture: timm name of its backbone.

    Returns:
        The encoder's files by name, and its description.

    Raises:
        WeightsError: the weights do not fit the backbone strictly.
    """
    state = read_published(file)
    backbone = build_backbone(architecture, channels=3, input_size_px=_PUBLISHED_INPUT_PX)
    load_strictly(backbone, state, str(file))
    spec = EncoderSpec(
        architecture=architecture,
        channels=3,
        input_size_px=_PUBLISHED_INPUT_PX,
        width=embedding_width(backbone),
        intensity=IntensityRule("reference"),
        provenance={
            "imported_from": file.name,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "preprocessing": "bilinear to 224 px, full scale to -1..1",
        },
    )
    return encode_encoder(backbone, spec)
