"""The files of a CellSearch archive: names, four-page TIFFs, and the xml of grid, filters and events.

Source: CellSearch archives as the ACCEPT tool reads them (root `archive`; `runs/record`, `test_filters/record`,
`events/record`; an event's `location` holds two (x, y) pairs in cartridge-global pixels, far corner first).
"""

import io
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import tifffile

from ctc_ray.phantom.events import Event
from ctc_ray.phantom.grid import Grid
from ctc_ray.schema import FIELD_HEIGHT_PX, FIELD_WIDTH_PX

FILTER_NAMES = ("DNA", "FITC", "CK-PE", "CD45-APC")
"""Names of the TIFF's pages in their order."""

MASKS = ".masks"
"""Folder of the instance masks; hidden, because readers of cartridges take every plain folder for a patient."""


def tiff_path(patient: str, frame: int) -> str:
    """Path of a frame below the cartridges' folder."""
    return f"{patient}/processed/{patient}p{frame:03d}.tif"


def xml_path(patient: str) -> str:
    """Path of a cartridge's xml, beside its frames."""
    return f"{patient}/processed/{patient}.xml"


def mask_path(patient: str, frame: int, channel: str) -> str:
    """Path of an instance mask, below the cartridges' folder."""
    return f"{MASKS}/{patient}/{patient}p{frame:03d}_{channel}.tif"


def encode_tiff(pages: npt.NDArray[np.generic], *, compress: bool = False) -> bytes:
    """TIFF of the pages (P, H, W) without time stamps or software names: equal pixels give equal bytes.

    Args:
        pages: one page each.
        compress: deflate with horizontal prediction off; for masks, which hold long runs.
    """
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream, byteorder="<") as writer:
        for page in pages:
            writer.write(
                page,
                photometric="minisblack",
                metadata=None,
                software=False,
                contiguous=False,
                compression="zlib" if compress else None,
            )
    return stream.getvalue()


def encode_xml(patient: str, grid: Grid, events: Mapping[int, Sequence[Event]]) -> bytes:
    """The cartridge's xml: how frames lie, what the pages are, and the listed events with the operator's calls.

    Args:
        patient: written as the sample's name.
        grid: frames of the cartridge.
        events: events of each frame, by 1-based frame number.
    """
    root = ElementTree.Element("archive")
    _record(
        ElementTree.SubElement(root, "runs"),
        sampleid=patient,
        numrows=grid.num_rows,
        numcols=grid.num_cols,
        numframes=grid.num_frames,
        camxsize=FIELD_WIDTH_PX,
        camysize=FIELD_HEIGHT_PX,
    )
    filters = ElementTree.SubElement(root, "test_filters")
    for position, name in enumerate(FILTER_NAMES, start=1):
        _record(filters, filterposition=position, filtername=name)
    listed = ElementTree.SubElement(root, "events")
    number = 0
    for frame in sorted(events):
        for event in events[frame]:
            number += 1
            _record(
                listed,
                rid=number,
                framenum=frame,
                location=location_of(event, grid, frame),
                numselected=int(event.assigned),
                assigned="true" if event.assigned else "false",
            )
    ElementTree.indent(root)
    return b'<?xml version="1.0" encoding="UTF-8"?>\n' + bytes(ElementTree.tostring(root, encoding="utf-8")) + b"\n"


def location_of(event: Event, grid: Grid, frame: int) -> str:
    """`(x, y)` of the far corner, then of the near one, in cartridge-global px.

    Global coordinates step by a full camera width or height, as the archives' do, although neighbouring frames overlap.
    """
    row, col = grid.place(frame)
    down, right = row * FIELD_HEIGHT_PX, col * FIELD_WIDTH_PX
    far = f"({right + event.last_col},{down + event.last_row})"
    return f"{far},({right + event.first_col},{down + event.first_row})"


def _record(parent: ElementTree.Element, **values: str | int) -> None:
    record = ElementTree.SubElement(parent, "record")
    for name, value in values.items():
        ElementTree.SubElement(record, name).text = str(value)
