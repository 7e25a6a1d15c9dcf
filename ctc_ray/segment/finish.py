"""Turning the parts of single fields into a patient's finished output: shards, duplicates, failures, record."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ctc_ray.cohort import Cohort
from ctc_ray.records import FailureRow, Record, State, read_record, state_of, write_failures, write_record
from ctc_ray.schema import DUPLICATES_SCHEMA, Channel, cells_schema
from ctc_ray.segment.archive_xml import Geometry
from ctc_ray.segment.cartridge import FieldFile, is_image
from ctc_ray.segment.contrast import field_limits
from ctc_ray.segment.duplicates import physical_ids
from ctc_ray.segment.field_image import read_field
from ctc_ray.segment.overlap import overlap_from, seam_correlation, seams_of
from ctc_ray.segment.plan import STAGE, PatientPlan, Settings, part_name
from ctc_ray.storage import Store

ROWS_PER_FILE = 20_000
"""About 140 MB of 8-bit pixels: what one finishing task holds in memory."""
_POSITION_COLUMNS = ["cell_id", "field", "row", "col", "global_row", "global_col", "area_px", "prob"]


@dataclass(frozen=True)
class FinishedPatient:
    """What finishing a patient gave; small, it travels to the driver."""

    patient: str
    cells: int
    physical_cells: int
    fields: int
    failed: int


def finish_patient(
    plan: PatientPlan,
    settings: Settings,
    cohort: Cohort,
    cartridges: Store,
    *,
    failures: Sequence[FailureRow],
    workers: Sequence[dict[str, Any]],
    seconds: float,
) -> FinishedPatient:
    """Write a patient's output from its parts; the record comes last, then the parts are deleted.

    Args:
        plan: what was to be done, all of it now done or failed.
        settings: the resolved configuration.
        cohort: where parts lie and the output goes.
        cartridges: the images, for the overlap of adjacent fields.
        failures: sources that were set aside.
        workers: rows for the record: node, pid, units.
        seconds: worker seconds that the fields took.
    """
    store, folder = cohort.store, cohort.cells(plan.patient)
    earlier = _finished_before(plan, store, folder)
    if earlier is not None:
        return earlier
    done = [field for field in plan.cartridge.fields if store.exists(f"{plan.parts_folder}/{part_name(field.field)}")]
    overlap = _overlap(plan, settings, cartridges, done)
    shift = _global_shift(plan.cartridge.geometry, overlap)
    paths = [f"{plan.parts_folder}/{part_name(field.field)}" for field in done]
    first = len([name for name in plan.kept.files if name.endswith(".parquet")]) if plan.kept else 0
    files = dict(plan.kept.files) if plan.kept else {}
    for number, table in enumerate(_shards(store, paths, shift, start=not files), start=first):
        files[f"part-{number:03d}.parquet"] = store.write_table(f"{folder}/part-{number:03d}.parquet", table)
    positions = pa.concat_tables([store.read_table(f"{folder}/{name}", _POSITION_COLUMNS) for name in sorted(files)])
    physical = _write_duplicates(cohort, plan, positions, settings)
    write_failures(store, STAGE, plan.patient, failures)
    _write_limits(store, plan, cartridges, failures)
    counts = {
        **_counts(plan, failures),
        "cells": positions.num_rows,
        "physical_cells": physical,
        "segmented": len(done) + (plan.kept.counts.get("segmented", 0) if plan.kept else 0),
        "overlap_row_px": overlap[0],
        "overlap_col_px": overlap[1],
    }
    former = read_record(store, folder)
    record = Record(
        stage=STAGE,
        unit=plan.patient,
        identity=plan.identity,
        config=dict(settings.identity),
        inputs=dict(plan.inputs),
        files=files,
        counts=counts,
        seconds=seconds,
        units_computed=sum(field in plan.todo for field in done),
        units_reused=len(plan.reused),
        workers=list(workers),
    )
    write_record(store, folder, record)
    for name in sorted(set(former.files if former else ()) - set(files)):
        store.delete(f"{folder}/{name}")
    store.delete_folder(f"{folder}/_parts")
    return FinishedPatient(plan.patient, positions.num_rows, physical, len(plan.cartridge.fields), len(failures))


def _finished_before(plan: PatientPlan, store: Store, folder: str) -> FinishedPatient | None:
    """What an earlier attempt of this task finished, where its machine was lost before it could say so.

    Its parts may be gone, wholly or in part, so that nothing must be made of what is left of them.
    """
    record = read_record(store, folder)
    if record is None or record == plan.kept or state_of(store, folder, plan.identity) is not State.COMPLETE:
        return None
    store.delete_folder(f"{folder}/_parts")
    counts = record.counts
    set_aside = counts["failed"] + counts["archive_failures"]
    return FinishedPatient(plan.patient, counts["cells"], counts["physical_cells"], counts["fields"], set_aside)


def _counts(plan: PatientPlan, failures: Sequence[FailureRow]) -> dict[str, int]:
    """Fields of the patient, those that failed, and what else of the archive could not be read."""
    not_read = sum(is_image(row.source) for row in plan.cartridge.set_aside)
    failed = sum(is_image(row.source) for row in failures)
    return {
        "fields": len(plan.cartridge.fields) + not_read,
        "failed": failed,
        "archive_failures": len(failures) - failed,
    }


def _shards(
    store: Store, paths: Sequence[str], shift: Callable[[pa.Table], pa.Table], *, start: bool
) -> Iterator[pa.Table]:
    """Tables of at least `ROWS_PER_FILE` rows (the last may be shorter), whole fields each, in the order of fields.

    Args:
        store: the cohort's.
        paths: parts, each one field.
        shift: corrects the global coordinates of a table.
        start: whether an empty table is given where there are no cells, so that the patient's output has a file.
    """
    held = [cells_schema().empty_table()] if start and not paths else []
    given = 0
    for path in paths:
        held.append(shift(store.read_table(path)))
        if sum(part.num_rows for part in held) >= ROWS_PER_FILE:
            yield pa.concat_tables(held)
            held, given = [], given + 1
    if any(part.num_rows for part in held) or (held and start and not given):
        yield pa.concat_tables(held)


def _overlap(plan: PatientPlan, settings: Settings, cartridges: Store, done: Sequence[FieldFile]) -> tuple[int, int]:
    """Overlap (rows, columns) of adjacent fields in pixels; that of the kept output where there is one."""
    if plan.kept is not None:
        return plan.kept.counts.get("overlap_row_px", 0), plan.kept.counts.get("overlap_col_px", 0)
    geometry = plan.cartridge.geometry
    if geometry is None or not settings.measure_overlap:
        return 0, 0
    by_number = {field.field: field for field in done}
    channel = Channel.CK if plan.channel_map[Channel.DAPI] is None else Channel.DAPI

    def page(number: int) -> np.ndarray:
        pixels: np.ndarray = read_field(cartridges, by_number[number], plan.channel_map)[channel]
        return pixels

    beside, below = seams_of(geometry, by_number)
    columns = [seam_correlation(page(left), page(right)) for left, right in beside]
    rows = [seam_correlation(page(upper).T, page(lower).T) for upper, lower in below]
    return overlap_from(rows, geometry.field_width_px), overlap_from(columns, geometry.field_height_px)


def _global_shift(geometry: Geometry | None, overlap: tuple[int, int]) -> Callable[[pa.Table], pa.Table]:
    """Function that writes a table's global coordinates for fields that overlap."""

    def shifted(table: pa.Table) -> pa.Table:
        if geometry is None:
            return table
        numbers, inverse = np.unique(table["field"].to_numpy(), return_inverse=True)
        places = np.array([geometry.place(int(number)) for number in numbers], dtype=np.int64).reshape(-1, 2)
        step = (geometry.field_height_px - overlap[0], geometry.field_width_px - overlap[1])
        for axis, (local, name) in enumerate((("row", "global_row"), ("col", "global_col"))):
            values = table[local].to_numpy() + (places[:, axis] * step[axis])[inverse]
            index = table.schema.get_field_index(name)
            table = table.set_column(index, table.schema.field(name), pa.array(values.astype(np.float32)))
        return table

    return shifted


