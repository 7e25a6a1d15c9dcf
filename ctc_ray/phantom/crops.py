"""The fast path: 48x48 crops around cells without drawing a field, for scale tests and training."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from ctc_ray.errors import ConfigError
from ctc_ray.phantom.kinds import CK_KINDS, KINDS, PROFILES, CellKind, Profile
from ctc_ray.phantom.objects import FloatArray, Objects, concatenate
from ctc_ray.phantom.optics import CAMERAS, bleed, column_stripes, expose, illumination, quantise
from ctc_ray.phantom.patients import PatientFactors
from ctc_ray.phantom.population import draw_objects
from ctc_ray.phantom.render import paste_crops, render
from ctc_ray.phantom.scatter import (
    DENSE_RADIUS_PX,
    DENSE_SPACING_PX,
    give_own_space,
    leukocytes_at,
    pack_nuclei,
    place_companions,
)
from ctc_ray.phantom.seeding import generator
from ctc_ray.schema import CROP_SIZE_PX, FIELD_HEIGHT_PX, FIELD_WIDTH_PX

_FAST_PATH_PATIENTS = 16
_MARGIN_PX = 10.0
"""Neighbours whose centre lies this far outside the crop still shine into it."""


def draw_crops(
    n: int,
    *,
    seed: int,
    profile: Profile = PROFILES["paper"],
    dtype: str = "uint8",
    kinds: Mapping[CellKind | str, float] | None = None,
    patient: str | int | None = None,
) -> tuple[npt.NDArray[np.uint8] | npt.NDArray[np.uint16], npt.NDArray[np.str_]]:
    """Draw crops centred on CK objects with the cell model, optics and camera of `draw_field`.

    Args:
        n: number of crops.
        seed: the same arguments and seed give the same crops.
        profile: mix of cells, and density of their neighbours.
        dtype: `uint8` or `uint16`; both come from the same counts.
        kinds: weights of the kinds to draw instead of the profile's.
        patient: whose cells; by default those of sixteen patients in turn.

    Returns:
        Crops (n, 3, 48, 48) in the order of `Channel`, and the kind of each as text (n,).

    Raises:
        ConfigError: n is negative, a kind is unknown, or no weight is positive.
    """
    if n < 0:
        raise ConfigError(f"cannot draw {n} crops: give a number from 0")
    codes, weights = _kind_weights(profile, kinds)
    crops = np.empty((n, 3, CROP_SIZE_PX, CROP_SIZE_PX), dtype=dtype)
    names = np.array([str(kind) for kind in KINDS])
    drawn = np.empty(n, dtype=np.int8)
    chunk = int(np.clip(n // _FAST_PATH_PATIENTS, 32, 256))
    for number, start in enumerate(range(0, n, chunk)):
        size = min(chunk, n - start)
        name = str(patient) if patient is not None else f"fast-{number % _FAST_PATH_PATIENTS:02d}"
        rng = generator(seed, "crops", name, number)
        code = rng.choice(codes, size=size, p=weights)
        crops[start : start + size] = _draw_chunk(code, profile, name, seed, rng, dtype)
        drawn[start : start + size] = code
    if patient is None:
        order = generator(seed, "crops", "order").permutation(n)
        crops, drawn = crops[order], drawn[order]
    return crops, names[drawn]


def _kind_weights(
    profile: Profile, kinds: Mapping[CellKind | str, float] | None
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float64]]:
    if kinds is None:
        return np.array([kind.code for kind in CK_KINDS], dtype=np.int8), np.asarray(profile.weights())
    known = [str(kind) for kind in KINDS]
    unknown = [str(kind) for kind in kinds if str(kind) not in known]
    if unknown:
        raise ConfigError(f"unknown kind {unknown[0]!r} in kinds: use one of {', '.join(known)}")
    weights = np.array([float(weight) for weight in kinds.values()])
    if len(weights) == 0 or (weights < 0).any() or weights.sum() <= 0:
        raise ConfigError(f"kinds needs weights from 0 with at least one above 0, not {dict(kinds)}")
    return np.array([CellKind(str(kind)).code for kind in kinds], dtype=np.int8), weights / weights.sum()


def _draw_chunk(
    code: npt.NDArray[np.int8], profile: Profile, patient: str, seed: int, rng: np.random.Generator, dtype: str
) -> npt.NDArray[np.uint8] | npt.NDArray[np.uint16]:
    """Crops of one patient."""
    n = len(code)
    factors = PatientFactors.draw(seed, patient)
    # A crop is cut at the rounded centroid of a detection, which is near the cell's centre but not on it.
    centre = CROP_SIZE_PX / 2 + rng.uniform(-0.5, 0.5, (n, 2)) + rng.normal(0.0, 0.6, (n, 2))
    cells = draw_objects(code, factors, rng)
    cells = cells.moved(centre[:, 0].astype(np.float32), centre[:, 1].astype(np.float32))
    neighbours, neighbour_crop = _neighbours(cells, profile, factors, rng)
    objects = concatenate([cells, neighbours])
    crop_of = np.concatenate([np.arange(n, dtype=np.intp), neighbour_crop])
    light = np.zeros((n, 3, CROP_SIZE_PX, CROP_SIZE_PX), dtype=np.float32)
    for stamps in render(objects):
        paste_crops(light, crop_of, stamps)
    bleed(light)
    return _photograph(light, factors, patient, seed, rng, dtype)


def _neighbours(
    cells: Objects, profile: Profile, factors: PatientFactors, rng: np.random.Generator
) -> tuple[Objects, npt.NDArray[np.intp]]:
    """What else lies in the crops: leukocytes in contact, loose ones, packed nuclei, other CK objects."""
    n = len(cells)
    side = CROP_SIZE_PX + 2.0 * _MARGIN_PX
    share = side * side / (FIELD_HEIGHT_PX * FIELD_WIDTH_PX)
    companions, companion_crop = place_companions(cells, factors, rng)
    loose = rng.poisson(profile.background_leukocytes * factors.leukocyte_density * share, n)
    loose_crop = np.repeat(np.arange(n, dtype=np.intp), loose)
    at = rng.uniform(-_MARGIN_PX, CROP_SIZE_PX + _MARGIN_PX, (len(loose_crop), 2)).astype(np.float32)
    others, other_crop = _other_ck_objects(cells, profile, share, factors, rng)
    dense_crop = np.flatnonzero(np.isin(cells.kind, [kind.code for kind in KINDS if kind.is_dense]))
    packed = [_packed_around(cells, int(crop), rng) for crop in dense_crop]
    points = np.concatenate([at, *packed])
    crop_of = np.concatenate(
        [loose_crop, *(np.full(len(part), crop) for part, crop in zip(packed, dense_crop, strict=True))]
    )
    leukocytes = leukocytes_at(points, factors, rng)
    together = concatenate([companions, others, leukocytes])
    return together, np.concatenate([companion_crop, other_crop, crop_of]).astype(np.intp)


def _packed_around(cells: Objects, crop: int, rng: np.random.Generator) -> FloatArray:
    """Packed nuclei of the region that one cell lies somewhere in, as far as they reach into its crop."""
    radius = rng.uniform(*DENSE_RADIUS_PX)
    away, angle = 0.75 * radius * np.sqrt(rng.random()), rng.uniform(0.0, 2.0 * np.pi)
    cell = cells.take(slice(crop, crop + 1))
    middle = (float(cell.row[0] + away * np.sin(angle)), float(cell.col[0] + away * np.cos(angle)))
    points = pack_nuclei(middle, radius, rng.uniform(*DENSE_SPACING_PX), rng)
    near = ((points > -_MARGIN_PX) & (points < CROP_SIZE_PX + _MARGIN_PX)).all(axis=1)
    return give_own_space(points[near], cell)


def _other_ck_objects(
    cells: Objects, profile: Profile, share: float, factors: PatientFactors, rng: np.random.Generator
) -> tuple[Objects, npt.NDArray[np.intp]]:
    """CK objects that happen to lie in the crop of another, at the density of the field."""
    codes = np.array([kind.code for kind in CK_KINDS], dtype=np.int8)
    weights = np.asarray(profile.weights()) * [not kind.is_dense for kind in CK_KINDS]
    count = rng.poisson(profile.ck_objects_mean * share, len(cells))
    crop_of = np.repeat(np.arange(len(cells), dtype=np.intp), count)
    others = draw_objects(rng.choice(codes, size=len(crop_of), p=weights / weights.sum()), factors, rng)
    at = rng.uniform(-_MARGIN_PX, CROP_SIZE_PX + _MARGIN_PX, (len(crop_of), 2)).astype(np.float32)
    # Field placement keeps CK objects apart; those that would fall onto the cell are left out.
    apart = np.hypot(at[:, 0] - cells.row[crop_of], at[:, 1] - cells.col[crop_of]) >= 20.0
    return others.moved(at[:, 0], at[:, 1]).take(apart), crop_of[apart]


def _photograph(
    light: FloatArray, factors: PatientFactors, patient: str, seed: int, rng: np.random.Generator, dtype: str
) -> npt.NDArray[np.uint8] | npt.NDArray[np.uint16]:
    n = len(light)
    top = rng.integers(0, FIELD_HEIGHT_PX - CROP_SIZE_PX, n)
    left = rng.integers(0, FIELD_WIDTH_PX - CROP_SIZE_PX, n)
    pixels = np.arange(CROP_SIZE_PX)
    rows, cols = top[:, None] + pixels, left[:, None] + pixels
    row_term, col_term = illumination(factors, rows.astype(np.float32), cols.astype(np.float32))
    lamp = row_term[:, :, None] + col_term[:, None, :]
    crops = np.empty(light.shape, dtype=dtype)
    for channel in range(3):
        level = np.float32(CAMERAS[channel].background * factors.background[channel])
        stripes = column_stripes(seed, patient, channel)[cols][:, None, :]
        crops[:, channel] = quantise(expose((light[:, channel] + level) * lamp, channel, rng, stripes), dtype)
    return crops
