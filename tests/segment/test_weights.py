"""Weight folders: what is written is read, what does not fit is refused with the reason."""

from __future__ import annotations

import io
import json
import urllib.error
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from ctc_ray.errors import WeightsError
from ctc_ray.segment import weights as weights_module
from ctc_ray.segment.network import NetworkConfig, StarDistNetwork
from ctc_ray.segment.weights import Thresholds, download, fingerprint_of, load_weights, read_keras, save_folder

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


def test_download_without_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str, timeout: float) -> None:
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(weights_module.urllib.request, "urlopen", refuse)
    with pytest.raises(WeightsError, match="by hand"):
        download("2D_demo", cache=tmp_path)


def test_download_of_a_changed_archive_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("config.json", "{}")
    monkeypatch.setattr(weights_module.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(content.getvalue()))
    with pytest.raises(WeightsError, match="sha256"):
        download("2D_demo", cache=tmp_path)
    assert not (tmp_path / "2D_demo").exists()
