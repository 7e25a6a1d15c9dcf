"""Write a phantom cohort as real files: TIFFs and xml as CellSearch leaves them, and the ground truth beside."""

import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from ctc_ray.cohort import check_patient_id
from ctc_ray.config import PhantomConfig
from ctc_ray.errors import ConfigError, StaleOutputError
from ctc_ray.phantom.archive import MASKS, encode_tiff, encode_xml, mask_path, tiff_path, xml_path
from ctc_ray.phantom.events import Event
from ctc_ray.phantom.fields import draw_field
from ctc_ray.phantom.grid import Grid, grid_for
from ctc_ray.phantom.kinds import CTC_KINDS, PROFILES, Profile
from ctc_ray.progress import Progress
from ctc_ray.schema import TRUTH_SCHEMA
from ctc_ray.storage import Store

SETTINGS_PATH = "phantom.json"
TRUTH_PATH = "truth.parquet"
FORMAT = 1
"""Raised when the same settings would give other bytes: older cohorts then count as stale."""


@dataclass(frozen=True)
class PhantomResult:
    """What was written.

    Attributes:
        patients: ids in order.
        fields_written, fields_reused: frames drawn now, and found complete from an earlier run.
        cells, ctcs: rows of the truth table, and those of the CTC kinds; a cell in two frames counts twice.
        events, assigned: events of all xml files, and those that the operator calls CTCs.
        truth_path: path of the truth table below the folder.
        seconds: wall time.
    """

    patients: tuple[str, ...]
    fields_written: int
    fields_reused: int
    cells: int
    ctcs: int
    events: int
    assigned: int
    truth_path: str
    seconds: float


def patient_names(settings: PhantomConfig) -> tuple[str, ...]:
    """Ids of the patients: those given, else P01, P02, ...

    Raises:
        ConfigError: an id cannot name a folder, or is given twice.
    """
    names = tuple(settings.patient_ids) or tuple(f"P{n:02d}" for n in range(1, settings.patients + 1))
    for name in names:
        check_patient_id(name)
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ConfigError(f"phantom.patient_ids holds {repeated[0]!r} twice: every patient needs an id of its own")
    return names


