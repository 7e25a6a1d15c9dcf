"""Third step of a field: from its candidates to its part of the cell table. Imports no torch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from ctc_ray.segment.crops import cells_of_field
from ctc_ray.segment.instances import Candidates, instances_from_candidates
from ctc_ray.segment.plan import Settings, part_name
from ctc_ray.segment.read_step import FieldTask, pixels_of
from ctc_ray.storage import Store

STATUS_SCHEMA = pa.schema(
    [
        ("patient", pa.string()),
        ("field", pa.int32()),
        ("path", pa.string()),
        ("cells", pa.int32()),
        ("dropped_candidates", pa.int32()),
        ("kind", pa.string()),
        ("message", pa.string()),
        ("node", pa.string()),
        ("pid", pa.int64()),
        ("seconds", pa.float64()),
    ]
)
"""What comes back to the driver for a field: no pixels, no cells."""


class CellCutter:
    """Third step: (task, image, candidates) -> a part on disk and a status row."""

    def __init__(
        self, settings: Settings, cohort: Store, identify: Callable[[], tuple[str, int]] | None = None
    ) -> None:
        """Prepare.

        Args:
            settings: of the stage.
            cohort: where parts are written.
            identify: gives node and process id of the worker.
        """
        self._settings = settings
        self._cohort = cohort
        self._node, self._pid = identify() if identify else ("local", os.getpid())

    def __call__(self, fields: pa.Table) -> pa.Table:
        """Write one part a field of a table of `CANDIDATE_SCHEMA`."""
        return pa.Table.from_pylist([self._cut(row) for row in fields.to_pylist()], schema=STATUS_SCHEMA)

    def _cut(self, row: Mapping[str, Any]) -> dict[str, Any]:
        started, task = time.monotonic(), FieldTask.from_json(row["task"])
        cells = cut_cells(row, task, self._settings)
        if cells is not None:
            self._cohort.write_table(f"{task.parts_folder}/{part_name(task.field.field)}", cells)
        seconds = row["seconds"] + time.monotonic() - started
        return status_of(row, task, 0 if cells is None else cells.num_rows, self._node, self._pid, seconds)


def cut_cells(row: Mapping[str, Any], task: FieldTask, settings: Settings) -> pa.Table | None:
    """Cells of a field from its candidates, as they are stored; None where the field has no image.

    Args:
        row: of `CANDIDATE_SCHEMA`.
        task: of the row.
        settings: of the stage.
    """
    if row["image"] is None:
        return None
    found = instances_from_candidates(_candidates(row), nms_thresh=settings.nms_thresh)
    return cells_of_field(
        pixels_of(row),
        found,
        patient=task.field.patient,
        field=task.field.field,
        origin=task.field.origin,
        fingerprint=task.fingerprint,
        pixel_size_um=settings.pixel_size_um,
    )


def status_of(
    row: Mapping[str, Any], task: FieldTask, cells: int, node: str, pid: int, seconds: float
) -> dict[str, Any]:
    """Row of `STATUS_SCHEMA` of a field whose cells were cut by a process of a node."""
    return {
        "patient": task.field.patient,
        "field": task.field.field,
        "path": task.field.path,
        "cells": cells,
        "dropped_candidates": row["dropped"] or 0,
        "kind": row["kind"],
        "message": row["message"],
        "node": node,
        "pid": pid,
        "seconds": seconds,
    }


def _candidates(row: Mapping[str, Any]) -> Candidates:
    prob = np.frombuffer(row["prob"], dtype=np.float32)
    dist = np.frombuffer(row["dist"], dtype=np.float32).reshape(-1, row["n_rays"])
    points = np.frombuffer(row["points"], dtype=np.int64).reshape(-1, 2)
    return Candidates(prob, dist, points, (row["height"], row["width"]), row["dropped"])
