from __future__ import annotations

import numpy as np
import pytest

from ctc_ray.phantom.optics import CAMERAS, CK_TO_CD45, CK_TO_DAPI, FULL_SCALE, bleed, expose, illumination, quantise
from ctc_ray.phantom.patients import PatientFactors


@pytest.mark.parametrize("page", [0, 1, 2, 3])
@pytest.mark.parametrize("level", [60.0, 600.0, 2000.0])
def test_expose_flat_light_follows_poisson_and_read_noise_law(page: int, level: float) -> None:
    camera = CAMERAS[page]
    counts = expose(np.full((400, 400), level, np.float32), page, np.random.default_rng(page))
    expected = camera.gain**2 * (level / camera.gain + camera.read_noise**2) + 1.0 / 12.0
    assert counts.mean() == pytest.approx(level + camera.offset, rel=0.005)
    assert counts.var() == pytest.approx(expected, rel=0.03)


def test_expose_dim_light_has_the_skewness_of_poisson() -> None:
    electrons = 12.0
    camera = CAMERAS[2]
    light = np.full((600, 600), electrons * camera.gain, np.float32)
    rng = np.random.default_rng(3)
    counts = (expose(light, 2, rng) - camera.offset) / camera.gain
    third = float(((counts - counts.mean()) ** 3).mean())
    # Read noise is symmetric: the third central moment of the sum is that of the photons, which equals their mean.
    assert third == pytest.approx(electrons, rel=0.35)


def test_expose_bright_light_saturates_at_full_scale() -> None:
    counts = expose(np.full((50, 50), 3.0 * FULL_SCALE, np.float32), 1, np.random.default_rng(0))
    assert np.all(counts == FULL_SCALE)


def test_expose_same_generator_state_gives_same_counts() -> None:
    light = np.full((30, 30), 90.0, np.float32)
    first, second = (expose(light, 0, np.random.default_rng(5)) for _ in range(2))
    assert np.array_equal(first, second)


def test_quantise_to_eight_bits_is_the_twelve_bit_image_divided_by_sixteen() -> None:
    counts = np.arange(FULL_SCALE + 1, dtype=np.float32).reshape(64, 64)
    assert np.array_equal(quantise(counts, "uint8"), quantise(counts, "uint16") // 16)
    assert quantise(counts, "uint8").max() == 255
    with pytest.raises(ValueError, match="uint8 or uint16"):
        quantise(counts, "float32")


def test_bleed_adds_fixed_fractions_of_ck_to_other_channels() -> None:
    light = np.zeros((2, 3, 4, 4), np.float32)
    light[:, 1] = 1000.0
    bleed(light)
    assert np.allclose(light[:, 2], 1000.0 * CK_TO_CD45)
    assert np.allclose(light[:, 0], 1000.0 * CK_TO_DAPI)
    assert np.all(light[:, 1] == 1000.0)


def test_illumination_is_one_at_most_and_falls_towards_corners() -> None:
    patient = PatientFactors.draw(1, "P01")
    rows, cols = illumination(patient, np.arange(1036, dtype=np.float32), np.arange(1384, dtype=np.float32))
    lamp = rows[:, None] + cols
    assert lamp.max() == pytest.approx(1.0, abs=1e-4)
    corner = min(lamp[0, 0], lamp[0, -1], lamp[-1, 0], lamp[-1, -1])
    assert 0.5 < corner < 1.0 - 0.5 * patient.vignette
