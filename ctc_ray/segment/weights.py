"""Reading and writing StarDist weight folders: the stock Keras layout, our safetensors layout, published names."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ctc_ray.errors import WeightsError
from ctc_ray.segment.atomic_file import write_atomic
from ctc_ray.segment.keras_h5 import read_keras, write_keras
from ctc_ray.segment.network import NetworkConfig, StarDistNetwork
from ctc_ray.segment.published import REGISTRY, download

logger = logging.getLogger(__name__)

DEFAULT_WEIGHTS = Path(__file__).parent / "default_weights"
"""The weights that the package ships."""
KERAS_FILE = "weights_best.h5"
KERAS_LAST_FILE = "weights_last.h5"
SAFETENSORS_FILE = "weights.safetensors"
STOCK_DEFAULT_PROB, STOCK_DEFAULT_NMS = 0.5, 0.4
"""Thresholds of a folder that states none. Source: stardist `models/base.py`, `StarDistBase.__init__`."""
MAX_WEIGHT_FILE_BYTES = 2_000_000_000
"""A larger file is refused unread; the published networks have 6 MB."""


@dataclass(frozen=True)
class Thresholds:
    """Where predictions are cut: object probability, and overlap in non-maximum suppression; both 0 to 1."""

    prob: float
    nms: float


@dataclass(frozen=True)
class Weights:
    """Everything a weight folder holds.

    Attributes:
        network: the network with its weights, float32, evaluation mode.
        thresholds: cuts of the predictions.
        fingerprint: 16 hex characters over configuration, thresholds and weights.
        source: where they came from.
    """

    network: StarDistNetwork
    thresholds: Thresholds
    fingerprint: str
    source: str


def load_weights(source: str | os.PathLike[str] | None = None) -> Weights:
    """Load weights.

    Args:
        source: None for the shipped default, a folder, or a name of `REGISTRY`.

    Raises:
        WeightsError: the folder or name is unknown, unreadable, or does not match its configuration.
    """
    if source is None:
        return read_folder(DEFAULT_WEIGHTS)
    folder = Path(source)
    if folder.is_dir():
        return read_folder(folder)
    if str(source) in REGISTRY:
        return read_folder(download(str(source)))
    raise WeightsError(
        f"no StarDist weights at {str(source)!r}: neither a folder with config.json, thresholds.json and "
        f"{KERAS_FILE} or {SAFETENSORS_FILE}, nor a published name ({', '.join(REGISTRY)})"
    )


def read_folder(folder: Path) -> Weights:
    """Load a weight folder in either layout; safetensors is preferred where both are there.

    Raises:
        WeightsError: a file is missing, unreadable, or does not match the configuration.
    """
    config = NetworkConfig.from_stardist(_read_json(folder / "config.json"))
    thresholds = _read_thresholds(folder / "thresholds.json")
    network = StarDistNetwork(config)
    path = _weight_file(folder)
    if path.stat().st_size > MAX_WEIGHT_FILE_BYTES:
        raise WeightsError(f"{path} has {path.stat().st_size} bytes, more than the {MAX_WEIGHT_FILE_BYTES} allowed")
    state = _read_safetensors(path) if path.name == SAFETENSORS_FILE else read_keras(path, prefix=config.unet_prefix)
    _assign(network, state, path)
    network.eval()
    return Weights(network, thresholds, fingerprint_of(network, thresholds), str(folder))


def _weight_file(folder: Path) -> Path:
    for name in (SAFETENSORS_FILE, KERAS_FILE, KERAS_LAST_FILE):
        if (folder / name).is_file():
            return folder / name
    others = sorted(path for path in folder.iterdir() if path.suffix in (".h5", ".hdf5"))
    if len(others) == 1:
        return others[0]
    raise WeightsError(
        f"{folder} holds neither {SAFETENSORS_FILE} nor {KERAS_FILE} nor {KERAS_LAST_FILE}, and {len(others)} other h5 "
        "files; name the one that counts " + KERAS_FILE
    )


def _read_thresholds(path: Path) -> Thresholds:
    """Thresholds of a folder; those that it does not state are the stock package's defaults, as there."""
    cuts = _read_json(path) if path.is_file() else {}
    values = {}
    for key, default in (("prob", STOCK_DEFAULT_PROB), ("nms", STOCK_DEFAULT_NMS)):
        value = cuts.get(key)
        if value is None:
            logger.warning("%s states no %r threshold; the stock package's default of %g is used", path, key, default)
            value = default
        # Stock StarDist replaces a threshold outside 0 to 1 by its default; here a file that is wrong is an error.
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
            raise WeightsError(f"{path} has {key}={value!r}; a number between 0 and 1 is needed, or none at all")
        values[key] = float(value)
    return Thresholds(**values)


