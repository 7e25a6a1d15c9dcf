"""The three steps of one field, as functions of Arrow tables of one row, so that any engine can stream them.

A field travels as bytes: its task (JSON), then its image, then its candidates. A field that failed keeps its row, with
the reason instead of the image; every later step passes it on.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ctc_ray.errors import CartridgeError, MissingInputError
from ctc_ray.segment.cartridge import FieldFile
from ctc_ray.segment.crops import cells_of_field
from ctc_ray.segment.field_image import read_field
from ctc_ray.segment.instances import Candidates, instances_from_candidates
from ctc_ray.segment.model import StarDist
from ctc_ray.segment.plan import Settings, part_name
from ctc_ray.storage import StorageError, Store

TASK_SCHEMA = pa.schema([("task", pa.string())])
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
_IMAGE_FIELDS = [
    ("task", pa.string()),
    ("image", pa.large_binary()),
    ("dtype", pa.string()),
    ("height", pa.int32()),
    ("width", pa.int32()),
    ("kind", pa.string()),
    ("message", pa.string()),
    ("seconds", pa.float64()),
]
IMAGE_SCHEMA = pa.schema(_IMAGE_FIELDS)
CANDIDATE_SCHEMA = pa.schema(
    [
        *_IMAGE_FIELDS,
        ("prob", pa.large_binary()),
        ("dist", pa.large_binary()),
        ("points", pa.large_binary()),
        ("dropped", pa.int32()),
    ]
)


@dataclass(frozen=True)
class FieldTask:
    """One field to segment.

    Attributes:
        field: where it is.
        parts_folder: where its part goes, relative to the cohort.
        dtype: pixel type of the patient's fields.
    """

    field: FieldFile
    parts_folder: str
    dtype: str

    def to_json(self) -> str:
        """The task as text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> FieldTask:
        """Read what `to_json` wrote."""
        values = json.loads(text)
        field = values["field"]
        shape = None if field["shape"] is None else tuple(field["shape"])
        return cls(
            FieldFile(**(field | {"shape": shape, "origin": tuple(field["origin"])})),
            values["parts_folder"],
            values["dtype"],
        )


def read_fields(tasks: pa.Table, *, cartridges: Store, settings: Settings) -> pa.Table:
    """First step: (task) -> (task, image or reason)."""
    rows = [_read(text, cartridges, settings) for text in tasks["task"].to_pylist()]
    return pa.Table.from_pylist(rows, schema=IMAGE_SCHEMA)


def _read(text: str, cartridges: Store, settings: Settings) -> dict[str, Any]:
    started, task = time.monotonic(), FieldTask.from_json(text)
    row: dict[str, Any] = {"task": text}
    try:
        pixels = read_field(cartridges, task.field, settings.channel_map)
        if str(pixels.dtype) != task.dtype:
            raise CartridgeError(
                f"{task.field.path} holds {pixels.dtype} pixels, the patient's other fields {task.dtype}"
            )
        row |= {"image": pixels.tobytes(), "dtype": task.dtype, "height": pixels.shape[1], "width": pixels.shape[2]}
    except (CartridgeError, MissingInputError, StorageError) as error:
        row |= {"kind": type(error).__name__, "message": str(error)}
    return row | {"seconds": time.monotonic() - started}


class CandidateFinder:
    """Second step, the network: (task, image) -> (task, image, candidates)."""

    def __init__(self, settings: Settings, num_threads: int) -> None:
        """Load the weights once.

        Args:
            settings: of the stage.
            num_threads: of this process.
        """
        import torch

        torch.set_num_threads(num_threads)
        self._settings = settings
        self._model = StarDist.load(settings.weights, precision=settings.precision, percentiles=settings.percentiles)

    def __call__(self, fields: pa.Table) -> pa.Table:
        """Add candidates to a table of `IMAGE_SCHEMA`."""
        return pa.Table.from_pylist([self._find(row) for row in fields.to_pylist()], schema=CANDIDATE_SCHEMA)

    def _find(self, row: dict[str, Any]) -> dict[str, Any]:
        if row["image"] is None:
            return row
        started = time.monotonic()
        found = self._model.candidates(
            _pixels(row)[1], prob_thresh=self._settings.prob_thresh, max_candidates=self._settings.max_candidates
        )
        row |= {"prob": found.prob.tobytes(), "dist": found.dist.tobytes(), "points": found.points.tobytes()}
        return row | {"dropped": found.num_dropped, "seconds": row["seconds"] + time.monotonic() - started}


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
        field, settings, num_cells = task.field, self._settings, 0
        if row["image"] is not None:
            pixels = _pixels(row)
            found = instances_from_candidates(_candidates(row), nms_thresh=settings.nms_thresh)
            cells = cells_of_field(
                pixels,
                found,
                patient=field.patient,
                field=field.field,
                origin=field.origin,
                fingerprint=settings.fingerprint,
                pixel_size_um=settings.pixel_size_um,
            )
            self._cohort.write_table(f"{task.parts_folder}/{part_name(field.field)}", cells)
            num_cells = cells.num_rows
        return {
            "patient": field.patient,
            "field": field.field,
            "path": field.path,
            "cells": num_cells,
            "dropped_candidates": row["dropped"] or 0,
            "kind": row["kind"],
            "message": row["message"],
            "node": self._node,
            "pid": self._pid,
            "seconds": row["seconds"] + time.monotonic() - started,
        }


def _pixels(row: Mapping[str, Any]) -> np.ndarray:
    return np.frombuffer(row["image"], dtype=row["dtype"]).reshape(-1, row["height"], row["width"])


def _candidates(row: Mapping[str, Any]) -> Candidates:
    prob = np.frombuffer(row["prob"], dtype=np.float32)
    dist = (
        np.frombuffer(row["dist"], dtype=np.float32).reshape(len(prob), -1)
        if len(prob)
        else np.zeros((0, 32), np.float32)
    )
    points = np.frombuffer(row["points"], dtype=np.int64).reshape(-1, 2)
    return Candidates(prob, dist, points, (row["height"], row["width"]), row["dropped"])
