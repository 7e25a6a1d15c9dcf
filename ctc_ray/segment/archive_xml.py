"""The xml beside a CellSearch archive: grid, filters and the events that the instrument listed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from xml.etree.ElementTree import Element, ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

from ctc_ray.errors import CartridgeError

ROOTS = ("archive", "export")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@dataclass(frozen=True)
class Geometry:
    """How the frames of a cartridge lie.

    Attributes:
        num_rows: rows of frames.
        num_columns: columns of frames.
        field_height_px: rows of pixels of a frame; also the step from one row of frames to the next.
        field_width_px: columns of pixels of a frame; also the step from one column of frames to the next.
    """

    num_rows: int
    num_columns: int
    field_height_px: int
    field_width_px: int

    def place(self, frame: int) -> tuple[int, int]:
        """Row and column on the grid, 0-based, of a 1-based frame number.

        Frames run left to right in the first row, right to left in the second, and so on.
        """
        row, step = divmod(frame - 1, self.num_columns)
        return row, step if row % 2 == 0 else self.num_columns - 1 - step

    def origin(self, frame: int) -> tuple[int, int]:
        """Row and column, in pixels of the cartridge, of a frame's top left corner; frames abut nominally."""
        row, column = self.place(frame)
        return row * self.field_height_px, column * self.field_width_px


@dataclass(frozen=True)
class ArchiveEvent:
    """A place that the instrument listed.

    Attributes:
        event_id: `rid` or `eventnum` of the record.
        field: frame number, 1-based.
        top: first row of the box, pixels of the field.
        left: first column of the box, pixels of the field.
        bottom: last row of the box, pixels of the field.
        right: last column of the box, pixels of the field.
        is_ctc: what the operator decided; None where the record does not tell.
    """

    event_id: str
    field: int
    top: float
    left: float
    bottom: float
    right: float
    is_ctc: bool | None


@dataclass(frozen=True)
class Archive:
    """What an archive's xml tells.

    Attributes:
        geometry: grid of frames, None where it is not recorded.
        filters: name of each page's filter, in page order.
        events: listed events, in the file's order.
    """

    geometry: Geometry | None
    filters: tuple[str, ...]
    events: tuple[ArchiveEvent, ...]


def read_archive(data: bytes, source: str) -> Archive:
    """Read the xml of an archive.

    Args:
        data: content of the file.
        source: name for messages.

    Raises:
        CartridgeError: it is no xml of an archive, or has entities (which such files never need, and which can be
            made to exhaust memory or to read other files).
    """
    try:
        root = fromstring(data, forbid_dtd=False, forbid_entities=True, forbid_external=True)
    except DefusedXmlException as error:
        raise CartridgeError(f"{source} is refused: it declares entities or external references ({error})") from error
    except (ParseError, ValueError) as error:
        raise CartridgeError(f"{source} is not well-formed xml: {error}") from error
    if root.tag not in ROOTS:
        raise CartridgeError(f"{source} has the root element {root.tag!r}; an archive has {' or '.join(ROOTS)}")
    geometry = _geometry(root, source)
    filters = tuple(_text(record, "filtername") or "" for record in root.iterfind("test_filters/record"))
    records = root.iterfind("events/record")
    events = tuple(event for record in records if (event := _event(record, geometry)) is not None)
    return Archive(geometry, filters, events)


def _geometry(root: Element, source: str) -> Geometry | None:
    record = root.find("runs/record")
    if record is None:
        return None
    texts = [_text(record, name) for name in ("numrows", "numcols", "camysize", "camxsize")]
    if any(text is None for text in texts):
        return None
    try:
        rows, columns, height, width = (int(text or "") for text in texts)
    except ValueError as error:
        raise CartridgeError(f"{source}: the grid in runs/record is {texts}, expected four integers") from error
    if not (1 <= rows <= 1000 and 1 <= columns <= 1000 and 48 <= height <= 32_767 and 48 <= width <= 32_767):
        raise CartridgeError(f"{source}: the grid in runs/record is {rows} x {columns} frames of {height} x {width} px")
    return Geometry(rows, columns, height, width)


def _event(record: Element, geometry: Geometry | None) -> ArchiveEvent | None:
    """One event in pixels of its field; None where frame or location cannot be read."""
    frame, corners = _text(record, "framenum"), _NUMBER.findall(_text(record, "location") or "")
    if frame is None or not frame.isdigit() or len(corners) != 4:
        return None
    # Two (x, y) pairs, the far corner first, in pixels of the cartridge.
    x_far, y_far, x_near, y_near = map(float, corners)
    row, column = geometry.origin(int(frame)) if geometry else (0, 0)
    return ArchiveEvent(
        event_id=_text(record, "rid") or _text(record, "eventnum") or "",
        field=int(frame),
        top=min(y_near, y_far) - row,
        left=min(x_near, x_far) - column,
        bottom=max(y_near, y_far) - row,
        right=max(x_near, x_far) - column,
        is_ctc=_is_ctc(record),
    )


def _is_ctc(record: Element) -> bool | None:
    """`assigned` = true in newer archives, `numselected` of 1 to 3 in older ones."""
    assigned = _text(record, "assigned")
    if assigned is not None:
        return assigned.lower() in ("true", "1", "yes")
    selected = _text(record, "numselected")
    return None if selected is None or not selected.isdigit() else 1 <= int(selected) <= 3


def _text(record: Element, name: str) -> str | None:
    child = record.find(name)
    return None if child is None or child.text is None or not child.text.strip() else child.text.strip()
