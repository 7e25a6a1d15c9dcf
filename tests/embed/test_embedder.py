"""The vector of a crop depends on the crop alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from ctc_ray.embed import Embedder
from ctc_ray.errors import SchemaError, WeightsError
from ctc_ray.phantom import draw_crops
from ctc_ray.pretrain.encoder import DEFAULT_FOLDER, WEIGHTS_FILE, load_folder
from ctc_ray.pretrain.intensity import IntensityRule, scale_for_network, to_fraction


@pytest.fixture(scope="module")
def crops() -> np.ndarray:
    drawn, _ = draw_crops(40, seed=5)
    return drawn


@pytest.fixture(scope="module")
def embed() -> Embedder:
    torch.set_num_threads(1)
    return Embedder.load(precision="fp32")


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


def test_default_encoder_gives_finite_different_vectors(embed: Embedder, crops: np.ndarray) -> None:
    vectors = embed(crops)
    assert vectors.shape == (40, 128)
    assert vectors.dtype == np.float32
    assert np.isfinite(vectors).all()
    assert len(np.unique(vectors.round(4), axis=0)) == 40


def test_vectors_equal_plain_forward_pass(embed: Embedder, crops: np.ndarray) -> None:
    backbone, spec = load_folder(DEFAULT_FOLDER)
    with torch.inference_mode():
        expected = backbone(scale_for_network(to_fraction(crops[:4]), spec.intensity)).numpy()
    assert np.allclose(embed(crops[:4]), expected, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3, 17])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_vector_does_not_depend_on_the_batch(crops: np.ndarray, batch: int, precision: str) -> None:
    whole = Embedder.load(precision=precision)(crops[:20])
    parts = Embedder.load(precision=precision, batch_size=batch)(crops[:20])
    assert _cosine(whole, parts) > 0.9999
    if precision == "fp32":
        assert np.allclose(whole, parts, atol=1e-4 * np.abs(whole).max())


@pytest.mark.parametrize("factor", [257, 256])
def test_sixteen_bit_version_of_a_crop_embeds_alike(embed: Embedder, crops: np.ndarray, factor: int) -> None:
    assert _cosine(embed(crops), embed(crops.astype(np.uint16) * np.uint16(factor))) > 0.999


def test_twelve_bit_version_with_its_full_scale_embeds_alike(embed: Embedder, crops: np.ndarray) -> None:
    twelve = crops.astype(np.uint16) * np.uint16(16)
    assert _cosine(embed(crops), embed(twelve, full_scale=4095)) > 0.999
    assert _cosine(embed(crops), embed(twelve)) < 0.999  # without it the cells are sixteen times too dark


def test_bf16_agrees_with_fp32(embed: Embedder, crops: np.ndarray) -> None:
    assert _cosine(embed(crops), Embedder.load(precision="bf16")(crops)) > 0.999


def test_named_intensity_rules_change_the_vectors(embed: Embedder, crops: np.ndarray) -> None:
    reference = Embedder.load(precision="fp32", intensity="reference")
    minmax = Embedder.load(precision="fp32", intensity="minmax")
    assert reference.rule == IntensityRule("reference")
    assert not np.allclose(reference(crops), embed(crops))
    # Only `minmax` does not see how bright a crop is.
    dimmed = (crops // 2 * 2).astype(np.uint8)
    assert np.allclose(minmax(dimmed), minmax(dimmed // 2), atol=1e-3)
    assert not np.allclose(reference(dimmed), reference(dimmed // 2), atol=1e-3)


def test_read_only_crops_and_no_crops_are_fine(embed: Embedder, crops: np.ndarray) -> None:
    view = crops[:3].copy()
    view.setflags(write=False)
    assert embed(view).shape == (3, 128)
    assert embed(crops[:0]).shape == (0, 128)


def test_constant_crops_give_finite_vectors(embed: Embedder) -> None:
    for value in (0, 255):
        assert np.isfinite(embed(np.full((2, 3, 48, 48), value, np.uint8))).all()


@pytest.mark.parametrize("shape", [(2, 4, 48, 48), (2, 3, 40, 40), (3, 48, 48)])
def test_crops_of_another_shape_are_refused(embed: Embedder, shape: tuple[int, ...]) -> None:
    with pytest.raises(SchemaError, match="takes"):
        embed(np.zeros(shape, np.uint8))


def test_float_crops_are_refused(embed: Embedder) -> None:
    with pytest.raises(SchemaError, match="uint8 or uint16"):
        embed(np.zeros((1, 3, 48, 48), np.float32))


def test_unknown_encoder_is_refused() -> None:
    with pytest.raises(WeightsError, match="no encoder 'nowhere'"):
        Embedder.load("nowhere")


def test_larger_input_size_resizes_bilinearly(embed: Embedder, crops: np.ndarray) -> None:
    backbone, spec = load_folder(DEFAULT_FOLDER)
    wide = Embedder(backbone, dataclasses.replace(spec, input_size_px=64), precision="fp32")
    vectors = wide(crops[:2])
    assert vectors.shape == (2, 128)
    assert not np.allclose(vectors, embed(crops[:2]))


def test_shipped_encoder_is_small_enough_to_ship() -> None:
    assert (DEFAULT_FOLDER / WEIGHTS_FILE).stat().st_size <= 12_000_000
