"""Sources of single-cell images in three forms, and an import that runs in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from ctc_ray.cohort import Cohort
from ctc_ray.config import ImportCropsConfig, load_config
from ctc_ray.imports.convert import convert_rows
from ctc_ray.imports.finish import PatientOutput, finish_patient
from ctc_ray.imports.given_labels import write_given_labels
from ctc_ray.imports.pixels import reader_of
from ctc_ray.imports.plan import PatientPlan, conversion_of, missing_units, plan_patients, units_of
from ctc_ray.imports.rows import read_rows
from ctc_ray.imports.source import open_source

ImportHere = Callable[..., list[PatientPlan]]


@pytest.fixture
def crops() -> np.ndarray:
    """Crops (6, 3, 48, 48) uint8."""
    return np.random.default_rng(1).integers(0, 256, (6, 3, 48, 48), dtype=np.uint8)


@pytest.fixture
def import_here() -> ImportHere:
    """Import a source without Ray, as the workers would: `import_here(cohort, source, *overrides)` -> plans."""

    def run(cohort: Cohort, source: Path | str, *overrides: str) -> list[PatientPlan]:
        section: ImportCropsConfig = load_config(None, [f"import_crops.{text}" for text in overrides]).import_crops
        opened = open_source(str(source), section)
        rows = read_rows(opened, section)
        conversion = conversion_of(opened, section, rows)
        plans = plan_patients(cohort, opened, rows, conversion)
        cohort.add_patients({plan.patient: opened.name for plan in plans})
        units = units_of(opened, plans, section.unit_cells)
        reader = reader_of(opened, section)
        for unit in missing_units(units, set()):
            convert_rows(cohort.store, unit.rows, unit.parts, reader, conversion)
        for plan in plans:
            parts = tuple(unit.parts[plan.patient] for unit in units if plan.patient in unit.parts)
            if plan.is_open:
                done = PatientOutput(plan.patient, plan.settings, plan.inputs, parts, plan.refused, len(parts), 0.0, ())
                finish_patient(cohort, done)
            write_given_labels(cohort, plan, section, opened.name)
        return plans

    return run


@pytest.fixture
def table(tmp_path: Path, crops: np.ndarray) -> Path:
    """A table as the reference writes it: three PNGs a cell, boxes, codes; patients `007` and `Müller 3`."""
    folder = tmp_path / "source"
    folder.mkdir()
    rows = []
    for index, crop in enumerate(crops):
        paths = {}
        for name, plane in zip(("dapi", "ck", "cd45"), crop, strict=True):
            paths[f"{name}_path"] = f"{index}_{name}.png"
            Image.fromarray(plane).save(folder / f"{index}_{name}.png")
        box = {"frame_num": float(index + 1), "y_min": 10.5, "y_max": 58.5, "x_min": 20.0, "x_max": 68.0}
        label = (1.0, 0.0, 10.0)[index % 3]
        rows.append({"case": ("007", "Müller 3")[index % 2], "label": label, **box, **paths})
    path = folder / "cells_dataframe"
    pl.DataFrame(rows).write_csv(path)
    return path
