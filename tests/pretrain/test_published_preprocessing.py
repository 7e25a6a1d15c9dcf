"""Imported weights see what they saw in the reference: each 8-bit channel bilinear to 224 px, /255, to -1..1."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ctc_ray.embed.embedder import Embedder
from ctc_ray.errors import WeightsError
from ctc_ray.phantom import draw_crops
from ctc_ray.pretrain.encoder import EncoderSpec, build_backbone, load_strictly
from ctc_ray.pretrain.imports import encode_published


class Eye(torch.nn.Module):
    """A backbone that keeps what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = torch.empty(0)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen = images.clone()
        return torch.zeros(len(images), 128)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> EncoderSpec:
    file = tmp_path_factory.mktemp("weights") / "ctc_dino.pt"
    state = build_backbone("xcit_nano_12_p8").state_dict()
    torch.save({f"backbone.{name}": value for name, value in state.items()}, file)
    return encode_published(file)[1]


def by_pil(crop_CHW: np.ndarray, mode: str) -> np.ndarray:
    """The reference's own way, channel by channel; in mode L, PIL rounds the resized image to whole counts."""
    planes = [Image.fromarray(plane).convert(mode) for plane in crop_CHW]
    resized = [np.asarray(plane.resize((224, 224), Image.Resampling.BILINEAR), np.float64) for plane in planes]
    return np.stack(resized) / 255 * 2 - 1


def test_network_sees_what_pil_gives(spec: EncoderSpec) -> None:
    crops, _ = draw_crops(12, seed=0)
    assert crops.dtype == np.uint8
    eye = Eye()
    Embedder(eye, spec, precision="fp32", device=torch.device("cpu"))(crops)
    seen = eye.seen.numpy()
    assert seen.shape == (12, 3, 224, 224)
    np.testing.assert_allclose(seen, np.stack([by_pil(crop, "F") for crop in crops]), rtol=0, atol=2e-5)
    # As 8-bit images PIL rounds after each of its two passes: at most one count, and half of them up.
    difference_counts = (seen - np.stack([by_pil(crop, "L") for crop in crops])) / 2 * 255
    assert np.abs(difference_counts).max() <= 1.0 + 1e-3
    assert abs(difference_counts.mean()) < 0.05


def test_unexpected_and_missing_names_are_both_named(tmp_path: Path) -> None:
    state = {f"backbone.{name}": value for name, value in build_backbone("xcit_nano_12_p8").state_dict().items()}
    state["backbone.cls_tokens"] = state.pop("backbone.cls_token")
    torch.save(state, tmp_path / "ctc_dino.pt")
    with pytest.raises(WeightsError, match=r"1 missing \(cls_token\); 1 unexpected \(cls_tokens\)"):
        encode_published(tmp_path / "ctc_dino.pt")


def test_weights_for_four_channels_are_refused_by_a_backbone_of_three() -> None:
    state = dict(build_backbone("xcit_nano_12_p8", channels=4).state_dict())
    with pytest.raises(WeightsError, match=r"1 of another shape \(patch_embed.*number of channels"):
        load_strictly(build_backbone("xcit_nano_12_p8"), state, "ctc_dino.pt")
