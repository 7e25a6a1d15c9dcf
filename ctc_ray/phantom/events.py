"""A CellSearch-like event finder: every place where CK and DAPI are bright side by side.

Source: paper, Discussion: CellSearch lists "events where the DAPI and CK signals are close together"; an operator then decides.
The finder sees the expected image without camera noise and background, so it depends on the cells alone.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl
from scipy import ndimage

from ctc_ray.phantom.kinds import CTC_KINDS
from ctc_ray.phantom.objects import FloatArray

CK_THRESHOLD = 280.0
"""Counts of CK above which a pixel belongs to an event."""
DAPI_THRESHOLD = 300.0
"""Counts of DAPI that must occur within the CK signal for the event to be listed."""
MINIMUM_AREA_PX = 45
"""CK signal of a blurred body of 4 um, the smallest that the definition of a CTC allows."""
MARGIN_PX = 2
"""The box is this much larger than the CK signal on each side."""


@dataclass(frozen=True)
class Event:
    """A listed event; coordinates in px of the frame, the last row and column belong to the box.

    Attributes:
        first_row, first_col, last_row, last_col: corners of the box.
        assigned: the operator calls it a CTC: the centre of a true CTC lies in the box.
    """

    first_row: int
    first_col: int
    last_row: int
    last_col: int
    assigned: bool


def find_events(light: FloatArray, truth: pl.DataFrame) -> tuple[Event, ...]:
    """List the events of one frame.

    Args:
        light: (3, H, W) float32 expected counts of DAPI, CK and CD45, without background.
        truth: the frame's cells, with `row`, `col` and `kind`.

    Returns:
        Events from top to bottom. CTCs that are too dim are not among them, as with CellSearch.
    """
    labels, _ = ndimage.label(light[1] > CK_THRESHOLD)
    ctcs = truth.filter(pl.col("kind").is_in([str(kind) for kind in CTC_KINDS]))
    rows, cols = ctcs["row"].to_numpy(), ctcs["col"].to_numpy()
    height, width = light.shape[1:]
    events = []
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        signal = labels[box] == label
        if np.count_nonzero(signal) < MINIMUM_AREA_PX or light[0][box][signal].max() < DAPI_THRESHOLD:
            continue
        first_row, first_col = max(box[0].start - MARGIN_PX, 0), max(box[1].start - MARGIN_PX, 0)
        last_row = min(box[0].stop - 1 + MARGIN_PX, height - 1)
        last_col = min(box[1].stop - 1 + MARGIN_PX, width - 1)
        inside = (rows >= first_row) & (rows <= last_row) & (cols >= first_col) & (cols <= last_col)
        events.append(Event(first_row, first_col, last_row, last_col, assigned=bool(inside.any())))
    return tuple(events)