def _write_limits(store: Store, plan: PatientPlan, cartridges: Store, failures: Sequence[FailureRow]) -> None:
    """Keep the contrast limits of the segmented fields, so that counts can be restored later; no file without any."""
    failed = {row.source for row in failures}
    limits = field_limits(cartridges, [field for field in plan.cartridge.fields if field.path not in failed])
    path = f"contrast/{plan.patient}.parquet"
    if limits.num_rows:
        store.write_table(path, limits)
    else:
        store.delete(path)


def _border_px(plan: PatientPlan, positions: pa.Table) -> npt.NDArray[np.floating]:
    """Distances (N,) of the centroids from the nearest border of their field, px; without a grid none is known."""
    geometry = plan.cartridge.geometry
    if geometry is None:
        return np.full(positions.num_rows, np.inf)
    row, col = positions["row"].to_numpy(), positions["col"].to_numpy()
    to_sides = [row, geometry.field_height_px - 1 - row, col, geometry.field_width_px - 1 - col]
    return np.asarray(np.minimum.reduce(to_sides))


def _write_duplicates(cohort: Cohort, plan: PatientPlan, positions: pa.Table, settings: Settings) -> int:
    names = positions["cell_id"].to_pylist()
    physical = physical_ids(
        names,
        field=positions["field"].to_numpy(),
        global_row=positions["global_row"].to_numpy(),
        global_col=positions["global_col"].to_numpy(),
        radius_px=np.sqrt(positions["area_px"].to_numpy() / np.pi),
        prob=positions["prob"].to_numpy(),
        border_px=_border_px(plan, positions),
        merge_radius_px=settings.duplicate_radius_px,
        across_fields=plan.cartridge.geometry is not None,
    )
    table = pa.table({"cell_id": names, "physical_id": physical}, schema=DUPLICATES_SCHEMA)
    cohort.store.write_table(cohort.duplicates_path(plan.patient), table)
    return len(set(physical))
