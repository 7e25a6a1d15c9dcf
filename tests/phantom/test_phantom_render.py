from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from ctc_ray.phantom.kinds import CellKind
from ctc_ray.phantom.objects import Objects, concatenate
from ctc_ray.phantom.patients import PatientFactors
from ctc_ray.phantom.population import draw_objects
from ctc_ray.phantom.render import PSF_PX, _blur_matrices, paste, paste_crops, paste_outlines, render


def cells(kind: CellKind, n: int, *, row: float = 48.0, col: float = 48.0, seed: int = 0) -> Objects:
    patient = PatientFactors.draw(0, "P01")
    drawn = draw_objects(np.full(n, kind.code, np.int8), patient, np.random.default_rng(seed))
    return drawn.moved(np.full(n, row, np.float32), np.full(n, col, np.float32))


def canvas_of(objects: Objects, side: int = 96) -> np.ndarray:
    canvas = np.zeros((3, side, side), np.float32)
    for stamps in render(objects):
        paste(canvas, stamps)
    return canvas


def test_render_every_object_exactly_once() -> None:
    objects = concatenate([cells(kind, 7, seed=n) for n, kind in enumerate(CellKind)])
    rendered = np.concatenate([stamps.index for stamps in render(objects)])
    assert sorted(rendered.tolist()) == list(range(len(objects)))


def test_render_cell_lies_where_its_position_says() -> None:
    for row, col in ((40.0, 55.0), (40.5, 55.25)):
        objects = cells(CellKind.LEUKOCYTE, 40, row=row, col=col)
        image = canvas_of(objects)[1]
        centre = ndimage.center_of_mass(image)
        assert centre == pytest.approx((row, col), abs=0.8)


def test_render_whole_pixel_shift_moves_the_same_pixels() -> None:
    objects = cells(CellKind.CTC, 3, row=40.3, col=44.8)
    moved = objects.shifted(7.0, -3.0)
    assert np.allclose(canvas_of(moved)[:, 27:77, 17:67], canvas_of(objects)[:, 20:70, 20:70], atol=0.05)


def test_blur_matrices_equal_gaussian_filter() -> None:
    sigma = np.array([0.75, 1.5, 2.25], np.float32)
    image = np.zeros((48, 48), np.float32)
    image[20:27, 18:30] = 100.0
    image[24, 24] = 500.0
    for matrix, width in zip(_blur_matrices(sigma, 48), sigma, strict=True):
        expected = ndimage.gaussian_filter(image, width, mode="constant", truncate=8)
        assert np.allclose(matrix @ image @ matrix.T, expected, atol=0.05)


def test_render_defocus_conserves_light_and_lowers_the_peak() -> None:
    sharp = cells(CellKind.LEUKOCYTE, 1)
    focused = replace(sharp, defocus_px=np.zeros(1, np.float32), dapi_texture=np.zeros(1, np.float32))
    blurred = replace(focused, defocus_px=np.full(1, 3.0, np.float32))
    before, after = canvas_of(focused)[0], canvas_of(blurred)[0]
    assert after.sum() == pytest.approx(before.sum(), rel=0.02)
    assert after.max() < 0.95 * before.max()
    assert min(PSF_PX) > 0.5


def test_paste_at_the_border_cuts_what_lies_outside() -> None:
    objects = cells(CellKind.CTC, 1, row=0.0, col=95.0)
    whole = canvas_of(cells(CellKind.CTC, 1, row=48.0, col=47.0))
    assert np.allclose(canvas_of(objects)[:, :40, 60:], whole[:, 48:88, 12:48], atol=0.05)


def test_paste_crops_puts_each_object_into_its_own_crop() -> None:
    objects = cells(CellKind.CTC, 2, row=24.0, col=24.0)
    crops = np.zeros((3, 3, 48, 48), np.float32)
    for stamps in render(objects):
        paste_crops(crops, np.array([2, 0]), stamps)
    assert crops[1].sum() == 0.0
    assert np.allclose(crops[2], canvas_of(objects.take(slice(0, 1)), 48), atol=1e-3)
    assert np.allclose(crops[0], canvas_of(objects.take(slice(1, 2)), 48), atol=1e-3)


def test_outlines_cover_the_bodies_area() -> None:
    objects = cells(CellKind.LEUKOCYTE, 30)
    for stamps in render(objects, masks=True):
        assert stamps.body is not None
        equivalent = 2.0 * np.sqrt(stamps.body.sum(axis=(1, 2)) / np.pi)
        ratio = equivalent / (2.0 * objects.radius_px[stamps.index])
        assert 0.95 < np.median(ratio) < 1.3


def test_paste_outlines_without_masks_raises() -> None:
    stamps = next(iter(render(cells(CellKind.CTC, 1))))
    with pytest.raises(ValueError, match="masks=True"):
        paste_outlines(np.zeros((96, 96), np.int32), np.zeros((96, 96), np.float32), stamps, 1, body=True)


def test_concatenate_nothing_raises() -> None:
    with pytest.raises(ValueError, match="at least one"):
        concatenate([])
