"""Weight files of Keras ("legacy h5"), read and written without TensorFlow."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import h5py
import numpy as np
import torch

from ctc_ray.errors import WeightsError
from ctc_ray.segment.network import StarDistNetwork

MAX_ARRAY_VALUES = 2**27
"""An array of more values is refused unread: h5 can declare a shape that its file does not hold. The largest layer of
a published model has 590,000."""


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
            for layer in _layer_names(root, path):
                arrays = _arrays(root[layer], f"{path}, layer {layer}")
                if not arrays:
                    continue
                name = layer
                if not layer.startswith(known):
                    name, num_stem = f"stem_{num_stem}", num_stem + 1
                if sorted(arrays) != ["bias", "kernel"] or arrays["kernel"].ndim != 4:
                    raise WeightsError(
                        f"{path}, layer {layer}, holds { ({key: value.shape for key, value in arrays.items()}) }; "
                        "a layer of a 2D StarDist model holds a kernel of four axes and a bias"
                    )
                state[f"{name}.weight"] = torch.from_numpy(np.ascontiguousarray(arrays["kernel"].transpose(3, 2, 0, 1)))
                state[f"{name}.bias"] = torch.from_numpy(arrays["bias"])
    except WeightsError:
        raise
    # h5py reports damage inside a file by any of these, RuntimeError included.
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{path} is not a Keras weight file of a StarDist model: {error}") from error
    return state


def _layer_names(root: h5py.Group, path: Path) -> list[str]:
    if not isinstance(root, h5py.Group) or "layer_names" not in root.attrs:
        raise WeightsError(
            f"{path} has no attribute 'layer_names', so it is not a Keras weight file; "
            "save the model with `keras_model.save_weights('weights_best.h5')`"
        )
    return [entry.decode() if isinstance(entry, bytes) else str(entry) for entry in root.attrs["layer_names"]]


def _arrays(layer: object, where: str) -> dict[str, np.ndarray]:
    """Arrays of a layer by the last part of their name, float32."""
    if not isinstance(layer, h5py.Group):
        raise WeightsError(f"{where} is not a group of arrays")
    arrays: dict[str, np.ndarray] = {}

    def visit(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            if item.size is None or item.size > MAX_ARRAY_VALUES:
                raise WeightsError(f"{where}: {name} has shape {item.shape}, more than any StarDist layer")
            arrays[name.rsplit("/", 1)[-1].removesuffix(":0")] = np.asarray(item, dtype=np.float32)

    layer.visititems(visit)
    return arrays


def write_keras(network: StarDistNetwork, path: Path) -> None:
    """Write the weights of a network as Keras 2 does; Keras 2 and Keras 3 both read the file.

    Args:
        network: any StarDist network.
        path: the h5 file; it is written in place, so write it beside and rename.
    """
    convolutions = network.convolutions
    # Keras assigns layers by their order in the file, not by name; ours is that of the stock model.
    names = {name: _stock_name(name) for name in convolutions}
    with h5py.File(path, "w") as file:
        _write_names(file, "layer_names", names.values())
        file.attrs["backend"] = b"tensorflow"
        file.attrs["keras_version"] = b"2.15.0"
        for name, stock in names.items():
            state = convolutions[name].state_dict()
            kernel = state["weight"].detach().float().cpu().numpy().transpose(2, 3, 1, 0)
            group = file.create_group(stock)
            _write_names(group, "weight_names", (f"{stock}/kernel:0", f"{stock}/bias:0"))
            group[f"{stock}/kernel:0"] = np.ascontiguousarray(kernel)
            group[f"{stock}/bias:0"] = state["bias"].detach().float().cpu().numpy()


def _stock_name(name: str) -> str:
    """The name of a layer in Keras, whose counter calls the stem `conv2d`, `conv2d_1`, ..."""
    if not name.startswith("stem_"):
        return name
    index = int(name.removeprefix("stem_"))
    return f"conv2d_{index}" if index else "conv2d"


def _write_names(group: h5py.Group, attribute: str, names: Iterable[str]) -> None:
    group.attrs[attribute] = np.array([name.encode() for name in names], dtype=np.bytes_)  # fixed length, as in Keras