def save_folder(network: StarDistNetwork, thresholds: Thresholds, folder: Path) -> None:
    """Write a weight folder: `config.json`, `thresholds.json`, `weights.safetensors` (float32), each atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: value.detach().float().cpu().contiguous() for name, value in network.convolutions.state_dict().items()
    }
    write_atomic(folder / SAFETENSORS_FILE, save(state))
    _write_json_files(network, thresholds, folder)


def save_keras_folder(network: StarDistNetwork, thresholds: Thresholds, folder: Path) -> None:
    """Write a weight folder that the stock package opens: `config.json`, `thresholds.json`, `weights_best.h5`.

    `StarDist2D(None, name=folder.name, basedir=folder.parent)` reads it with Keras 2 and 3. With Keras 2
    (`TF_USE_LEGACY_KERAS=1`) the model's `export_TF()` then writes the SavedModel archive of the Fiji plugin. Writing
    the folder needs no TensorFlow.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{KERAS_FILE}.{uuid.uuid4().hex[:12]}"
    try:
        write_keras(network, temporary)
        temporary.replace(folder / KERAS_FILE)
    finally:
        temporary.unlink(missing_ok=True)
    _write_json_files(network, thresholds, folder)


def _write_json_files(network: StarDistNetwork, thresholds: Thresholds, folder: Path) -> None:
    write_atomic(folder / "config.json", json.dumps(network.config.to_stardist(), indent=1).encode())
    write_atomic(folder / "thresholds.json", json.dumps(asdict(thresholds)).encode())


def fingerprint_of(network: StarDistNetwork, thresholds: Thresholds) -> str:
    """16 hex characters over the configuration, the thresholds and every weight (layout of the file does not count)."""
    digest = hashlib.sha256()
    digest.update(json.dumps([network.config.to_stardist(), asdict(thresholds)], sort_keys=True).encode())
    for name, value in sorted(network.convolutions.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise WeightsError(f"{path} is missing; a StarDist weight folder needs it") from error
    except (OSError, RecursionError, ValueError) as error:
        raise WeightsError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} must hold a JSON object, found {type(content).__name__}")
    return content


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path} is not a readable safetensors file: {error}") from error


def _assign(network: StarDistNetwork, state: Mapping[str, torch.Tensor], path: Path) -> None:
    expected = network.convolutions.state_dict()
    missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unknown:
        raise WeightsError(
            f"{path} does not fit its config.json: missing {missing[:4]}, unexpected {unknown[:4]} "
            f"({len(missing)} and {len(unknown)} in all)"
        )
    for name, value in expected.items():
        if value.shape != state[name].shape:
            raise WeightsError(
                f"{path} does not fit its config.json: {name} has shape {tuple(state[name].shape)}, "
                f"the configuration needs {tuple(value.shape)}"
            )
        if not state[name].isfinite().all():
            raise WeightsError(
                f"{path}: {name} holds values that are not finite; the training diverged or the file is damaged"
            )
    network.convolutions.load_state_dict({name: value.float() for name, value in state.items()})
