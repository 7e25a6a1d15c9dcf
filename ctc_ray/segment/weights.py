"""Reading and writing StarDist weight folders: the stock Keras layout, our safetensors layout, published names."""

from __future__ import annotations

import hashlib
import io
import json
import os
import urllib.error
import urllib.request
import uuid
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ctc_ray.errors import WeightsError
from ctc_ray.segment.network import NetworkConfig, StarDistNetwork

DEFAULT_WEIGHTS = Path(__file__).parent / "default_weights"
"""The weights that the package ships."""
KERAS_FILE = "weights_best.h5"
SAFETENSORS_FILE = "weights.safetensors"
DOWNLOAD_TIMEOUT_S = 60.0

_RELEASE = "https://github.com/stardist/stardist-models/releases/download/v0.1/python_{name}.zip"
REGISTRY: Mapping[str, str] = {
    "2D_versatile_fluo": "4ad678d0758eed6e55625f1b5ae30771e59adb79f1239e09b9772eac8846c3dd",
    "2D_versatile_he": "f1696ef0631bd7e1c0e5c0d3017e2b4c6a95e284c6aab9c22fc2f08317817b28",
    "2D_paper_dsb2018": "4c11cf68512341d9e8ce3d1278c64ceb8ac400582739f85fcab079a2e82840d2",
    "2D_demo": "a1efaebd7103db6236655bf158b6e21cf5b38d58ec77a509802244a89a260fa4",
}
"""Published 2D models and the sha256 of their archives. Source: stardist 0.9.2 `models/__init__.py`; copied, because
importing that module needs TensorFlow."""


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
    cuts = _read_json(folder / "thresholds.json")
    try:
        thresholds = Thresholds(prob=float(cuts["prob"]), nms=float(cuts["nms"]))
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{folder / 'thresholds.json'} must hold numbers 'prob' and 'nms', found {cuts}") from error
    network = StarDistNetwork(config)
    if (folder / SAFETENSORS_FILE).is_file():
        state = _read_safetensors(folder / SAFETENSORS_FILE)
    elif (folder / KERAS_FILE).is_file():
        state = read_keras(folder / KERAS_FILE, prefix=config.unet_prefix)
    else:
        raise WeightsError(f"{folder} holds neither {SAFETENSORS_FILE} nor {KERAS_FILE}")
    _assign(network, state, folder)
    network.eval()
    return Weights(network, thresholds, fingerprint_of(network, thresholds), str(folder))


def read_keras(path: Path, *, prefix: str = "") -> dict[str, torch.Tensor]:
    """Read convolution weights of a Keras "legacy h5" file, as Keras 2 and Keras 3 write it.

    Args:
        path: the h5 file: `/<layer>/<layer>/kernel` (HWIO) and `bias`, in Keras 2 with `:0` after the name.
        prefix: the configuration's `unet_prefix`; only layers of the stem are looked for outside the U-Net's names.

    Returns:
        State for `StarDistNetwork`: `<layer>.weight` (OIHW) and `<layer>.bias`, float32. Layers that Keras numbered
        (`conv2d_1`, ...) become `stem_0`, `stem_1`, ... in the order of the file's `layer_names`.

    Raises:
        WeightsError: the file is no such h5 file.
    """
    known = ("features", "prob", "dist", f"{prefix}down_level_", f"{prefix}middle_", f"{prefix}up_level_")
    state: dict[str, torch.Tensor] = {}
    num_stem = 0
    try:
        with h5py.File(path, "r") as file:
            root = file.get("model_weights", file)
            for entry in root.attrs["layer_names"]:
                layer = entry.decode() if isinstance(entry, bytes) else str(entry)
                arrays = _keras_arrays(root[layer])
                if "kernel" not in arrays:
                    continue
                name = layer
                if not layer.startswith(known):
                    name, num_stem = f"stem_{num_stem}", num_stem + 1
                state[f"{name}.weight"] = torch.from_numpy(np.ascontiguousarray(arrays["kernel"].transpose(3, 2, 0, 1)))
                state[f"{name}.bias"] = torch.from_numpy(arrays["bias"])
    except (OSError, KeyError, ValueError) as error:
        raise WeightsError(f"{path} is not a Keras weight file of a StarDist model: {error}") from error
    return state


def _keras_arrays(layer: Any) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            arrays[name.rsplit("/", 1)[-1].removesuffix(":0")] = np.asarray(item, dtype=np.float32)

    layer.visititems(visit)
    return arrays


def save_folder(network: StarDistNetwork, thresholds: Thresholds, folder: Path) -> None:
    """Write a weight folder: `config.json`, `thresholds.json`, `weights.safetensors` (float32), each atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: value.detach().float().cpu().contiguous() for name, value in network.convolutions.state_dict().items()
    }
    write_atomic(folder / SAFETENSORS_FILE, save(state))
    write_atomic(folder / "config.json", json.dumps(network.config.to_stardist(), indent=1).encode())
    write_atomic(folder / "thresholds.json", json.dumps(asdict(thresholds)).encode())


def write_atomic(path: Path, data: bytes) -> None:
    """Write a local file so that a reader sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def fingerprint_of(network: StarDistNetwork, thresholds: Thresholds) -> str:
    """16 hex characters over the configuration, the thresholds and every weight (layout of the file does not count)."""
    digest = hashlib.sha256()
    digest.update(json.dumps([network.config.to_stardist(), asdict(thresholds)], sort_keys=True).encode())
    for name, value in sorted(network.convolutions.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def download(name: str, cache: Path | None = None) -> Path:
    """Fetch a published model once and return its folder.

    Args:
        name: a key of `REGISTRY`.
        cache: where models are kept; default `$XDG_CACHE_HOME/ctc_ray/stardist` or `~/.cache/ctc_ray/stardist`.

    Raises:
        WeightsError: the network does not allow it, or the archive is not the published one.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = (cache or base / "ctc_ray" / "stardist") / name
    if (folder / KERAS_FILE).is_file():
        return folder
    url = _RELEASE.format(name=name)
    try:
        with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT_S) as response:
            archive = response.read()
    except (urllib.error.URLError, OSError) as error:
        raise WeightsError(
            f"the published model {name!r} could not be fetched from {url}: {error}. "
            f"Fetch and unpack it by hand and give the folder instead of the name"
        ) from error
    found = hashlib.sha256(archive).hexdigest()
    if found != REGISTRY[name]:
        raise WeightsError(
            f"{url} gave an archive with sha256 {found}, expected {REGISTRY[name]}; nothing was unpacked"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(io.BytesIO(archive)) as members:
        for wanted in ("config.json", "thresholds.json", KERAS_FILE):  # the file that marks the folder complete is last
            write_atomic(folder / wanted, members.read(wanted))
    return folder


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise WeightsError(f"{path} is missing; a StarDist weight folder needs it") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise WeightsError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} must hold a JSON object, found {type(content).__name__}")
    return content


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path} is not a readable safetensors file: {error}") from error


def _assign(network: StarDistNetwork, state: Mapping[str, torch.Tensor], folder: Path) -> None:
    expected = network.convolutions.state_dict()
    missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unknown:
        raise WeightsError(
            f"weights in {folder} do not fit its config.json: missing {missing[:4]}, unexpected {unknown[:4]} "
            f"({len(missing)} and {len(unknown)} in all)"
        )
    for name, value in expected.items():
        if value.shape != state[name].shape:
            raise WeightsError(
                f"weights in {folder} do not fit its config.json: {name} has shape {tuple(state[name].shape)}, "
                f"the configuration needs {tuple(value.shape)}"
            )
    network.convolutions.load_state_dict({name: value.float() for name, value in state.items()})
