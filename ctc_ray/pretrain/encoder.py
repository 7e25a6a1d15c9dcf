"""The encoder: a timm backbone, its description, and how both are stored.

Shape letters: N crops, C channels, H rows, W columns, D embedding width.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import safetensors.torch
import timm
import torch
from torch import nn

from ctc_ray.errors import ConfigError, WeightsError
from ctc_ray.pretrain.intensity import IntensityRule

FORMAT: Final = 1
WEIGHTS_FILE: Final = "encoder.safetensors"
DESCRIPTION_FILE: Final = "encoder.json"
DEFAULT_FOLDER: Final = Path(__file__).parent / "default_encoder"
DEFAULT_ARCHITECTURE: Final = "xcit_nano_12_p8"

_TIMM_NAMES: Final = {"xcit_nano_12_p8": "xcit_nano_12_p8_224", "xcit_tiny_12_p8": "xcit_tiny_12_p8_224"}
"""timm appends the published input size; XCiT itself takes any size divisible by its patch."""


@dataclass(frozen=True)
class EncoderSpec:
    """What `encoder.json` says about an encoder.

    Attributes:
        architecture: timm name of the backbone (`xcit_nano_12_p8` or any other).
        channels: number of input channels C.
        input_size_px: side of the network's input; crops of another size are resized bilinearly.
        width: embedding width D.
        intensity: how counts are scaled.
        provenance: where the weights come from (free form: preset, steps, patients, versions).
        fingerprint: digest of weights and of everything above but the provenance; empty until stored.
    """

    architecture: str
    channels: int
    input_size_px: int
    width: int
    intensity: IntensityRule
    provenance: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""

    def identity(self) -> dict[str, Any]:
        """The part that decides the vectors, beside the weights."""
        return {
            "format": FORMAT,
            "architecture": self.architecture,
            "channels": self.channels,
            "input_size_px": self.input_size_px,
            "width": self.width,
            "intensity": self.intensity.to_json(),
        }

    def to_json(self) -> dict[str, Any]:
        """The description as plain JSON values."""
        return {**self.identity(), "fingerprint": self.fingerprint, "provenance": self.provenance}


def build_backbone(architecture: str, *, channels: int = 3, input_size_px: int = 48) -> nn.Module:
    """Build a timm backbone without weights of its own and without a classifier.

    Args:
        architecture: timm name; `xcit_nano_12_p8` stands for `xcit_nano_12_p8_224`.
        channels: input channels C.
        input_size_px: side of the input; vision transformers with fixed position codes are built for it.

    Returns:
        A module taking (N, C, H, W) float32 to (N, D) float32.

    Raises:
        ConfigError: timm does not know the name, or the backbone cannot take that input.
    """
    name = _TIMM_NAMES.get(architecture, architecture)
    if not timm.is_model(name):
        close = timm.list_models(f"*{architecture.split('_', maxsplit=1)[0]}*")[:8]
        msg = f"timm has no backbone named {architecture!r}; names that come near: {', '.join(close) or 'none'}"
        raise ConfigError(msg)
    options: dict[str, Any] = {"pretrained": False, "num_classes": 0, "in_chans": channels}
    if "vit" in name and not name.startswith(("xcit", "mobilevit", "levit", "efficientvit", "maxvit", "coatnet")):
        # Position codes are interpolated, so that local views may be smaller than global ones.
        options |= {"img_size": input_size_px, "dynamic_img_size": True}
    try:
        backbone = timm.create_model(name, **options)
    except (TypeError, AssertionError, ValueError) as error:
        msg = f"backbone {architecture!r} cannot be built for {channels} channels at {input_size_px} px: {error}"
        raise ConfigError(msg) from error
    return backbone


def embedding_width(backbone: nn.Module) -> int:
    """Embedding width D of a timm backbone without classifier."""
    return int(backbone.num_features)  # type: ignore[arg-type]  # timm declares it on every model; nn.Module does not


def fingerprint_of(spec: EncoderSpec, weights: bytes) -> str:
    """Digest of the stored weights and of all settings that decide the vectors: 16 hexadecimal characters."""
    digest = hashlib.blake2b(json.dumps(spec.identity(), sort_keys=True).encode(), digest_size=8)
    digest.update(hashlib.sha256(weights).digest())
    return digest.hexdigest()


def encode_encoder(
    backbone: nn.Module, spec: EncoderSpec, *, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, bytes], EncoderSpec]:
    """Serialise an encoder in memory, so that a store can write it in one atomic put.

    Args:
        backbone: weights and buffers to keep.
        spec: its description.
        dtype: of the floating-point weights on disk; float16 halves the file.

    Returns:
        The files by name, and the spec with its fingerprint.
    """
    state = {
        name: (value.detach().cpu().to(dtype) if value.is_floating_point() else value.detach().cpu()).contiguous()
        for name, value in backbone.state_dict().items()
    }
    weights = safetensors.torch.save(state, metadata={"format": "pt"})
    stored = EncoderSpec(
        spec.architecture,
        spec.channels,
        spec.input_size_px,
        spec.width,
        spec.intensity,
        spec.provenance,
        fingerprint_of(spec, weights),
    )
    description = json.dumps(stored.to_json(), indent=2, ensure_ascii=False) + "\n"
    return {WEIGHTS_FILE: weights, DESCRIPTION_FILE: description.encode()}, stored


def decode_spec(description: bytes, where: str) -> EncoderSpec:
    """Read `encoder.json`.

    Raises:
        WeightsError: not JSON, of another format, or without a needed key.
    """
    try:
        value = json.loads(description)
        if value["format"] != FORMAT:
            msg = f"{where}/{DESCRIPTION_FILE} has format {value['format']}, this version reads {FORMAT}"
            raise WeightsError(msg)
        return EncoderSpec(
            architecture=str(value["architecture"]),
            channels=int(value["channels"]),
            input_size_px=int(value["input_size_px"]),
            width=int(value["width"]),
            intensity=IntensityRule.from_json(value["intensity"]),
            provenance=dict(value.get("provenance", {})),
            fingerprint=str(value["fingerprint"]),
        )
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        msg = f"{where}/{DESCRIPTION_FILE} is no encoder description ({error}): write the encoder again"
        raise WeightsError(msg) from error


def verify(spec: EncoderSpec, weights: bytes, where: str) -> None:
    """Check that weights and description belong together.

    Raises:
        WeightsError: one of them was changed or damaged.
    """
    if fingerprint_of(spec, weights) != spec.fingerprint:
        raise WeightsError(
            f"{where}: weights and description do not belong together (fingerprint {spec.fingerprint}): copy both again, "
            "or write the encoder again"
        )


def decode_encoder(weights: bytes, description: bytes, where: str) -> tuple[nn.Module, EncoderSpec]:
    """Rebuild an encoder from its two files.

    Returns:
        The backbone in float32 and eval mode, and its description.

    Raises:
        WeightsError: a damaged file, or weights of another architecture.
    """
    spec = decode_spec(description, where)
    verify(spec, weights, where)
    try:
        state = safetensors.torch.load(weights)
    except safetensors.SafetensorError as error:
        msg = f"{where}/{WEIGHTS_FILE} is damaged ({error}): copy it again"
        raise WeightsError(msg) from error
    backbone = build_backbone(spec.architecture, channels=spec.channels, input_size_px=spec.input_size_px)
    load_strictly(backbone, {k: v.float() if v.is_floating_point() else v for k, v in state.items()}, where)
    if embedding_width(backbone) != spec.width:
        msg = f"{where}: {spec.architecture} is {embedding_width(backbone)} wide, its description says {spec.width}"
        raise WeightsError(msg)
    return backbone.eval(), spec


def load_strictly(module: nn.Module, state: dict[str, torch.Tensor], where: str) -> None:
    """Load weights, naming what does not fit.

    Raises:
        WeightsError: missing, unexpected or wrongly shaped tensors.
    """
    own = module.state_dict()
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    reshaped = sorted(
        f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
        for name in own.keys() & state.keys()
        if own[name].shape != state[name].shape
    )
    if missing or unexpected or reshaped:
        parts = [
            f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
            if names
        ]
        msg = f"{where}: weights do not fit {type(module).__name__}: {'; '.join(parts)}. Name the right architecture and number of channels"
        raise WeightsError(msg)
    module.load_state_dict(state)


def read_folder(folder: Path) -> tuple[bytes, bytes]:
    """The bytes of an encoder's two files in a local folder.

    Raises:
        WeightsError: a file is not there.
    """
    for name in (WEIGHTS_FILE, DESCRIPTION_FILE):
        if not (folder / name).is_file():
            msg = f"{folder} holds no {name}: name a folder that `ctc-ray pretrain` or `import-encoder` wrote"
            raise WeightsError(msg)
    return (folder / WEIGHTS_FILE).read_bytes(), (folder / DESCRIPTION_FILE).read_bytes()


def load_folder(folder: Path | str) -> tuple[nn.Module, EncoderSpec]:
    """Load an encoder from a local folder (see `decode_encoder`)."""
    weights, description = read_folder(Path(folder))
    return decode_encoder(weights, description, str(folder))


def same_architecture(one: str, other: str) -> bool:
    """Whether two names stand for one backbone (`xcit_nano_12_p8` and timm's `xcit_nano_12_p8_224`)."""
    return _TIMM_NAMES.get(one, one) == _TIMM_NAMES.get(other, other)
