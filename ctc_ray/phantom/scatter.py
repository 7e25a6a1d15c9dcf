"""Where cells lie: apart, in contact with a leukocyte, or among densely packed nuclei."""

import numpy as np
import numpy.typing as npt

from ctc_ray.phantom.kinds import KINDS, CellKind
from ctc_ray.phantom.objects import FloatArray, Objects
from ctc_ray.phantom.patients import PatientFactors
from ctc_ray.phantom.population import draw_objects

DENSE_RADIUS_PX = (40.0, 70.0)
"""Radius of a region of packed nuclei, uniform."""
DENSE_SPACING_PX = (9.5, 12.5)
"""Distance of neighbours in such a region, uniform: nuclei touch, some overlap."""
_OWN_SPACE = 0.75
"""A cell among packed nuclei keeps this fraction of its radius free of other centres."""

_CONTACT_PROBABILITY = np.zeros(len(KINDS), dtype=np.float32)
_CONTACT_PROBABILITY[CellKind.DOUBLE.code] = 1.0
_CONTACT_PROBABILITY[CellKind.SHINE_THROUGH.code] = 0.75
_CONTACT_PROBABILITY[CellKind.POINT_EVENT.code] = 0.25
_CONTACT_PROBABILITY[CellKind.CTC.code] = 0.15
_CONTACT_PROBABILITY[CellKind.LEUKOCYTE.code] = 0.2
_CLOSEST = np.full(len(KINDS), 0.75, dtype=np.float32)
_CLOSEST[CellKind.SHINE_THROUGH.code] = 0.15
_CLOSEST[CellKind.DOUBLE.code] = 0.5
"""Nearest distance of a touching leukocyte over the sum of the radii: shine-through bodies lie over leukocytes."""


def place_companions(
    cells: Objects, patient: PatientFactors, rng: np.random.Generator
) -> tuple[Objects, npt.NDArray[np.intp]]:
    """Leukocytes in contact with some of the cells.

    Args:
        cells: placed objects.
        patient: their patient.
        rng: source of everything random.

    Returns:
        The leukocytes (kind `background_leukocyte`), and for each the row of the cell that it touches.
    """
    parent = np.flatnonzero(rng.random(len(cells)) < _CONTACT_PROBABILITY[cells.kind])
    leukocytes = draw_objects(_codes(len(parent)), patient, rng)
    touching = cells.radius_px[parent] + leukocytes.radius_px
    distance = touching * rng.uniform(_CLOSEST[cells.kind[parent]], 1.15)
    angle = rng.uniform(0.0, 2.0 * np.pi, len(parent))
    row = cells.row[parent] + distance * np.sin(angle)
    col = cells.col[parent] + distance * np.cos(angle)
    return leukocytes.moved(row.astype(np.float32), col.astype(np.float32)), parent


def pack_nuclei(
    centre: tuple[float, float], radius_px: float, spacing_px: float, rng: np.random.Generator
) -> FloatArray:
    """(M, 2) centres (row, column) of packed nuclei: a jittered hexagonal lattice with gaps and a ragged outline."""
    reach = int(np.ceil(1.4 * radius_px / (spacing_px * 0.8660254))) + 1
    lattice_rows, lattice_cols = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    rows = lattice_rows * spacing_px * 0.8660254
    cols = (lattice_cols + 0.5 * (lattice_rows % 2)) * spacing_px
    points = np.stack([rows.ravel(), cols.ravel()], axis=1) + rng.normal(0.0, 0.2 * spacing_px, (rows.size, 2))
    angle = np.arctan2(points[:, 0], points[:, 1])
    phase = rng.uniform(0.0, 2.0 * np.pi, 2)
    outline = radius_px * (1.0 + 0.25 * np.cos(2.0 * angle + phase[0]) + 0.15 * np.cos(3.0 * angle + phase[1]))
    # Full inside, thinning out over the outer third.
    chance = np.clip((outline - np.hypot(points[:, 0], points[:, 1])) / (0.35 * radius_px), 0.0, 0.93)
    return np.asarray(points[rng.random(len(points)) < chance] + centre, dtype=np.float32)


def give_own_space(points: FloatArray, cells: Objects) -> FloatArray:
    """The points that do not lie inside one of the cells."""
    if len(cells) == 0 or len(points) == 0:
        return points
    distance = np.hypot(points[:, :1] - cells.row, points[:, 1:] - cells.col)
    return np.asarray(points[(distance >= _OWN_SPACE * cells.radius_px).all(axis=1)])


def leukocytes_at(points: FloatArray, patient: PatientFactors, rng: np.random.Generator) -> Objects:
    """CK-negative leukocytes at the points (M, 2)."""
    return draw_objects(_codes(len(points)), patient, rng).moved(points[:, 0], points[:, 1])


def scatter_dense(
    cells: Objects, size: tuple[int, int], patient: PatientFactors, rng: np.random.Generator
) -> tuple[Objects, Objects]:
    """Put cells into regions of packed nuclei.

    Args:
        cells: objects to place, one or two a region.
        size: (height, width) of the area that the regions' centres lie in, px.
        patient: their patient.
        rng: source of everything random.

    Returns:
        The placed cells and the leukocytes around them.
    """
    num_regions = max(1, round(len(cells) / 1.5)) if len(cells) else 0
    centres = rng.uniform((0.0, 0.0), size, (num_regions, 2))
    radii = rng.uniform(*DENSE_RADIUS_PX, num_regions)
    spacings = rng.uniform(*DENSE_SPACING_PX, num_regions)
    region = rng.integers(0, max(num_regions, 1), len(cells))
    away = (0.75 * radii[region] if num_regions else np.zeros(0)) * np.sqrt(rng.random(len(cells)))
    angle = rng.uniform(0.0, 2.0 * np.pi, len(cells))
    at = centres[region] if num_regions else np.zeros((0, 2))
    row = np.clip(at[:, 0] + away * np.sin(angle), 0.0, size[0] - 0.01)
    col = np.clip(at[:, 1] + away * np.cos(angle), 0.0, size[1] - 0.01)
    placed = cells.moved(row.astype(np.float32), col.astype(np.float32))
    packed = [
        pack_nuclei((centre[0], centre[1]), radius, spacing, rng)
        for centre, radius, spacing in zip(centres, radii, spacings, strict=True)
    ]
    points = np.concatenate(packed) if packed else np.zeros((0, 2), np.float32)
    return placed, leukocytes_at(give_own_space(points, placed), patient, rng)


def scatter_apart(
    cells: Objects, size: tuple[int, int], rng: np.random.Generator, *, distance_px: float = 20.0, tries: int = 8
) -> Objects:
    """Put cells at random places, apart from each other where a few tries allow it.

    Args:
        cells: objects to place.
        size: (height, width) of the area, px.
        rng: source of everything random.
        distance_px: distance below which a cell is placed again.
        tries: how often at most; crowded cells then stay where they are.
    """
    at = rng.uniform((0.0, 0.0), size, (len(cells), 2))
    for _ in range(tries):
        far = np.hypot(at[:, :1] - at[:, 0], at[:, 1:] - at[:, 1])
        # Of two close cells only the later one moves.
        crowded = (np.tril(far < distance_px, k=-1)).any(axis=1)
        if not crowded.any():
            break
        at[crowded] = rng.uniform((0.0, 0.0), size, (int(crowded.sum()), 2))
    return cells.moved(at[:, 0].astype(np.float32), at[:, 1].astype(np.float32))


def _codes(count: int) -> npt.NDArray[np.int8]:
    return np.full(count, CellKind.BACKGROUND_LEUKOCYTE.code, dtype=np.int8)
