"""Archives of CellTracks-XP: tables instead of an xml, frames counted from the bottom row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ctc_ray.errors import CartridgeError
from ctc_ray.segment.archive_xml import Geometry
from ctc_ray.segment.cartridge import find_cartridge
from ctc_ray.segment.celltracks_xp import read_cells, read_pictures
from ctc_ray.storage import Store

PICTURES = '"20060502 101500"¦a¦b¦1¦c\n"20060502 101503"¦a¦b¦2¦c\n'
FRAMES = {"20060502 101500": 1, "20060502 101503": 2}


def cell(
    picture: str = "20060502 101500", place: str = "700.5¦500¦21¦11", selected: str = "Y", columns: int = 13
) -> str:
    values = ["id", f'"{picture}"', *place.split("¦"), *"abcd", selected, *"xyz"]
    return "¦".join(values[:columns])


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_frame_map_is_read_in_either_encoding(encoding: str, newline: str) -> None:
    assert read_pictures(PICTURES.replace("\n", newline).encode(encoding), "pic.dlm") == FRAMES


def test_cells_are_boxes_around_their_centre_and_y_means_selected() -> None:
    text = "\n".join([cell(), cell("20060502 101503", selected="N"), cell(selected="")])
    events, rejected = read_cells(text.encode("latin-1"), FRAMES, "cells.dlm")
    assert rejected == ()
    first = events[0]
    assert (first.left, first.right, first.top, first.bottom) == (690.0, 711.0, 494.5, 505.5)
    assert [(event.event_id, event.field, event.is_ctc) for event in events] == [
        ("1", 1, True),
        ("2", 2, False),
        ("3", 1, False),
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (cell("20060502 999999"), "not listed in pic.dlm"),
        (cell(place="x¦500¦21¦11"), "four numbers"),
        (cell(place="nan¦500¦21¦11"), "finite"),
        (cell(place="700¦500¦-21¦11"), "size from 0"),
        (cell(place="7000¦500¦21¦11"), "outside of frame 1"),
        (cell(columns=12), "12 columns, expected 13"),
    ],
)
def test_row_that_is_no_cell_is_rejected_with_its_line_and_the_rest_is_kept(row: str, reason: str) -> None:
    events, rejected = read_cells(f"{cell()}\n\n{row}\n{cell()}".encode(), FRAMES, "cells.dlm")
    assert [event.event_id for event in events] == ["1", "4"]
    assert [event.event_id for event in rejected] == ["3"]
    assert reason in rejected[0].reason


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no columns"),
        (b"a;b;c;1;d", "no columns"),
        (b"\x00\xff\xfe\x01", "no columns"),
        ("a¦b¦c¦1".encode(), "line 1.*5 columns"),
        ("a¦b¦c¦one¦d".encode(), "line 1.*5 columns"),
        ("a¦b¦c¦1¦d\na¦b¦c¦2¦d".encode(), "line 2.*differs"),
        ("a¦b¦c¦0¦d".encode(), "line 1.*not from 1"),
    ],
)
def test_frame_map_of_another_layout_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(CartridgeError, match=reason):
        read_pictures(data, "pic.dlm")


def test_table_of_cells_without_a_single_readable_row_is_refused() -> None:
    with pytest.raises(CartridgeError, match=r"cells\.dlm has no row.*12 columns"):
        read_cells(cell(columns=12).encode(), FRAMES, "cells.dlm")


def published_order() -> np.ndarray:
    """Frame numbers on the 4 x 35 grid, written down as ACCEPT counts them: from the bottom row, 1-based."""
    order = np.zeros((4, 35), dtype=int)
    for i in range(1, 141):
        row = 4 - (i - 1) // 35
        col = 140 - i + 1 - (row - 1) * 35 if row in (2, 4) else (i % 35 or 35)
        order[row - 1, col - 1] = i
    return order


def test_frames_from_the_bottom_lie_where_the_published_order_has_them() -> None:
    geometry = Geometry(4, 35, 1036, 1384, from_bottom=True)
    order = published_order()
    assert sorted(order.ravel()) == list(range(1, 141))
    for frame in range(1, 141):
        assert order[geometry.place(frame)] == frame
    assert geometry.place(1) == (3, 34)


@pytest.mark.parametrize(("num_rows", "num_columns"), [(6, 35), (5, 36), (5, 35), (5, 34), (4, 36), (4, 35)])
def test_frames_from_the_top_run_to_and_fro(num_rows: int, num_columns: int) -> None:
    frames = np.arange(1, num_rows * num_columns + 1).reshape(num_rows, num_columns)
    frames[1::2] = frames[1::2, ::-1]
    geometry = Geometry(num_rows, num_columns, 1036, 1384)
    assert all(geometry.place(int(frames[place])) == place for place in np.ndindex(frames.shape))


def archive(root: Path, *, named_by_frame: bool) -> Store:
    folder = root / "XP" / "mic07"
    folder.mkdir(parents=True)
    names = [f"20060502 {frame:06d}" for frame in range(1, 141)]
    (folder / "pic.dlm").write_bytes(
        "\n".join(f'"{name}"¦a¦b¦{frame}¦c' for frame, name in enumerate(names, start=1)).encode("latin-1")
    )
    for frame, name in enumerate(names, start=1):
        (folder / (f"xp_p{frame}.tif" if named_by_frame else f"{name}.tif")).write_bytes(b"x")
    return Store(str(root))


@pytest.mark.parametrize("named_by_frame", [True, False])
def test_archive_of_140_frames_with_tables_counts_from_the_bottom(tmp_path: Path, named_by_frame: bool) -> None:
    cartridge = find_cartridge(archive(tmp_path, named_by_frame=named_by_frame), "XP")
    assert cartridge.set_aside == ()
    assert cartridge.geometry == Geometry(4, 35, 1036, 1384, from_bottom=True)
    origins = {field.field: field.origin for field in cartridge.fields}
    assert len(origins) == 140
    assert origins[1] == (3 * 1036, 34 * 1384)
    assert origins[36] == (2 * 1036, 0)
    assert origins[140] == (0, 34 * 1384)
    assert "XP/mic07/pic.dlm" in cartridge.files


def test_order_of_frames_can_be_given(tmp_path: Path) -> None:
    cartridge = find_cartridge(archive(tmp_path, named_by_frame=True), "XP", frame_order="top")
    assert cartridge.fields[0].origin == (0, 0)


def test_frame_map_that_cannot_be_read_is_set_aside(tmp_path: Path) -> None:
    store = archive(tmp_path, named_by_frame=True)
    (tmp_path / "XP" / "mic07" / "pic.dlm").write_bytes(b"a;b")
    cartridge = find_cartridge(store, "XP")
    assert [row.source for row in cartridge.set_aside] == ["XP/mic07/pic.dlm"]
    assert len(cartridge.fields) == 140
