"""The xml beside a CellSearch archive: grid, filters and the events that the instrument listed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, ParseError, TreeBuilder

from defusedxml import DefusedXmlException, DTDForbidden
from defusedxml.ElementTree import DefusedXMLParser

from ctc_ray.errors import CartridgeError

ROOTS = ("archive", "export")
MAX_XML_BYTES = 256 * 2**20
"""An archive of 10,000 events has about 10 MB."""
EVENT_SLACK_PX = 64
"""How far a box may reach out of its frame before the event is held to be misplaced."""
_MAX_DEPTH = 64
_MAX_FRAME = 32_767
_NUMBER = r"\s*(-?\d{1,9}(?:\.\d*)?)\s*"
_LOCATION = re.compile(rf"\s*\({_NUMBER},{_NUMBER}\)\s*[,;]?\s*\({_NUMBER},{_NUMBER}\)\s*", re.ASCII)
_WHOLE = re.compile(r"\d{1,9}", re.ASCII)


@dataclass(frozen=True)
class Geometry:
    """How the frames of a cartridge lie.

    Attributes:
        num_rows: rows of frames.
        num_columns: columns of frames.
        field_height_px: rows of pixels of a frame; also the step from one row of frames to the next.
        field_width_px: columns of pixels of a frame; also the step from one column of frames to the next.
        from_bottom: whether frame 1 lies in the bottom row, as in CellTracks-XP archives of 140 frames.
    """

    num_rows: int
    num_columns: int
    field_height_px: int
    field_width_px: int
    from_bottom: bool = False

    @property
    def num_frames(self) -> int:
        """Frames of the grid."""
        return self.num_rows * self.num_columns

    def place(self, frame: int) -> tuple[int, int]:
        """Row and column on the grid, 0-based from the top left, of a 1-based frame number.

        Frames run left to right in the first row of the grid (the top one), right to left in the second, and so on,
        whichever row is counted first.

        Source: ACCEPT's `calculate_frame_nr_order` of its loaders `CellTracks` and, for `from_bottom`, `CellTracksXp`.
        """
        row, step = divmod(frame - 1, self.num_columns)
        if self.from_bottom:
            row = self.num_rows - 1 - row
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
class RejectedEvent:
    """A record that cannot be used as an event.

    Attributes:
        event_id: its number, or `record N`, counted from 1, where it has none.
        reason: what is wrong with it.
        outside: whether it could be read, but lies outside of its frame or of the grid.
    """

    event_id: str
    reason: str
    outside: bool = False


@dataclass(frozen=True)
class Archive:
    """What an archive's xml tells.

    Attributes:
        geometry: grid of frames, None where it is not recorded.
        filters: name of each page's filter, in page order.
        events: listed events, in the file's order.
        rejected: records that are no usable event, in the file's order.
    """

    geometry: Geometry | None
    filters: tuple[str, ...]
    events: tuple[ArchiveEvent, ...]
    rejected: tuple[RejectedEvent, ...] = ()


def read_archive(data: bytes, source: str) -> Archive:
    """Read the xml of an archive.

    Args:
        data: content of the file.
        source: name for messages.

    Raises:
        CartridgeError: it is no xml of an archive, is too large or nested too deeply for one, or has entities or external
            references (which such files never need, and which can be made to exhaust memory or to read other files).
    """
    root = _parse(data, source)
    if root.tag not in ROOTS:
        raise CartridgeError(f"{source} has the root element {root.tag!r}; an archive has {' or '.join(ROOTS)}")
    geometry = _geometry(root, source)
    filters = tuple(_text(record, "filtername") or "" for record in root.iterfind("test_filters/record"))
    read = [_event(record, number, geometry) for number, record in enumerate(root.iterfind("events/record"), start=1)]
    return Archive(
        geometry=geometry,
        filters=filters,
        events=tuple(event for event in read if isinstance(event, ArchiveEvent)),
        rejected=tuple(event for event in read if isinstance(event, RejectedEvent)),
    )


class _ShallowTree(TreeBuilder):
    """Builds a tree and stops at a depth that no archive has."""

    depth = 0

    def start(self, tag: str, attrs: dict[str, str], /) -> Element:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise ValueError(f"elements are nested more than {_MAX_DEPTH} deep")
        return super().start(tag, attrs)

    def end(self, tag: str, /) -> Element:
        self.depth -= 1
        return super().end(tag)


def _parse(data: bytes, source: str) -> Element:
    if len(data) > MAX_XML_BYTES:
        raise CartridgeError(f"{source} has {len(data)} bytes; an archive's xml has at most {MAX_XML_BYTES}")
    try:
        try:
            return _tree(data, forbid_dtd=True)
        except DTDForbidden as error:
            if error.sysid is not None or error.pubid is not None:
                raise
            return _tree(data, forbid_dtd=False)  # a document type without entities, inside of the file, is harmless
    except DefusedXmlException as error:
        raise CartridgeError(f"{source} is refused: it declares entities or external references ({error})") from error
    except (ParseError, ValueError, LookupError) as error:  # LookupError: an encoding that does not exist
        raise CartridgeError(f"{source} is not well-formed xml: {error}") from error


def _tree(data: bytes, *, forbid_dtd: bool) -> Element:
    parser = DefusedXMLParser(target=_ShallowTree(), forbid_dtd=forbid_dtd, forbid_entities=True, forbid_external=True)
    parser.feed(data)
    root: Element = parser.close()
    return root


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


def _event(record: Element, number: int, geometry: Geometry | None) -> ArchiveEvent | RejectedEvent:
    """One event in pixels of its field, or why the record is none."""
    named = _text(record, "rid") or _text(record, "eventnum")
    name = named or f"record {number}"
    frame, location = _text(record, "framenum"), _text(record, "location")
    corners = _LOCATION.fullmatch(location or "")
    if named is None:
        return RejectedEvent(name, "it has neither rid nor eventnum, so no label or match could name it")
    if frame is None or not _WHOLE.fullmatch(frame) or not 1 <= int(frame) <= _MAX_FRAME:
        return RejectedEvent(name, f"framenum is {frame!r}, expected a frame number from 1")
    if corners is None:
        return RejectedEvent(name, f"location is {location!r}, expected (x, y),(x, y)")
    try:
        is_ctc = _is_ctc(record)
    except ValueError as error:
        return RejectedEvent(name, str(error))
    # Two (x, y) pairs, the far corner first, in pixels of the cartridge.
    x_far, y_far, x_near, y_near = map(float, corners.groups())
    if geometry is not None and int(frame) > geometry.num_frames:
        reason = f"frame {frame} is not on the grid of {geometry.num_rows} x {geometry.num_columns} frames"
        return RejectedEvent(name, reason, outside=True)
    row, column = geometry.origin(int(frame)) if geometry else (0, 0)
    event = ArchiveEvent(
        event_id=name,
        field=int(frame),
        top=min(y_near, y_far) - row,
        left=min(x_near, x_far) - column,
        bottom=max(y_near, y_far) - row,
        right=max(x_near, x_far) - column,
        is_ctc=is_ctc,
    )
    return event if geometry is None else placed(event, (geometry.field_height_px, geometry.field_width_px))


def placed(event: ArchiveEvent, shape: Sequence[int]) -> ArchiveEvent | RejectedEvent:
    """Give an event back if its box lies in its frame, give or take `EVENT_SLACK_PX`.

    Args:
        event: with its box in pixels of the field.
        shape: (H, W) of the field, pixels.
    """
    box = (event.top, event.left, event.bottom, event.right)
    if min(event.top, event.left) < -EVENT_SLACK_PX or any(
        far >= side + EVENT_SLACK_PX for far, side in zip((event.bottom, event.right), shape, strict=True)
    ):
        corners = ", ".join(f"{value:g}" for value in box)
        reason = f"its box ({corners}: top, left, bottom, right in px) lies outside of frame {event.field}"
        return RejectedEvent(event.event_id, reason, outside=True)
    return event


def _is_ctc(record: Element) -> bool | None:
    """`assigned` = true in newer archives, `numselected` of 1 to 3 in older ones.

    Raises:
        ValueError: the decision is there and cannot be understood.
    """
    assigned = _text(record, "assigned")
    if assigned is not None:
        if assigned.lower() not in ("true", "1", "yes", "false", "0", "no"):
            raise ValueError(f"assigned is {assigned!r}, expected true or false")
        return assigned.lower() in ("true", "1", "yes")
    selected = _text(record, "numselected")
    if selected is None:
        return None
    if not _WHOLE.fullmatch(selected):
        raise ValueError(f"numselected is {selected!r}, expected a count")
    return 1 <= int(selected) <= 3


def _text(record: Element, name: str) -> str | None:
    child = record.find(name)
    return None if child is None or child.text is None or not child.text.strip() else child.text.strip()
