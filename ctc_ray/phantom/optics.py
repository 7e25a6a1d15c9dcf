"""Light to counts: bleed between channels, uneven illumination and background, and the camera.

Legend: N crops or fields, C channels in the order of `Channel`, H rows, W columns. Counts are those of a 12-bit camera.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ctc_ray.phantom.objects import FloatArray
from ctc_ray.phantom.patients import PatientFactors
from ctc_ray.phantom.seeding import generator
from ctc_ray.schema import FIELD_HEIGHT_PX, FIELD_WIDTH_PX

FULL_SCALE = 4095
"""Largest count of the camera; brighter pixels saturate here."""


@dataclass(frozen=True)
class Camera:
    """One page's exposure.

    Attributes:
        gain: counts per electron; long exposures with high gain (CD45) are noisier.
        offset: counts without light.
        read_noise: electrons, standard deviation.
        background: counts of stray light and unbound stain at the brightest point of the field.
        stripe: counts, standard deviation of the fixed offset of each sensor column.
    """

    gain: float
    offset: float
    read_noise: float
    background: float
    stripe: float


CAMERAS: tuple[Camera, Camera, Camera, Camera] = (
    Camera(gain=0.7, offset=30.0, read_noise=9.0, background=60.0, stripe=3.0),
    Camera(gain=0.8, offset=30.0, read_noise=9.0, background=55.0, stripe=3.0),
    Camera(gain=1.6, offset=30.0, read_noise=8.0, background=60.0, stripe=5.0),
    Camera(gain=1.0, offset=30.0, read_noise=9.0, background=50.0, stripe=3.0),
)
"""DAPI, CK, CD45 and the extra page."""

CK_TO_CD45 = 0.014
"""Fraction of the CK signal (PE) seen in the CD45 channel (APC): bright CK shines through. Source: paper, cluster 0."""
CK_TO_DAPI = 0.004


def bleed(light: FloatArray) -> None:
    """Add the CK signal that leaks into CD45 and DAPI, in place; light is (..., C, H, W)."""
    ck = light[..., 1, :, :]
    light[..., 2, :, :] += np.float32(CK_TO_CD45) * ck
    light[..., 0, :, :] += np.float32(CK_TO_DAPI) * ck


def illumination(patient: PatientFactors, rows: FloatArray, cols: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Row and column terms of the relative illumination, 1 at the brightest point.

    The illumination of a pixel is the sum of its two terms; it depends on the place in the field, not on the cell.

    Args:
        patient: whose cartridge.
        rows: (..., H) coordinates in the field, px.
        cols: (..., W) coordinates in the field, px.

    Returns:
        Terms shaped like rows and cols.
    """
    down = rows / FIELD_HEIGHT_PX - patient.vignette_centre[0]
    right = cols / FIELD_WIDTH_PX - patient.vignette_centre[1]
    # 0.5 is about the squared distance from the centre to a corner, in fractions of the field.
    loss = np.float32(patient.vignette / 0.5)
    return (np.float32(1.0) - loss * down**2).astype(np.float32), (-loss * right**2).astype(np.float32)


def column_stripes(seed: int, patient: str, page: int) -> FloatArray:
    """(FIELD_WIDTH_PX,) fixed offset of each sensor column in counts, the same in every field of a patient."""
    rng = generator(seed, "stripes", patient, page)
    return np.asarray(CAMERAS[page].stripe * rng.standard_normal(FIELD_WIDTH_PX), dtype=np.float32)


def expose(light: FloatArray, page: int, rng: np.random.Generator, stripes: FloatArray | float = 0.0) -> FloatArray:
    """Turn expected light into what the camera reads.

    Photon noise is Poisson. Its deviates come from a normal deviate through the Cornish-Fisher expansion of the Poisson
    quantile (mean, variance and skewness are exact; backgrounds keep every pixel well above ten electrons, where the
    distributions agree within 1 %), which is several times faster than exact draws.

    Args:
        light: (..., H, W) float32 expected counts, background included, offset not.
        page: index into `CAMERAS`.
        rng: source of the noise.
        stripes: column offsets in counts, broadcast against light.

    Returns:
        Counts shaped like light, float32 integers from 0 to `FULL_SCALE`.
    """
    camera = CAMERAS[page]
    electrons = np.maximum(light, 0.0) * np.float32(1.0 / camera.gain)
    z = rng.standard_normal(light.shape, dtype=np.float32)
    noisy = electrons + np.sqrt(electrons) * z + (z * z - np.float32(1.0)) * np.float32(1.0 / 6.0)
    np.rint(np.maximum(noisy, 0.0, out=noisy), out=noisy)
    rng.standard_normal(dtype=np.float32, out=z)
    noisy += np.float32(camera.read_noise) * z
    noisy *= np.float32(camera.gain)
    noisy += np.float32(camera.offset) + stripes
    np.rint(noisy, out=noisy)
    return np.asarray(np.clip(noisy, 0.0, FULL_SCALE, out=noisy), dtype=np.float32)


def quantise(counts: FloatArray, dtype: str) -> npt.NDArray[np.uint8] | npt.NDArray[np.uint16]:
    """Store counts as 12 bits in uint16, or as 8 bits with one fixed gain for every page of the cohort.

    Args:
        counts: float32 integers from 0 to `FULL_SCALE`.
        dtype: `uint8` (counts / 16, rounded down) or `uint16` (counts as they are).

    Raises:
        ValueError: another dtype.
    """
    if dtype == "uint16":
        return counts.astype(np.uint16)
    if dtype == "uint8":
        return (counts.astype(np.uint16) >> 4).astype(np.uint8)
    raise ValueError(f"phantom images are uint8 or uint16, not {dtype!r}: choose bit_depth 8 or 16")
