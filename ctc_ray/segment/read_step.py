"""First step of a field: from its file to its pixels.

A field travels through the plan as a row of bytes: its task (JSON), then its image, then its candidates. A field that failed
keeps its row, with the reason instead of the image; every later step passes it on. This module imports no torch: reading
processes start quickly and stay small.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ctc_ray.errors import CartridgeError, MissingInputError
from ctc_ray.schema import Channel
from ctc_ray.segment.cartridge import FieldFile
from ctc_ray.segment.field_image import read_field
from ctc_ray.segment.plan import Settings
from ctc_ray.storage import StorageError, Store

TASK_SCHEMA = pa.schema([("task", pa.string())])
IMAGE_SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("image", pa.large_binary()),
        ("dtype", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("kind", pa.string()),
        ("message", pa.string()),
        ("seconds", pa.float64()),
    ]
)
"""`image` is (3, H, W) of `dtype`, C order; null where `kind` and `message` tell why there is none, or where the field has its
cells already."""


@dataclass(frozen=True)
class FieldTask:
    """One field to segment.

    Attributes:
        field: where it is.
        parts_folder: where its part goes, relative to the cohort.
        dtype: pixel type of the patient's fields.
        channel_map: channel -> page.
        fingerprint: enters every `cell_id`.
        has_cells: whether its part is there already, and only what follows from it is missing.
        vectors_folder: where the vectors of its cells go, relative to the cohort; empty where none are wanted.
    """

    field: FieldFile
    parts_folder: str
    dtype: str
    channel_map: Mapping[Channel, int | None]
    fingerprint: str
    has_cells: bool = False
    vectors_folder: str = ""

    def to_json(self) -> str:
        """The task as text."""
        pages = {channel.name: page for channel, page in self.channel_map.items()}
        return json.dumps(asdict(self) | {"channel_map": pages})

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
            {Channel[name]: page for name, page in values["channel_map"].items()},
            values["fingerprint"],
            values["has_cells"],
            values["vectors_folder"],
        )


def read_fields(tasks: pa.Table, *, cartridges: Store, settings: Settings) -> pa.Table:
    """First step: (task) -> (task, image or reason)."""
    rows = [_read(text, cartridges, settings) for text in tasks["task"].to_pylist()]
    return pa.Table.from_pylist(rows, schema=IMAGE_SCHEMA)


def _read(text: str, cartridges: Store, settings: Settings) -> dict[str, Any]:
    started, task = time.monotonic(), FieldTask.from_json(text)
    row: dict[str, Any] = {"task": text, "seconds": 0.0}
    if task.has_cells:
        return row
    try:
        pixels = read_field(cartridges, task.field, task.channel_map, settings.contrast)
        if str(pixels.dtype) != task.dtype:
            raise CartridgeError(
                f"{task.field.path} holds {pixels.dtype} pixels, the patient's other fields {task.dtype}"
            )
        row |= {"image": pixels.tobytes(), "dtype": task.dtype, "height": pixels.shape[1], "width": pixels.shape[2]}
    except (CartridgeError, MissingInputError, StorageError) as error:
        row |= {"kind": type(error).__name__, "message": str(error)}
    return row | {"seconds": time.monotonic() - started}


def pixels_of(row: Mapping[str, Any]) -> np.ndarray:
    """View the image (3, H, W) of a row of `IMAGE_SCHEMA`."""
    return np.frombuffer(row["image"], dtype=row["dtype"]).reshape(-1, row["height"], row["width"])
