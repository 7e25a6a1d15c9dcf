"""Rules that bring crops to 48 x 48 counts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctc_ray.errors import SchemaError
from ctc_ray.imports.fitting import CountsRule, fit_crop, to_counts

EIGHT, TWELVE = CountsRule("uint8", 255), CountsRule("uint16", 4095, any_integer=True)


def _crop(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(height * 100 + width).integers(1, 4096, (channels, height, width), dtype=np.uint16)


def test_exact_takes_48_and_refuses_the_rest() -> None:
    crop = _crop(48, 48, channels=4)
    assert np.array_equal(fit_crop(crop, ("exact",)), crop)
    with pytest.raises(SchemaError, match=r"40 x 48 px.*exact"):
        fit_crop(_crop(40, 48), ("exact",))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 120), st.integers(1, 120), st.sampled_from(["pad-zero", "pad-edge", "pad-reflect"]))
def test_cut_and_pad_keep_every_pixel_of_the_centre_where_it_was(height: int, width: int, rule: str) -> None:
    crop = _crop(height, width)
    fitted = fit_crop(crop, ("crop-centre", rule))  # type: ignore[arg-type]
    assert fitted.shape == (3, 48, 48)
    for row in range(48):
        for col in (0, 5, 24, 47):
            r = row - (48 - height) // 2 if height < 48 else row + (height - 48) // 2
            c = col - (48 - width) // 2 if width < 48 else col + (width - 48) // 2
            if 0 <= r < height and 0 <= c < width:
                assert fitted[1, row, col] == crop[1, r, c]
            elif rule == "pad-zero":
                assert fitted[1, row, col] == 0
            elif rule == "pad-edge":
                assert fitted[1, row, col] == crop[1, min(max(r, 0), height - 1), min(max(c, 0), width - 1)]


def test_pad_reflect_mirrors_without_repeating_the_border() -> None:
    crop = _crop(40, 40)
    fitted = fit_crop(crop, ("pad-reflect",))
    assert np.array_equal(fitted[:, 3, 4:44], crop[:, 1])
    assert np.array_equal(fitted[:, 4:44, 44], crop[:, :, 38])


def test_padding_alone_refuses_what_is_too_large() -> None:
    with pytest.raises(SchemaError, match=r"60 x 40 px.*pad-zero does not make it"):
        fit_crop(_crop(60, 40), ("pad-zero",))


@pytest.mark.parametrize("side", [32, 96])
def test_bilinear_agrees_with_torch(side: int) -> None:
    torch = pytest.importorskip("torch")
    crop = _crop(side, side)
    values = torch.from_numpy(crop.astype(np.float32))[None]
    theirs = torch.nn.functional.interpolate(values, (48, 48), mode="bilinear", antialias=True)[0].numpy()
    assert np.abs(fit_crop(crop, ("bilinear",)).astype(float) - theirs).max() <= 0.51


def test_bilinear_refuses_to_distort_and_leaves_48_alone() -> None:
    with pytest.raises(SchemaError, match="distort"):
        fit_crop(_crop(40, 41), ("bilinear",))
    assert np.array_equal(fit_crop(_crop(48, 48), ("bilinear",)), _crop(48, 48))


def test_counts_stay_as_they_are() -> None:
    crop = _crop(48, 48)
    assert np.array_equal(to_counts(crop, TWELVE), crop)
    assert to_counts(crop.astype(np.int32), TWELVE).dtype == np.uint16


@pytest.mark.parametrize(
    ("crop", "rule", "why"),
    [
        (np.full((3, 2, 2), 4096, np.uint16), TWELVE, "outside 0 to 4095"),
        (np.full((3, 2, 2), -1, np.int32), TWELVE, "from -1"),
        (np.zeros((3, 2, 2), np.uint8), TWELVE, "uint8 in an import of uint16"),
        (np.zeros((3, 2, 2), np.uint16), EIGHT, "uint16 in an import of uint8"),
        (np.full((3, 2, 2), 7, np.uint16), CountsRule("uint8", 255, any_integer=True), "uint16 in an import of uint8"),
        (np.zeros((3, 2, 2), np.int32), EIGHT, "int32 in an import of uint8"),
        (np.zeros((3, 2, 2), bool), TWELVE, "bool"),
        (np.zeros((3, 2, 2), np.float32), TWELVE, "float_maximum"),
    ],
)
def test_counts_that_would_not_be_comparable_are_refused(crop: np.ndarray, rule: CountsRule, why: str) -> None:
    with pytest.raises(SchemaError, match=why):
        to_counts(crop, rule)


def test_floats_are_scaled_by_the_named_maximum_and_nan_is_refused() -> None:
    rule = CountsRule("uint16", 4095, float_maximum=1.0)
    crop = np.array([0.0, 0.5, 1.0, 0.25]).reshape(1, 2, 2)
    assert to_counts(crop, rule).ravel().tolist() == [0, 2048, 4095, 1024]
    for value, why in (
        (np.nan, "1 of 4 pixels are not finite"),
        (1.1, "outside 0 to float_maximum"),
        (-0.1, "outside"),
    ):
        bad = crop.copy()
        bad[0, 0, 0] = value
        with pytest.raises(SchemaError, match=why):
            to_counts(bad, rule)
