"""Encoders on disk: strict, described, never pickled."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ctc_ray.errors import ConfigError, WeightsError
from ctc_ray.pretrain.encoder import (
    DESCRIPTION_FILE,
    WEIGHTS_FILE,
    EncoderSpec,
    build_backbone,
    embedding_width,
    encode_encoder,
    load_folder,
    same_architecture,
)
from ctc_ray.pretrain.imports import encode_published, read_published
from ctc_ray.pretrain.intensity import IntensityRule

SMALL = "resnet10t"


def _write(folder: Path, *, channels: int = 3, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    backbone = build_backbone(SMALL, channels=channels)
    rule = IntensityRule("constants", (0.0,) * channels, (1.0,) * channels, 3.0)
    spec = EncoderSpec(SMALL, channels, 48, embedding_width(backbone), rule, {"from": "a test"})
    files, _ = encode_encoder(backbone, spec, dtype=dtype)
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return backbone.eval()


def test_default_backbone_gives_128_wide_vectors_at_native_and_local_size() -> None:
    backbone = build_backbone("xcit_nano_12_p8").eval()
    with torch.inference_mode():
        assert backbone(torch.zeros(1, 3, 48, 48)).shape == (1, 128)
        assert backbone(torch.zeros(2, 3, 24, 24)).shape == (2, 128)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", SMALL])
def test_backbone_of_any_timm_name_takes_four_channels_and_both_view_sizes(name: str) -> None:
    backbone = build_backbone(name, channels=4, input_size_px=48).eval()
    with torch.inference_mode():
        assert backbone(torch.zeros(1, 4, 48, 48)).shape[1] == embedding_width(backbone)
        assert torch.isfinite(backbone(torch.zeros(1, 4, 32, 32))).all()


def test_unknown_backbone_raises_with_near_names() -> None:
    with pytest.raises(ConfigError, match="xcit_nano"):
        build_backbone("xcit_nanoo")


def test_architecture_names_with_and_without_size_are_the_same() -> None:
    assert same_architecture("xcit_nano_12_p8", "xcit_nano_12_p8_224")
    assert not same_architecture("xcit_nano_12_p8", "resnet18")


@pytest.mark.parametrize("channels", [3, 4])
def test_written_encoder_loads_with_equal_weights(tmp_path: Path, channels: int) -> None:
    backbone = _write(tmp_path / "e", channels=channels)
    loaded, spec = load_folder(tmp_path / "e")
    assert spec.channels == channels
    assert spec.intensity.compression == 3.0
    assert spec.provenance == {"from": "a test"}
    crops = torch.randn(2, channels, 48, 48)
    with torch.inference_mode():
        assert torch.equal(loaded(crops), backbone(crops))


def test_half_precision_file_is_half_as_large_and_gives_near_vectors(tmp_path: Path) -> None:
    backbone = _write(tmp_path / "full")
    _write(tmp_path / "half", dtype=torch.float16)
    sizes = [(tmp_path / name / WEIGHTS_FILE).stat().st_size for name in ("full", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    loaded, _ = load_folder(tmp_path / "half")
    crops = torch.randn(2, 3, 48, 48)
    with torch.inference_mode():
        cosine = torch.nn.functional.cosine_similarity(loaded(crops), backbone(crops))
    assert float(cosine.min()) > 0.9999


def test_weights_of_another_encoder_are_refused(tmp_path: Path) -> None:
    _write(tmp_path / "a")
    _write(tmp_path / "b", dtype=torch.float16)
    (tmp_path / "a" / WEIGHTS_FILE).write_bytes((tmp_path / "b" / WEIGHTS_FILE).read_bytes())
    with pytest.raises(WeightsError, match="do not belong together"):
        load_folder(tmp_path / "a")


@pytest.mark.parametrize("key", ["architecture", "intensity", "fingerprint"])
def test_description_without_a_key_is_refused(tmp_path: Path, key: str) -> None:
    _write(tmp_path / "e")
    file = tmp_path / "e" / DESCRIPTION_FILE
    value = json.loads(file.read_text())
    del value[key]
    file.write_text(json.dumps(value))
    with pytest.raises(WeightsError, match=key):
        load_folder(tmp_path / "e")


def test_folder_without_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="holds no"):
        load_folder(tmp_path)


def _published(file: Path, *, wrap: bool) -> torch.nn.Module:
    torch.manual_seed(1)
    backbone = build_backbone("xcit_nano_12_p8")
    state = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    state["head.last_layer.weight"] = torch.zeros(2)
    torch.save({"state_dict": state, "epoch": 3} if wrap else state, file)
    return backbone.eval()


@pytest.mark.parametrize("wrap", [True, False])
def test_published_weights_load_strictly_with_reference_preprocessing(tmp_path: Path, wrap: bool) -> None:
    backbone = _published(tmp_path / "ctc_dino.pt", wrap=wrap)
    files, spec = encode_published(tmp_path / "ctc_dino.pt")
    assert (spec.input_size_px, spec.width, spec.intensity) == (224, 128, IntensityRule("reference"))
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    loaded, _ = load_folder(tmp_path)
    for name, value in backbone.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_published_weights_that_lack_a_tensor_are_refused(tmp_path: Path) -> None:
    backbone = build_backbone("xcit_nano_12_p8")
    state = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    del state["backbone.cls_token"]
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="cls_token"):
        encode_published(tmp_path / "w.pt")


def test_file_without_backbone_names_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="weight"):
        read_published(tmp_path / "w.pt")


def test_file_with_code_in_it_is_refused(tmp_path: Path) -> None:
    torch.save({"backbone.a": torch.zeros(1), "hook": Path}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="plain weights"):
        read_published(tmp_path / "w.pt")


def test_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(np.random.default_rng(0).bytes(100))
    with pytest.raises(WeightsError, match="plain weights"):
        read_published(tmp_path / "w.pt")
