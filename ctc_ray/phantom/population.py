"""Which cells there are: the distributions that each kind's parameters are drawn from.

All kinds share one cell model; a kind is a set of distributions. Signals are counts of a 12-bit camera (4095 saturates; 16
counts are one level of the 8-bit image).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ctc_ray.phantom.kinds import KINDS, CellKind
from ctc_ray.phantom.objects import NUM_LOBES, NUM_TEXTURES, TEXTURE_NODES, FloatArray, Objects
from ctc_ray.phantom.patients import PatientFactors
from ctc_ray.schema import PIXEL_SIZE_UM

Spread = tuple[float, float]
"""Median and standard deviation of the log of a lognormal quantity."""


@dataclass(frozen=True)
class Appearance:
    """Distributions of one kind. Pairs of `Spread` are lognormal (median, sd of the log), plain pairs are uniform ranges.

    Attributes:
        diameter_um, dapi, ck, cd45, haze: lognormal; signals in counts, a median of 0 switches the signal off.
        axis_ratio: uniform.
        nucleus: uniform, radius of the nucleus over radius of the body.
        lobes: smallest and largest number of nuclear lobes.
        lobe_spread: uniform, distance of lobes from the nucleus' centre over the nucleus' radius.
        nucleus_shift: largest offset of the nucleus over the radius of the body.
        ck_ring, cd45_ring, ck_polarity, ck_exclusion, ck_grain, irregularity, defocus_px: uniform.
        ribbon: the body is a chain along a curve.
    """

    diameter_um: Spread
    dapi: Spread
    ck: Spread
    cd45: Spread = (0.0, 0.0)
    haze: Spread = (0.0, 0.0)
    axis_ratio: tuple[float, float] = (1.0, 1.3)
    nucleus: tuple[float, float] = (0.5, 0.8)
    lobes: tuple[int, int] = (1, 2)
    lobe_spread: tuple[float, float] = (0.0, 0.3)
    nucleus_shift: float = 0.25
    ck_ring: tuple[float, float] = (0.0, 0.7)
    cd45_ring: tuple[float, float] = (0.1, 0.7)
    ck_polarity: tuple[float, float] = (0.0, 0.8)
    ck_exclusion: tuple[float, float] = (0.0, 0.8)
    ck_grain: tuple[float, float] = (0.05, 0.35)
    irregularity: tuple[float, float] = (0.05, 0.25)
    defocus_px: tuple[float, float] = (0.0, 1.2)
    ribbon: bool = False


_LEUKOCYTE_LOBES: tuple[int, int] = (1, 3)

APPEARANCES: dict[CellKind, Appearance] = {
    # Size: breast CTCs, median 12.4 um; leukocytes 9.4 um (PMC7782084).
    CellKind.CTC: Appearance(
        diameter_um=(12.4, 0.28), dapi=(1000.0, 0.5), ck=(1900.0, 0.7), axis_ratio=(1.0, 1.6), nucleus=(0.4, 0.8)
    ),
    CellKind.CTC_IN_DENSE_DAPI: Appearance(
        diameter_um=(12.4, 0.28),
        dapi=(850.0, 0.5),
        ck=(650.0, 0.65),
        axis_ratio=(1.0, 1.7),
        nucleus=(0.45, 0.8),
        defocus_px=(0.4, 2.0),
    ),
    CellKind.LEUKOCYTE: Appearance(
        diameter_um=(9.4, 0.14),
        dapi=(1100.0, 0.4),
        ck=(140.0, 0.55),
        cd45=(140.0, 0.7),
        nucleus=(0.6, 0.85),
        lobes=_LEUKOCYTE_LOBES,
        lobe_spread=(0.15, 0.65),
        nucleus_shift=0.15,
        irregularity=(0.05, 0.35),
    ),
    CellKind.DENSE_DAPI_LEUKOCYTE: Appearance(
        diameter_um=(9.4, 0.22),
        dapi=(900.0, 0.4),
        ck=(240.0, 0.6),
        cd45=(35.0, 0.9),
        axis_ratio=(1.0, 1.7),
        nucleus=(0.5, 0.85),
        lobes=_LEUKOCYTE_LOBES,
        lobe_spread=(0.15, 0.65),
        irregularity=(0.05, 0.35),
        defocus_px=(0.4, 2.0),
    ),
    CellKind.BACKGROUND_LEUKOCYTE: Appearance(
        diameter_um=(9.4, 0.14),
        dapi=(1000.0, 0.45),
        ck=(10.0, 0.5),
        cd45=(110.0, 0.7),
        nucleus=(0.65, 0.9),
        lobes=_LEUKOCYTE_LOBES,
        lobe_spread=(0.15, 0.65),
        nucleus_shift=0.15,
        irregularity=(0.05, 0.35),
        defocus_px=(0.0, 1.6),
    ),
    # A body so bright in CK that it saturates and bleeds into CD45 and DAPI, without a nucleus worth the name.
    CellKind.SHINE_THROUGH: Appearance(
        diameter_um=(9.5, 0.25),
        dapi=(60.0, 1.0),
        ck=(6000.0, 0.7),
        nucleus=(0.4, 0.8),
        ck_ring=(0.0, 0.3),
        ck_grain=(0.0, 0.2),
        ck_polarity=(0.0, 0.4),
        irregularity=(0.0, 0.15),
    ),
    CellKind.POINT_EVENT: Appearance(
        diameter_um=(2.6, 0.22),
        dapi=(450.0, 0.8),
        ck=(700.0, 0.8),
        nucleus=(0.6, 1.1),
        lobes=(1, 1),
        nucleus_shift=0.8,
        ck_ring=(0.0, 0.1),
        ck_exclusion=(0.0, 0.1),
        defocus_px=(0.0, 0.8),
    ),
    CellKind.DOUBLE: Appearance(
        diameter_um=(3.6, 0.35),
        dapi=(25.0, 1.2),
        ck=(450.0, 0.8),
        axis_ratio=(1.0, 1.8),
        nucleus=(0.4, 0.8),
        ck_ring=(0.0, 0.3),
        ck_exclusion=(0.0, 0.1),
    ),
    CellKind.DEBRIS: Appearance(
        diameter_um=(9.0, 0.4),
        dapi=(60.0, 1.2),
        ck=(100.0, 0.9),
        haze=(170.0, 0.8),
        axis_ratio=(1.0, 2.6),
        irregularity=(0.4, 1.0),
        ck_grain=(0.3, 0.9),
        defocus_px=(0.0, 2.5),
    ),
    CellKind.SMEAR: Appearance(
        diameter_um=(23.0, 0.25),
        dapi=(40.0, 1.0),
        ck=(80.0, 0.9),
        haze=(170.0, 0.7),
        irregularity=(0.3, 0.8),
        ck_grain=(0.3, 0.7),
        defocus_px=(0.5, 2.5),
        ribbon=True,
    ),
}


class _Columns:
    """The appearances of all kinds as arrays by kind code, so that mixed kinds are drawn in one call."""

    def __init__(self) -> None:
        rows = [APPEARANCES[kind] for kind in KINDS]
        self.ribbon = np.array([row.ribbon for row in rows])
        self.shift = np.array([row.nucleus_shift for row in rows], dtype=np.float32)
        names = set(Appearance.__dataclass_fields__) - {"ribbon", "nucleus_shift"}
        self.pairs = {name: np.array([getattr(row, name) for row in rows], dtype=np.float32) for name in names}

    def lognormal(self, name: str, kind: npt.NDArray[np.int8], rng: np.random.Generator) -> FloatArray:
        median, sd = self.pairs[name][kind].T
        return np.asarray(median * np.exp(sd * rng.standard_normal(len(kind), dtype=np.float32)), dtype=np.float32)

    def uniform(self, name: str, kind: npt.NDArray[np.int8], rng: np.random.Generator) -> FloatArray:
        low, high = self.pairs[name][kind].T
        return np.asarray(low + (high - low) * rng.random(len(kind), dtype=np.float32), dtype=np.float32)


_COLUMNS = _Columns()
_MINIMUM_CTC_UM = 4.0
_MAXIMUM_POINT_UM = 3.9


def draw_objects(kind: npt.NDArray[np.int8], patient: PatientFactors, rng: np.random.Generator) -> Objects:
    """Draw one object per kind code, all at position (0, 0).

    Args:
        kind: (N,) int8 codes into `KINDS`.
        patient: the factors of the patient they belong to.
        rng: source of everything random about them.

    Returns:
        N objects; place them with `Objects.moved`.
    """
    n = len(kind)
    diameter = _COLUMNS.lognormal("diameter_um", kind, rng)
    is_ctc = np.isin(kind, (CellKind.CTC.code, CellKind.CTC_IN_DENSE_DAPI.code))
    diameter = np.where(is_ctc, np.maximum(diameter, _MINIMUM_CTC_UM), diameter)
    diameter = np.where(kind == CellKind.POINT_EVENT.code, np.minimum(diameter, _MAXIMUM_POINT_UM), diameter)
    diameter = np.minimum(diameter, 30.0).astype(np.float32)
    radius = (diameter / np.float32(2.0 * PIXEL_SIZE_UM)).astype(np.float32)
    angle = rng.uniform(0.0, 2.0 * np.pi, n).astype(np.float32)
    ribbon = _COLUMNS.ribbon[kind]
    lobe_rows, lobe_cols, lobe_weights, lobe_radius = _draw_lobes(kind, radius, ribbon, rng)
    ctc_gain = np.where(is_ctc, patient.ctc_strength, 1.0)
    signal = {name: _COLUMNS.lognormal(name, kind, rng) for name in ("dapi", "ck", "cd45", "haze")}
    return Objects(
        kind=kind.astype(np.int8),
        row=np.zeros(n, np.float32),
        col=np.zeros(n, np.float32),
        radius_px=radius,
        diameter_um=diameter,
        axis_ratio=_COLUMNS.uniform("axis_ratio", kind, rng),
        angle=angle,
        irregularity=_COLUMNS.uniform("irregularity", kind, rng),
        lobe_rows=lobe_rows,
        lobe_cols=lobe_cols,
        lobe_weights=lobe_weights,
        lobe_radius_px=lobe_radius,
        ribbon=ribbon,
        dapi=(signal["dapi"] * patient.stain[0]).astype(np.float32),
        ck=(signal["ck"] * patient.stain[1] * ctc_gain).astype(np.float32),
        cd45=(signal["cd45"] * patient.stain[2]).astype(np.float32),
        # What shines by itself shines in every channel, never in the same proportion.
        haze=(signal["haze"][:, None] * np.exp(rng.normal((-0.5, 0.0, -0.2), 0.5, (n, 3)))).astype(np.float32),
        dapi_texture=rng.uniform(0.05, 0.4, n).astype(np.float32),
        ck_grain=_COLUMNS.uniform("ck_grain", kind, rng),
        ck_ring=_COLUMNS.uniform("ck_ring", kind, rng),
        cd45_ring=_COLUMNS.uniform("cd45_ring", kind, rng),
        ck_polarity=_COLUMNS.uniform("ck_polarity", kind, rng),
        ck_exclusion=_COLUMNS.uniform("ck_exclusion", kind, rng),
        defocus_px=_COLUMNS.uniform("defocus_px", kind, rng),
        textures=rng.standard_normal((n, NUM_TEXTURES, TEXTURE_NODES, TEXTURE_NODES), dtype=np.float32),
    )


def _draw_lobes(
    kind: npt.NDArray[np.int8], radius: FloatArray, ribbon: npt.NDArray[np.bool_], rng: np.random.Generator
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Nuclear lobes around a shifted centre; for ribbons a chain along a random curve through the centre."""
    n = len(kind)
    low, high = _COLUMNS.pairs["lobes"][kind].T
    count = np.floor(low + (high - low + 1.0) * rng.random(n, dtype=np.float32))
    weights = (np.arange(NUM_LOBES) < count[:, None]).astype(np.float32)
    nucleus = radius * _COLUMNS.uniform("nucleus", kind, rng)
    spread = np.where(count > 1, _COLUMNS.uniform("lobe_spread", kind, rng), 0.0)[:, None] * nucleus[:, None]
    around = rng.uniform(0.0, 2.0 * np.pi, (n, 1)) + (
        np.arange(NUM_LOBES) * (2.0 * np.pi) / np.maximum(count, 1.0)[:, None] + rng.normal(0.0, 0.35, (n, NUM_LOBES))
    )
    shift_angle = rng.uniform(0.0, 2.0 * np.pi, (n, 1))
    shift = (_COLUMNS.shift[kind] * radius * np.sqrt(rng.random(n)))[:, None]
    rows = spread * np.sin(around) + shift * np.sin(shift_angle)
    cols = spread * np.cos(around) + shift * np.cos(shift_angle)
    # Lobes share the nucleus' area: more lobes, each of them smaller.
    lobe_radius = nucleus / np.sqrt(1.0 + 0.35 * (count - 1.0) * (spread[:, 0] / np.maximum(nucleus, 1e-3) > 0.25))

    turns = rng.uniform(0.0, 2.0 * np.pi, (n, 1)) + np.cumsum(rng.normal(0.0, 0.5, (n, NUM_LOBES)), axis=1)
    step = (2.0 * radius / NUM_LOBES)[:, None] * 1.3
    chain_rows = np.cumsum(step * np.sin(turns), axis=1)
    chain_cols = np.cumsum(step * np.cos(turns), axis=1)
    chain_rows -= chain_rows.mean(axis=1, keepdims=True)
    chain_cols -= chain_cols.mean(axis=1, keepdims=True)
    thickness = radius * rng.uniform(0.12, 0.3, n)
    choose = ribbon[:, None]
    return (
        np.where(choose, chain_rows, rows).astype(np.float32),
        np.where(choose, chain_cols, cols).astype(np.float32),
        np.where(choose, 1.0, weights).astype(np.float32),
        np.where(ribbon, thickness, lobe_radius).astype(np.float32),
    )
