"""One field of a phantom cartridge: which cells are in view, their image, truth and masks.

A cartridge is a plane of cells. Each frame owns a tile of that plane (the step of the stage, a little less than the frame);
a frame shows its tile and a strip of its neighbours' tiles, so a cell in the strip is in two frames, as on a real cartridge.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from ctc_ray.phantom.events import Event, find_events
from ctc_ray.phantom.grid import Grid, grid_for
from ctc_ray.phantom.kinds import CK_KINDS, KINDS, CellKind, Profile
from ctc_ray.phantom.objects import FloatArray, Objects, concatenate
from ctc_ray.phantom.optics import CAMERAS, bleed, column_stripes, expose, illumination, quantise
from ctc_ray.phantom.patients import PatientFactors
from ctc_ray.phantom.population import draw_objects
from ctc_ray.phantom.render import paste, paste_outlines, render
from ctc_ray.phantom.scatter import leukocytes_at, place_companions, scatter_apart, scatter_dense
from ctc_ray.phantom.seeding import generator
from ctc_ray.schema import FIELD_HEIGHT_PX, FIELD_WIDTH_PX, TRUTH_SCHEMA

DEFAULT_OVERLAP_PX = 10
PAGE_OF_CHANNEL = (0, 2, 3)
"""TIFF page of DAPI, CK and CD45; page 1 is the extra marker. Source: CellSearch page order (DNA, FITC, CK-PE, CD45-APC)."""
_TRUTH_TYPES = pl.DataFrame(TRUTH_SCHEMA.empty_table()).schema
_VISIBLE_NUCLEUS = 40.0
"""Counts of DAPI below which no expert would outline a nucleus."""


@dataclass(frozen=True)
class PhantomField:
    """One drawn frame.

    Attributes:
        patient: patient id.
        field: 1-based frame number.
        pages: (4, 1036, 1384) uint8 or uint16 in the order DAPI, extra, CK, CD45.
        truth: one row for every cell whose centre is in the frame; columns of `TRUTH_SCHEMA`.
        events: what a CellSearch-like event finder lists in this frame.
        ck_mask: (1036, 1384) int32, what an expert would outline in CK: label n is row n - 1 of `truth`, labels beyond are
            cells whose centre lies outside the frame; 0 background. None unless asked for.
        dapi_mask: the same for nuclei in DAPI.
    """

    patient: str
    field: int
    pages: npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
    truth: pl.DataFrame
    events: tuple[Event, ...]
    ck_mask: npt.NDArray[np.int32] | None
    dapi_mask: npt.NDArray[np.int32] | None


def draw_field(
    profile: Profile,
    *,
    patient: str | int,
    field: int,
    seed: int,
    masks: bool = False,
    grid: Grid | None = None,
    overlap_px: int = DEFAULT_OVERLAP_PX,
    dtype: str = "uint8",
) -> PhantomField:
    """Draw one frame; the same arguments give the same bytes in any process and order.

    Args:
        profile: mix of cells, see `PROFILES`.
        patient: patient id; its hash and the seed decide stain, density and background.
        field: 1-based frame number on the grid.
        seed: seed of the cohort.
        masks: also give instance masks.
        grid: frames of the cartridge; by default the grid of the profile's `num_fields`.
        overlap_px: strip that neighbouring frames share.
        dtype: `uint8`, or `uint16` for the camera's 12 bits; both come from the same counts.

    Raises:
        ConfigError: the field is not on the grid.
    """
    patient = str(patient)
    grid = grid or grid_for(profile.num_fields)
    factors = PatientFactors.draw(seed, patient)
    objects, names, num_centred = _in_view(profile, factors, patient, field, seed, grid, overlap_px)
    light = np.zeros((3, FIELD_HEIGHT_PX, FIELD_WIDTH_PX), dtype=np.float32)
    ck_mask = dapi_mask = None
    if masks:
        ck_mask, dapi_mask = _empty_masks(), _empty_masks()
        best = np.zeros((2, FIELD_HEIGHT_PX, FIELD_WIDTH_PX), dtype=np.float32)
    for stamps in render(objects, masks=masks):
        paste(light, stamps)
        if ck_mask is not None and dapi_mask is not None:
            paste_outlines(ck_mask, best[0], stamps, 1, body=True)
            paste_outlines(dapi_mask, best[1], stamps, 0, body=False)
    if ck_mask is not None and dapi_mask is not None:
        _keep_labels(ck_mask, np.isin(objects.kind, [kind.code for kind in CK_KINDS]))
        _keep_labels(dapi_mask, (objects.dapi >= _VISIBLE_NUCLEUS) & ~objects.ribbon)
    bleed(light)
    truth = _truth(objects.take(slice(0, num_centred)), names[:num_centred], patient, field)
    return PhantomField(
        patient=patient,
        field=field,
        pages=_photograph(light, factors, patient, field, seed, dtype),
        truth=truth,
        events=find_events(light, truth),
        ck_mask=ck_mask,
        dapi_mask=dapi_mask,
    )


def draw_tile(
    profile: Profile, factors: PatientFactors, patient: str, field: int, seed: int, size: tuple[int, int]
) -> Objects:
    """All cells that one frame owns, placed in its tile.

    Args:
        profile: mix of cells.
        factors: the patient's factors.
        patient: patient id.
        field: 1-based frame number.
        seed: seed of the cohort.
        size: (height, width) of the tile, px.
    """
    rng = generator(seed, "tile", patient, field)
    # The profile counts a frame, which shows a little more than its tile.
    share = size[0] * size[1] / (FIELD_HEIGHT_PX * FIELD_WIDTH_PX)
    count = max(round(share * rng.normal(profile.ck_objects_mean, profile.ck_objects_sd)), 10)
    weights = profile.weights(float(np.exp(profile.ctc_spread * factors.ctc_prevalence)))
    codes = np.array([kind.code for kind in CK_KINDS], dtype=np.int8)
    kinds = np.sort(rng.choice(codes, size=count, p=weights))
    cells = draw_objects(kinds, factors, rng)
    dense = np.isin(kinds, [CellKind.CTC_IN_DENSE_DAPI.code, CellKind.DENSE_DAPI_LEUKOCYTE.code])
    apart = scatter_apart(cells.take(~dense), size, rng)
    packed, around = scatter_dense(cells.take(dense), size, factors, rng)
    companions, _ = place_companions(apart, factors, rng)
    loose = rng.poisson(profile.background_leukocytes * factors.leukocyte_density)
    at = rng.uniform((0.0, 0.0), size, (loose, 2)).astype(np.float32)
    return concatenate([apart, packed, companions, around, leukocytes_at(at, factors, rng)])


def _in_view(
    profile: Profile,
    factors: PatientFactors,
    patient: str,
    field: int,
    seed: int,
    grid: Grid,
    overlap_px: int,
) -> tuple[Objects, list[str], int]:
    """Objects that shine into the frame, their physical ids, and how many of them (the first) have their centre in it."""
    row, col = grid.place(field)
    size = (FIELD_HEIGHT_PX - overlap_px, FIELD_WIDTH_PX - overlap_px)
    parts: list[Objects] = []
    names: list[str] = []
    for down in (0, -1, 1):
        for right in (0, -1, 1):
            frame = grid.frame_at(row + down, col + right)
            if frame is None:
                continue
            tile = draw_tile(profile, factors, patient, frame, seed, size).shifted(down * size[0], right * size[1])
            reach = tile.reach_px()
            seen = (tile.row > -reach) & (tile.row < FIELD_HEIGHT_PX + reach)
            seen &= (tile.col > -reach) & (tile.col < FIELD_WIDTH_PX + reach)
            parts.append(tile.take(seen))
            names += [f"{patient}-{frame:03d}-{n:05d}" for n in np.flatnonzero(seen)]
    objects = concatenate(parts)
    centred = (objects.row >= 0) & (objects.row < FIELD_HEIGHT_PX) & (objects.col >= 0) & (objects.col < FIELD_WIDTH_PX)
    order = np.argsort(~centred, kind="stable")
    return objects.take(order), [names[n] for n in order], int(centred.sum())


def _photograph(
    light: FloatArray, factors: PatientFactors, patient: str, field: int, seed: int, dtype: str
) -> npt.NDArray[np.uint8] | npt.NDArray[np.uint16]:
    rows, cols = np.arange(FIELD_HEIGHT_PX, dtype=np.float32), np.arange(FIELD_WIDTH_PX, dtype=np.float32)
    row_term, col_term = illumination(factors, rows, cols)
    lamp = row_term[:, None] + col_term
    pages = np.empty((4, FIELD_HEIGHT_PX, FIELD_WIDTH_PX), dtype=dtype)
    for channel, page in ((0, 0), (1, 2), (2, 3), (3, 1)):
        rng = generator(seed, "camera", patient, field, channel)
        level = np.float32(CAMERAS[channel].background * factors.background[channel])
        signal = (light[channel] + level) * lamp if channel < 3 else level * lamp
        pages[page] = quantise(expose(signal, channel, rng, column_stripes(seed, patient, channel)), dtype)
    return pages


def _truth(objects: Objects, names: list[str], patient: str, field: int) -> pl.DataFrame:
    kinds = [str(kind) for kind in KINDS]
    return pl.DataFrame(
        {
            "patient": [patient] * len(objects),
            "field": [field] * len(objects),
            "row": objects.row,
            "col": objects.col,
            "kind": [kinds[code] for code in objects.kind],
            "diameter_um": objects.diameter_um,
            "physical_id": names,
        },
        schema=_TRUTH_TYPES,
    )


def _empty_masks() -> npt.NDArray[np.int32]:
    return np.zeros((FIELD_HEIGHT_PX, FIELD_WIDTH_PX), dtype=np.int32)


def _keep_labels(labels: npt.NDArray[np.int32], keep: npt.NDArray[np.bool_]) -> None:
    """Blank the labels (object row + 1) whose object is not kept, in place."""
    table = np.concatenate([[0], np.where(keep, np.arange(1, len(keep) + 1), 0)]).astype(np.int32)
    labels[...] = table[labels]
