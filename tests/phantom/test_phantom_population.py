from __future__ import annotations

import numpy as np
import pytest

from ctc_ray.phantom.kinds import CK_KINDS, KINDS, PROFILES, CellKind
from ctc_ray.phantom.objects import Objects
from ctc_ray.phantom.patients import PatientFactors
from ctc_ray.phantom.population import APPEARANCES, draw_objects
from ctc_ray.phantom.scatter import give_own_space, pack_nuclei, place_companions, scatter_apart
from ctc_ray.phantom.seeding import generator, stable_hash
from ctc_ray.schema import PIXEL_SIZE_UM


def draw(kind: CellKind, n: int = 4000, patient: str = "P01") -> Objects:
    factors = PatientFactors.draw(0, patient)
    return draw_objects(np.full(n, kind.code, np.int8), factors, np.random.default_rng(1))


@pytest.mark.parametrize(
    ("kind", "median_um"),
    [
        (CellKind.CTC, 12.4),
        (CellKind.CTC_IN_DENSE_DAPI, 12.4),
        (CellKind.LEUKOCYTE, 9.4),
        (CellKind.BACKGROUND_LEUKOCYTE, 9.4),
    ],
)
def test_diameter_of_cells_has_the_published_median(kind: CellKind, median_um: float) -> None:
    cells = draw(kind)
    assert float(np.median(cells.diameter_um)) == pytest.approx(median_um, rel=0.02)
    assert np.allclose(2.0 * cells.radius_px * PIXEL_SIZE_UM, cells.diameter_um, rtol=1e-5)


def test_ctcs_are_at_least_and_point_events_below_four_micrometres() -> None:
    assert draw(CellKind.CTC, 20_000).diameter_um.min() >= 4.0
    assert draw(CellKind.POINT_EVENT, 20_000).diameter_um.max() < 4.0


def test_ctcs_carry_no_cd45_and_leukocytes_do() -> None:
    assert draw(CellKind.CTC).cd45.max() == 0.0
    assert np.median(draw(CellKind.LEUKOCYTE).cd45) > 30.0


def test_ck_of_ctcs_and_leukocytes_overlaps_without_being_equal() -> None:
    ctc, leukocyte = draw(CellKind.CTC).ck, draw(CellKind.LEUKOCYTE).ck
    assert np.median(ctc) > 4.0 * np.median(leukocyte)
    assert np.quantile(ctc, 0.01) < np.quantile(leukocyte, 0.99)


def test_every_kind_has_an_appearance_and_a_code() -> None:
    assert set(APPEARANCES) == set(CellKind)
    assert [KINDS[kind.code] for kind in CellKind] == list(CellKind)
    assert {kind for kind in CellKind if kind.is_ctc} == {CellKind.CTC, CellKind.CTC_IN_DENSE_DAPI}


@pytest.mark.parametrize(("name", "low", "high"), [("paper", 0.01, 0.02), ("demo", 0.20, 0.25)])
def test_profile_weights_give_the_stated_share_of_ctcs(name: str, low: float, high: float) -> None:
    weights = dict(zip(CK_KINDS, PROFILES[name].weights(), strict=True))
    assert sum(weights.values()) == pytest.approx(1.0)
    assert low <= weights[CellKind.CTC] + weights[CellKind.CTC_IN_DENSE_DAPI] <= high
    more = dict(zip(CK_KINDS, PROFILES[name].weights(2.0), strict=True))
    assert more[CellKind.CTC] > 1.5 * weights[CellKind.CTC]


def test_patients_differ_and_repeat() -> None:
    assert PatientFactors.draw(3, "007") == PatientFactors.draw(3, "007")
    assert PatientFactors.draw(3, "007") != PatientFactors.draw(3, "12")
    assert PatientFactors.draw(3, "Müller 3") != PatientFactors.draw(4, "Müller 3")


def test_generator_depends_on_names_and_not_on_the_process() -> None:
    # A fixed value: Python's salted hash would change it from run to run.
    assert stable_hash("Müller 3") == stable_hash("Müller 3") != stable_hash("Müller 4")
    assert stable_hash("007") == 0x629F4CF9337B0D0C
    assert generator(1, "tile", "P01", 3).random() == generator(1, "tile", "P01", 3).random()
    assert generator(1, "tile", "P01", 3).random() != generator(1, "tile", "P01", 4).random()


def test_companions_of_doubles_touch_them() -> None:
    doubles = draw(CellKind.DOUBLE, 200).moved(np.full(200, 100.0, np.float32), np.full(200, 200.0, np.float32))
    others, parent = place_companions(doubles, PatientFactors.draw(0, "P01"), np.random.default_rng(0))
    assert sorted(parent.tolist()) == list(range(200))
    distance = np.hypot(others.row - 100.0, others.col - 200.0)
    touching = doubles.radius_px[parent] + others.radius_px
    assert np.all(distance <= 1.16 * touching)
    assert np.all(others.kind == CellKind.BACKGROUND_LEUKOCYTE.code)


def test_packed_nuclei_are_dense_and_leave_the_cell_its_space() -> None:
    points = pack_nuclei((100.0, 100.0), 60.0, 11.0, np.random.default_rng(2))
    inner = points[np.hypot(*(points - 100.0).T) < 25.0]
    density = len(inner) / (np.pi * 25.0**2)
    assert density == pytest.approx(0.93 / (11.0**2 * np.sqrt(3) / 2.0), rel=0.35)
    cell = draw(CellKind.CTC_IN_DENSE_DAPI, 1).moved(np.array([100.0], np.float32), np.array([100.0], np.float32))
    free = give_own_space(points, cell)
    assert np.hypot(*(free - 100.0).T).min() >= 0.75 * cell.radius_px[0]
    assert len(free) < len(points)


def test_scattered_cells_keep_apart() -> None:
    cells = scatter_apart(draw(CellKind.LEUKOCYTE, 80), (1026, 1374), np.random.default_rng(4))
    distance = np.hypot(cells.row[:, None] - cells.row, cells.col[:, None] - cells.col) + np.eye(80) * 1e6
    assert (distance.min(axis=1) >= 20.0).mean() > 0.97
