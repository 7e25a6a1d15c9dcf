"""Weight folders: what is written is read, what does not fit is refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from ctc_ray.errors import WeightsError
from ctc_ray.segment.network import NetworkConfig, StarDistNetwork
from ctc_ray.segment.weights import (
    Thresholds,
    fingerprint_of,
    load_weights,
    read_keras,
    save_folder,
    save_keras_folder,
)

SMALL = NetworkConfig(unet_n_depth=1, unet_n_filter_base=2, net_conv_after_unet=3, n_rays=4)


def saved(folder: Path, seed: int = 0) -> StarDistNetwork:
    torch.manual_seed(seed)
    network = StarDistNetwork(SMALL)
    save_folder(network, Thresholds(0.4, 0.3), folder)
    return network


def test_weight_folder_written_and_read_is_the_same(tmp_path: Path) -> None:
    network = saved(tmp_path)
    loaded = load_weights(tmp_path)
    assert loaded.thresholds == Thresholds(0.4, 0.3)
    assert loaded.network.config == SMALL
    for name, value in network.state_dict().items():
        torch.testing.assert_close(loaded.network.state_dict()[name], value, rtol=0, atol=0)
    assert loaded.fingerprint == fingerprint_of(network, Thresholds(0.4, 0.3))


def test_fingerprint_differs_with_weights_and_with_thresholds(tmp_path: Path) -> None:
    network, other = saved(tmp_path / "a", seed=0), saved(tmp_path / "b", seed=1)
    cuts = Thresholds(0.4, 0.3)
    assert fingerprint_of(network, cuts) != fingerprint_of(other, cuts)
    assert fingerprint_of(network, cuts) != fingerprint_of(network, Thresholds(0.5, 0.3))


@pytest.mark.parametrize("suffix", ["", ":0"])
def test_keras_file_of_either_layout_maps_by_layer_name(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(0)
    kernels = {name: rng.random((3, 3, 2, 5), dtype=np.float32) for name in ("conv2d_7", "conv2d_8", "features")}
    with h5py.File(tmp_path / "weights_best.h5", "w") as file:
        file.attrs["layer_names"] = [name.encode() for name in ("input", *kernels)]
        file.create_group("input")
        for name, kernel in kernels.items():
            file[f"{name}/{name}/kernel{suffix}"] = kernel
            file[f"{name}/{name}/bias{suffix}"] = np.arange(5, dtype=np.float32)
    state = read_keras(tmp_path / "weights_best.h5")
    assert sorted(state) == sorted(f"{n}.{k}" for n in ("stem_0", "stem_1", "features") for k in ("weight", "bias"))
    np.testing.assert_array_equal(state["stem_1.weight"][4, 1, 0, 2], kernels["conv2d_8"][0, 2, 1, 4])


@pytest.mark.parametrize("damage", ["config.json", "thresholds.json", "weights.safetensors"])
def test_weight_folder_with_a_damaged_file_is_refused(tmp_path: Path, damage: str) -> None:
    saved(tmp_path)
    (tmp_path / damage).write_bytes(b"{")
    with pytest.raises(WeightsError, match=damage):
        load_weights(tmp_path)


def test_weight_folder_without_a_file_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "weights.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"weights\.safetensors"):
        load_weights(tmp_path)


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_rays": 8}))
    with pytest.raises(WeightsError, match="dist"):
        load_weights(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"unet_n_depth": 2}))
    with pytest.raises(WeightsError, match="missing"):
        load_weights(tmp_path)


def test_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(WeightsError, match="2D_versatile_fluo"):
        load_weights("2D_versatile_flu")


@pytest.mark.parametrize("grid", [(1, 1), (4, 2)])
def test_keras_folder_written_and_read_is_the_same(tmp_path: Path, grid: tuple[int, int]) -> None:
    torch.manual_seed(0)
    network = StarDistNetwork(NetworkConfig(unet_n_depth=1, unet_n_filter_base=2, n_rays=5, grid=grid))
    for layer in network.convolutions.values():
        torch.nn.init.normal_(layer.bias)  # type: ignore[arg-type]
    save_keras_folder(network, Thresholds(0.4, 0.2), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "thresholds.json", "weights_best.h5"]
    loaded = load_weights(tmp_path)
    assert loaded.fingerprint == fingerprint_of(network, Thresholds(0.4, 0.2))


@pytest.fixture
def keras_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_keras_folder(StarDistNetwork(SMALL), Thresholds(0.4, 0.3), tmp_path)
    return tmp_path


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_keras_file_is_refused(keras_folder: Path, fraction: float) -> None:
    path = keras_folder / "weights_best.h5"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])
    with pytest.raises(WeightsError, match=r"weights_best\.h5"):
        load_weights(keras_folder)


@pytest.mark.parametrize("seed", range(20))
def test_keras_file_with_overwritten_bytes_is_read_or_refused_by_name(keras_folder: Path, seed: int) -> None:
    path = keras_folder / "weights_best.h5"
    content = bytearray(path.read_bytes())
    rng = np.random.default_rng(seed)
    for position in rng.integers(len(content), size=40):
        content[position] = int(rng.integers(256))
    path.write_bytes(bytes(content))
    reason = ""
    try:
        load_weights(keras_folder)
    except WeightsError as error:
        reason = str(error)
    assert not reason or "weights_best.h5" in reason


def _delete(file: h5py.File, layer: str) -> None:
    del file[layer]


def _forget(file: h5py.File, layer: str) -> None:
    file.attrs["layer_names"] = [name for name in file.attrs["layer_names"] if name != layer.encode()]


def _replace(file: h5py.File, layer: str, array: np.ndarray) -> None:
    name = f"{layer}/{layer}/kernel:0"
    del file[name]
    file[name] = array


def _declare_huge(file: h5py.File, layer: str) -> None:
    name = f"{layer}/{layer}/kernel:0"
    del file[name]
    file.create_dataset(name, shape=(3, 3, 2**20, 2**20), dtype="f4", chunks=(1, 1, 64, 64))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda file: _delete(file, "middle_2"), "middle_2"),
        (lambda file: _forget(file, "middle_2"), r"missing \['middle_2\.bias', 'middle_2\.weight'\]"),
        (lambda file: _replace(file, "dist", np.zeros((1, 1, 3, 5))), r"dist\.weight has shape \(5, 3, 1, 1\)"),
        (lambda file: _replace(file, "dist", np.zeros((3, 4))), "four axes"),
        (lambda file: _replace(file, "dist", np.full((1, 1, 3, 4), np.nan)), "not finite"),
        (lambda file: _replace(file, "dist", np.array([b"text"])), "dist|weight file"),
        (lambda file: file.__delitem__("dist/dist/bias:0"), "a kernel of four axes and a bias"),
        (lambda file: file.attrs.__delitem__("layer_names"), "layer_names"),
        (lambda file: _declare_huge(file, "dist"), "more than any"),
    ],
)
def test_keras_file_that_does_not_fit_is_refused_with_the_reason(
    keras_folder: Path, damage: Callable[[h5py.File], None], reason: str
) -> None:
    with h5py.File(keras_folder / "weights_best.h5", "r+") as file:
        damage(file)
    with pytest.raises(WeightsError, match=reason) as refused:
        load_weights(keras_folder)
    assert "weights_best.h5" in str(refused.value)


@pytest.mark.parametrize("content", ["{}", '{"prob": null}', None])
def test_thresholds_that_are_not_stated_are_the_stock_defaults(
    keras_folder: Path, content: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    path = keras_folder / "thresholds.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    assert load_weights(keras_folder).thresholds == Thresholds(prob=0.5, nms=0.4)
    assert "thresholds.json" in caplog.text


@pytest.mark.parametrize("value", ["1.5", "0", "-0.1", "NaN", '"high"', "true", "[0.5]"])
def test_thresholds_that_make_no_sense_are_refused(keras_folder: Path, value: str) -> None:
    (keras_folder / "thresholds.json").write_text(f'{{"prob": 0.5, "nms": {value}}}')
    with pytest.raises(WeightsError, match=r"thresholds\.json.*nms"):
        load_weights(keras_folder)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"", b"[1, 2]", b"[" * 100_000, b"null"])
def test_config_that_is_no_json_object_is_refused(keras_folder: Path, content: bytes) -> None:
    (keras_folder / "config.json").write_bytes(content)
    with pytest.raises(WeightsError, match=r"config\.json"):
        load_weights(keras_folder)


def test_weight_file_of_another_name_is_taken_only_where_it_is_alone(keras_folder: Path) -> None:
    best = keras_folder / "weights_best.h5"
    content = best.read_bytes()
    best.rename(keras_folder / "epoch_12.h5")
    assert load_weights(keras_folder).network.config == SMALL
    (keras_folder / "epoch_13.h5").write_bytes(content)
    with pytest.raises(WeightsError, match="2 other h5 files"):
        load_weights(keras_folder)
    (keras_folder / "weights_last.h5").write_bytes(content)
    assert load_weights(keras_folder).network.config == SMALL
