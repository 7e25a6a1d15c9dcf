"""Archives of the older CellTracks-XP: tables `.dlm` instead of an xml.

No description of the tables is published. What is read is what ACCEPT reads, and anything else is refused: fields separated by a
broken bar ("¦", in Latin-1 or UTF-8), no header, text perhaps in double quotes, one line a row.

- `pic.dlm`, 5 columns: name (a time stamp) of a picture in the first, its frame number in the fourth.
- `cells.dlm`, 13 columns: the picture's name in the second, then centre x, centre y, width and height in pixels of the frame
  (third to sixth), and "Y" in the eleventh where the operator selected the cell. A cell's number is that of its line.

Source: ACCEPT, loader `CellTracksXp` (`read_pic_dlm`, `read_cells_dlm`).
"""

from __future__ import annotations

import math
import re

from ctc_ray.errors import CartridgeError
from ctc_ray.schema import FIELD_HEIGHT_PX, FIELD_WIDTH_PX
from ctc_ray.segment.archive_xml import ArchiveEvent, RejectedEvent, placed

PICTURES_NAME = "pic.dlm"
CELLS_NAME = "cells.dlm"
NUM_FRAMES_FROM_BOTTOM = 140
"""Archives of this many frames count them from the bottom row."""
MAX_TABLE_BYTES = 64 * 2**20
_SEPARATOR = "\u00a6"
_PICTURE_COLUMNS, _CELL_COLUMNS = 5, 13
_FRAME = re.compile(r"\d{1,5}(?:\.0*)?", re.ASCII)


def read_pictures(data: bytes, source: str) -> dict[str, int]:
    """Read `pic.dlm`.

    Args:
        data: content of the file.
        source: name for messages.

    Returns:
        Name of a picture -> frame number, 1-based.

    Raises:
        CartridgeError: a row does not have the expected columns, or a name has two frames.
    """
    frames: dict[str, int] = {}
    for line, columns in _rows(data, source):
        if len(columns) != _PICTURE_COLUMNS or not columns[0] or not _FRAME.fullmatch(columns[3]):
            raise CartridgeError(
                f"{source}, line {line}: {_SEPARATOR.join(columns)[:120]!r} does not have {_PICTURE_COLUMNS} columns with a "
                "picture's name in the first and its frame number in the fourth"
            )
        name, frame = columns[0], int(float(columns[3]))
        if frame < 1 or frames.get(name, frame) != frame:
            raise CartridgeError(
                f"{source}, line {line}: picture {name!r} has frame {frame}, which is not from 1 or differs from an earlier line"
            )
        frames[name] = frame
    if not frames:
        raise CartridgeError(f"{source} lists no pictures")
    return frames


def read_cells(
    data: bytes, frames: dict[str, int], source: str
) -> tuple[tuple[ArchiveEvent, ...], tuple[RejectedEvent, ...]]:
    """Read `cells.dlm`.

    Args:
        data: content of the file.
        frames: from `read_pictures`.
        source: name for messages.

    Returns:
        Events in the order of the file, and the rows that are none. Rows of another number of columns, with a picture that
        `frames` does not know, without numbers, or outside of their frame are among the latter.

    Raises:
        CartridgeError: the file is no text of such rows at all.
    """
    read = [_cell(columns, str(line), frames) for line, columns in _rows(data, source)]
    events = tuple(event for event in read if isinstance(event, ArchiveEvent))
    rejected = tuple(event for event in read if isinstance(event, RejectedEvent))
    if rejected and not events and not any(event.outside for event in rejected):
        raise CartridgeError(
            f"{source} has no row that can be read; the first, line {rejected[0].event_id}: {rejected[0].reason}"
        )
    return events, rejected


def _cell(columns: list[str], name: str, frames: dict[str, int]) -> ArchiveEvent | RejectedEvent:
    if len(columns) != _CELL_COLUMNS:
        return RejectedEvent(name, f"the row has {len(columns)} columns, expected {_CELL_COLUMNS}")
    if columns[1] not in frames:
        return RejectedEvent(name, f"picture {columns[1]!r} is not listed in {PICTURES_NAME}")
    try:
        x, y, width, height = (float(text) for text in columns[2:6])
    except ValueError:
        return RejectedEvent(name, f"centre and size are {columns[2:6]}, expected four numbers")
    if not all(map(math.isfinite, (x, y, width, height))) or min(width, height) < 0:
        return RejectedEvent(name, f"centre and size are {columns[2:6]}, expected finite numbers and a size from 0")
    event = ArchiveEvent(
        event_id=name,
        field=frames[columns[1]],
        top=y - height / 2,
        left=x - width / 2,
        bottom=y + height / 2,
        right=x + width / 2,
        is_ctc=columns[10] == "Y",
    )
    return placed(event, (FIELD_HEIGHT_PX, FIELD_WIDTH_PX))


def _rows(data: bytes, source: str) -> list[tuple[int, list[str]]]:
    """Lines that are not empty, with their number from 1 and their columns without quotes."""
    if len(data) > MAX_TABLE_BYTES:
        raise CartridgeError(f"{source} has {len(data)} bytes; such a table has at most {MAX_TABLE_BYTES}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")  # in which the broken bar is one byte
    rows = [
        (number, [column.strip().strip('"').strip() for column in line.split(_SEPARATOR)])
        for number, line in enumerate(re.split(r"\r\n|\r|\n", text), start=1)
        if line.strip()
    ]
    if not any(len(columns) > 1 for _, columns in rows):
        raise CartridgeError(f"{source} has no columns separated by {_SEPARATOR!r}, as tables of CellTracks-XP have")
    return rows
