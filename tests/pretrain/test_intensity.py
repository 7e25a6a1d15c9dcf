"""Intensity rules: what the encoder sees of raw counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctc_ray.errors import ConfigError, SchemaError
from ctc_ray.pretrain.intensity import (
    IntensityRule,
    constants_from_histogram,
    fraction_histogram,
    scale_for_network,
    to_fraction,
    to_unit,
)


def _crops(seed: int = 0, num: int = 6, dtype: str = "uint8") -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, np.iinfo(dtype).max, (num, 3, 48, 48), endpoint=True).astype(dtype)


def test_scale_reference_maps_full_scale_to_minus_one_and_one() -> None:
    crops = np.zeros((1, 3, 48, 48), np.uint8)
    crops[0, 1] = 255
    scaled = scale_for_network(to_fraction(crops), IntensityRule("reference"))
    assert scaled[0, 0].unique().tolist() == [-1.0]
    assert scaled[0, 1].unique().tolist() == [1.0]


def test_scale_minmax_stretches_each_channel_and_keeps_blank_channel_finite() -> None:
    crops = _crops()
    crops[0, 2] = 77
    scaled = scale_for_network(to_fraction(crops), IntensityRule("minmax"))
    assert torch.isfinite(scaled).all()
    assert float(scaled[1].amin()) == -1.0
    assert float(scaled[1].amax()) == 1.0
    assert float(scaled[0, 2].amax()) == -1.0


def test_scale_constants_maps_low_and_high_to_ends_of_range() -> None:
    rule = IntensityRule("constants", (0.1, 0.2, 0.0), (0.5, 0.9, 1.0))
    fraction = torch.tensor([0.1, 0.2, 0.0]).view(1, 3, 1, 1)
    assert torch.allclose(scale_for_network(fraction, rule), torch.tensor(-1.0))
    fraction = torch.tensor([0.5, 0.9, 1.0]).view(1, 3, 1, 1)
    assert torch.allclose(scale_for_network(fraction, rule), torch.tensor(1.0))


def test_compression_keeps_ends_and_lifts_dim_signal() -> None:
    fraction = torch.tensor([0.0, 0.05, 1.0]).view(1, 1, 1, 3)
    linear = scale_for_network(fraction, IntensityRule("constants", (0.0,), (1.0,)))
    lifted = scale_for_network(fraction, IntensityRule("constants", (0.0,), (1.0,), compression=20.0))
    assert torch.allclose(linear[..., [0, 2]], lifted[..., [0, 2]], atol=1e-6)
    assert float(lifted[..., 1]) > float(linear[..., 1]) + 0.3


@given(st.integers(0, 2**32 - 1), st.sampled_from([257, 256]))
@settings(max_examples=10, deadline=None)
def test_fraction_of_eight_and_sixteen_bit_versions_agrees(seed: int, factor: int) -> None:
    crops = _crops(seed, num=1)
    wide = crops.astype(np.uint16) * np.uint16(factor)
    assert float((to_fraction(crops) - to_fraction(wide)).abs().max()) <= 1 / 256


def test_fraction_of_twelve_bit_crops_uses_given_full_scale() -> None:
    crops = np.full((1, 3, 48, 48), 4095, np.uint16)
    assert float(to_fraction(crops, full_scale=4095).amax()) == 1.0


@pytest.mark.parametrize("crops", [np.zeros((2, 3, 48, 48), np.float32), np.zeros((3, 48, 48), np.uint8)])
def test_fraction_of_wrong_dtype_or_shape_raises_schema_error(crops: np.ndarray) -> None:
    with pytest.raises(SchemaError, match="expected"):
        to_fraction(crops)


def test_histograms_of_parts_add_up_to_histogram_of_whole() -> None:
    crops = _crops(num=8, dtype="uint16")
    parts = fraction_histogram(crops[:3]) + fraction_histogram(crops[3:])
    assert np.array_equal(parts, fraction_histogram(crops))
    assert parts.sum() == crops.size


def test_constants_match_numpy_percentiles() -> None:
    rng = np.random.default_rng(1)
    crops = rng.gamma(2.0, 20.0, (40, 3, 48, 48)).clip(0, 255).astype(np.uint8)
    rule = constants_from_histogram(fraction_histogram(crops), low_percentile=5, high_percentile=95)
    for channel in range(3):
        low, high = np.percentile(crops[:, channel], [5, 95]) / 255
        assert rule.low[channel] == pytest.approx(low, abs=1 / 255)
        assert rule.high[channel] == pytest.approx(high, abs=1 / 255)


def test_constants_of_sparse_channel_take_its_brightest_pixels() -> None:
    crops = np.zeros((10, 1, 48, 48), np.uint8)
    crops[0, 0, 0, 0] = 200
    rule = constants_from_histogram(fraction_histogram(crops))
    assert rule.high[0] == pytest.approx(200 / 255, abs=0.01)


def test_constants_of_constant_channel_raise_schema_error() -> None:
    crops = _crops()
    crops[:, 1] = 9
    with pytest.raises(SchemaError, match="channel 1"):
        constants_from_histogram(fraction_histogram(crops))


def test_rule_with_reversed_constants_raises_config_error() -> None:
    with pytest.raises(ConfigError, match="channel 0"):
        IntensityRule("constants", (0.5,), (0.5,))


def test_rule_survives_json() -> None:
    rule = IntensityRule("constants", (0.1, 0.2), (0.8, 0.9), 20.0)
    assert IntensityRule.from_json(rule.to_json()) == rule


def test_unit_with_other_channel_count_raises_schema_error() -> None:
    with pytest.raises(SchemaError, match="4 channels"):
        to_unit(torch.zeros(1, 4, 2, 2), IntensityRule("constants", (0.0,) * 3, (1.0,) * 3))