def profile_named(name: str) -> Profile:
    """The profile of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in PROFILES:
        raise ConfigError(f"phantom.profile is {name!r}: use one of {', '.join(sorted(PROFILES))}")
    return PROFILES[name]


def write_phantom(
    settings: PhantomConfig,
    out: str | Path,
    *,
    progress: Progress | None = None,
    workers: int = 1,
    force: bool = False,
) -> PhantomResult:
    """Draw every patient's cartridge and write it below a folder; run again to finish what was interrupted.

    Args:
        settings: the `phantom` section of the configuration.
        out: folder (or pyarrow URI) that gets one folder a patient, `truth.parquet` and `phantom.json`.
        progress: where to report; silent by default.
        workers: processes to draw with; the bytes do not depend on it.
        force: replace a cohort that was drawn with other settings.

    Raises:
        ConfigError: the profile or a patient id is not usable.
        StaleOutputError: the folder holds a cohort of other settings and `force` is not set.
    """
    started = time.monotonic()
    profile, names, grid = profile_named(settings.profile), patient_names(settings), grid_for(settings.fields)
    store = Store(out)
    record = _begin(store, settings, profile, names, grid, force=force)
    written = 0
    with (
        (progress or Progress(quiet=True)).task("phantom", total=len(names) * grid.num_frames) as task,
        _mapper(workers) as run,
    ):
        for name in names:
            if _is_written(store, record, settings, name, grid):
                task.advance(grid.num_frames, note=f"{name} is there already")
                continue
            jobs = [_Job(store, settings, profile, grid, name, frame) for frame in range(1, grid.num_frames + 1)]
            drawn = []
            for done in run(jobs):
                drawn.append(done)
                task.advance(note=name)
            record["patients"][name] = _complete(store, name, grid, drawn)
            store.write_json(SETTINGS_PATH, record)
            written += len(drawn)
    _finish(store, record, anew=written > 0)
    totals = {key: sum(record["patients"][name][key] for name in names) for key in _COUNTS}
    return PhantomResult(
        patients=names,
        fields_written=written,
        fields_reused=len(names) * grid.num_frames - written,
        truth_path=TRUTH_PATH,
        seconds=time.monotonic() - started,
        **totals,
    )


_COUNTS = ("cells", "ctcs", "events", "assigned")
_Drawn = tuple[int, pl.DataFrame, tuple[Event, ...]]


@dataclass(frozen=True)
class _Job:
    """One frame to draw and write, picklable for worker processes."""

    store: Store
    settings: PhantomConfig
    profile: Profile
    grid: Grid
    patient: str
    frame: int


def _draw_and_write(job: _Job) -> _Drawn:
    settings = job.settings
    drawn = draw_field(
        job.profile,
        patient=job.patient,
        field=job.frame,
        seed=settings.seed,
        masks=settings.masks,
        grid=job.grid,
        overlap_px=settings.overlap_px,
        dtype="uint8" if settings.bit_depth == 8 else "uint16",
    )
    job.store.write_bytes(tiff_path(job.patient, job.frame), encode_tiff(drawn.pages))
    for channel, mask in (("ck", drawn.ck_mask), ("dapi", drawn.dapi_mask)):
        if mask is not None:
            data = encode_tiff(mask[None].astype("uint16"), compress=True)
            job.store.write_bytes(mask_path(job.patient, job.frame, channel), data)
    return job.frame, drawn.truth, drawn.events


@contextmanager
def _mapper(workers: int) -> Iterator[Callable[[list[_Job]], Iterable[_Drawn]]]:
    """Something that draws jobs and gives their results in order: in this process, or in several."""
    if workers <= 1:
        yield lambda jobs: map(_draw_and_write, jobs)
        return
    # Fork would copy the threads' locks of libraries that the caller has loaded.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=workers, mp_context=context) as pool:
        yield lambda jobs: pool.map(_draw_and_write, jobs)


def _begin(
    store: Store, settings: PhantomConfig, profile: Profile, names: tuple[str, ...], grid: Grid, *, force: bool
) -> dict[str, Any]:
    """The record of an earlier run of the same settings, or a new one; more patients are no other settings."""
    wanted = {
        **{key: value for key, value in settings.identity().items() if key not in ("patients", "patient_ids")},
        "num_rows": grid.num_rows,
        "num_cols": grid.num_cols,
        "mix": {str(kind): weight for kind, weight in profile.kind_weights.items()},
        "format": FORMAT,
    }
    if store.exists(SETTINGS_PATH):
        found = store.read_json(SETTINGS_PATH)
        if found.get("settings") == wanted:
            return {**found, "patient_ids": sorted({*found["patient_ids"], *names})}
        if not force:
            differing = sorted(key for key in wanted if found.get("settings", {}).get(key) != wanted[key])
            raise StaleOutputError(
                f"{store.describe()} holds phantom cartridges of other settings ({', '.join(differing)} differ): "
                "choose another folder, or replace it with --force"
            )
        for name in found.get("patient_ids", []):
            store.delete_folder(check_patient_id(name))
    for folder in (_PARTS, MASKS):
        store.delete_folder(folder)
    record = {"settings": wanted, "patient_ids": sorted(names), "patients": {}, "joined": []}
    store.write_json(SETTINGS_PATH, record)
    return record


_PARTS = ".parts"


def _part_path(patient: str) -> str:
    return f"{_PARTS}/{patient}.parquet"


def _is_written(store: Store, record: dict[str, Any], settings: PhantomConfig, patient: str, grid: Grid) -> bool:
    """Whether a patient's files and truth are all there."""
    if patient not in record["patients"]:
        return False
    if not (store.exists(_part_path(patient)) or (patient in record["joined"] and store.exists(TRUTH_PATH))):
        return False
    frames = range(1, grid.num_frames + 1)
    wanted = [xml_path(patient), *(tiff_path(patient, frame) for frame in frames)]
    if settings.masks:
        wanted += [mask_path(patient, frame, channel) for frame in frames for channel in ("ck", "dapi")]
    return all(store.exists(path) for path in wanted)


def _complete(store: Store, patient: str, grid: Grid, drawn: list[_Drawn]) -> dict[str, int]:
    """Write a patient's xml and truth once all frames are there; returns their counts."""
    events = {frame: found for frame, _, found in drawn}
    truth = pl.concat([rows for _, rows, _ in drawn])
    store.write_bytes(xml_path(patient), encode_xml(patient, grid, events))
    store.write_table(_part_path(patient), truth.to_arrow().cast(TRUTH_SCHEMA))
    listed = [event for found in events.values() for event in found]
    return {
        "cells": truth.height,
        "ctcs": int(truth["kind"].is_in([str(kind) for kind in CTC_KINDS]).sum()),
        "events": len(listed),
        "assigned": sum(event.assigned for event in listed),
    }


def _finish(store: Store, record: dict[str, Any], *, anew: bool) -> None:
    """Join the patients' truth tables; the parts go when the whole is there."""
    if not anew and set(record["joined"]) == set(record["patients"]):
        return
    former = store.read_table(TRUTH_PATH) if record["joined"] else None
    tables = []
    for name in sorted(record["patients"]):
        if former is not None and not store.exists(_part_path(name)):
            tables.append(former.filter(pc.field("patient") == name))
        else:
            tables.append(store.read_table(_part_path(name)))
    store.write_table(TRUTH_PATH, pa.concat_tables(tables), row_group_size=100_000)
    record["joined"] = sorted(record["patients"])
    store.write_json(SETTINGS_PATH, record)
    store.delete_folder(_PARTS)
