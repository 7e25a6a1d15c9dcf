"""A cohort of phantom crops of any size, kept between runs: one patient is 10,000 cells.

A patient's cells are 1,250 crops of the fast path (`draw_crops`, profile `demo`) in their eight rotations and reflections: all
distinct, an eighth of the drawing, and for reading, embedding and memory like any other crops. Columns other than ids and pixels
hold zeros.
"""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ctc_ray.cohort import Cohort
from ctc_ray.phantom import PROFILES, draw_crops
from ctc_ray.records import Record, identity_of, publish, read_record
from ctc_ray.schema import cell_id, cells_schema, pack_pixels

CELLS_A_PATIENT = 10_000
SEED = 41_000
_SYMMETRIES = 8


def make_cohort(folder: Path, num_cells: int, processes: int = 2) -> Cohort:
    """Draw the patients that are not there yet.

    Args:
        folder: of the cohort.
        num_cells: cells that it is to hold at least; rounded up to whole patients.
        processes: that draw at once.
    """
    cohort = Cohort.open(str(folder), create=True)
    patients = patients_of(num_cells)
    missing = [name for name in patients if read_record(cohort.store, cohort.cells(name)) is None]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for _ in pool.imap_unordered(_draw_patient, [(str(folder), name) for name in missing]):
            pass
    cohort.add_patients(dict.fromkeys(patients, "phantom"))
    return cohort


def patients_of(num_cells: int) -> list[str]:
    """Patients that hold so many cells, in order."""
    return [f"P{number:04d}" for number in range(-(-num_cells // CELLS_A_PATIENT))]


def all_symmetries(crops_NCHW: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Crops in their eight rotations and reflections, (8 N, C, H, W)."""
    turned = [np.rot90(crops_NCHW, turns, axes=(2, 3)) for turns in range(4)]
    return np.concatenate([*turned, *(crops[..., ::-1] for crops in turned)])


def _draw_patient(task: tuple[str, str]) -> None:
    folder, patient = task
    cohort = Cohort.open(folder, create=True)
    drawn, _ = draw_crops(
        CELLS_A_PATIENT // _SYMMETRIES, seed=SEED + int(patient[1:]), profile=PROFILES["demo"], patient=patient
    )
    crops = np.ascontiguousarray(all_symmetries(drawn.astype(np.uint8, copy=False)))
    schema = cells_schema("uint8", crops.shape[1])
    zeros = np.zeros(len(crops))
    given = {
        "cell_id": pa.array([cell_id(patient, 1, row, 0, "benchmark") for row in range(len(crops))]),
        "patient": pa.array([patient] * len(crops)),
        "pixels": pack_pixels(crops),
    }
    columns = [
        given[field.name] if field.name in given else pa.array(zeros).cast(field.type, safe=False) for field in schema
    ]
    identity = identity_of("segment", {"seed": SEED}, {"patient": patient})
    files = {"part-000.parquet": pa.table(columns, schema=schema)}
    publish(cohort.store, cohort.cells(patient), files, Record("segment", patient, identity, {}, {}))
