from __future__ import annotations

from pathlib import Path
from types import ModuleType

import polars as pl
import pytest

from ctc_ray.config import PhantomConfig
from ctc_ray.detect.events import digest_events, find_events_file, read_events, read_gallery
from ctc_ray.errors import CartridgeError
from ctc_ray.phantom import write_phantom
from ctc_ray.phantom.kinds import CTC_KINDS
from ctc_ray.progress import Progress
from ctc_ray.storage import Store


def test_read_events_serpentine_grid_gives_boxes_in_their_fields(faked: ModuleType) -> None:
    records = "".join(faked.event_xml(n, n, 100 * n, 50, 10, is_ctc=n == 2) for n in (1, 2, 3, 4))
    events = read_events(faked.archive_xml(records).encode(), "a.xml")
    assert events["field"].to_list() == [1, 2, 3, 4]
    assert events["row_low"].to_list() == [90.0, 190.0, 290.0, 390.0]
    assert set(events["col_high"]) == {61.0}
    assert events["is_ctc"].to_list() == [False, True, False, False]


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        (b"<archive><events/></archive>", "grid of frames"),
        (b"<archive><events>", "not well-formed"),
        (b"<html/>", "root element"),
        (b'<!DOCTYPE a [<!ENTITY x "y">]><archive>&x;</archive>', "refused"),
    ],
)
def test_read_events_not_an_archive_is_refused(xml: bytes, message: str) -> None:
    with pytest.raises(CartridgeError, match=message):
        read_events(xml, "a.xml")


def test_read_events_box_outside_its_frame_is_refused(faked: ModuleType) -> None:
    record = faked.event_xml(1, 1, 100, 50, 10, is_ctc=True).replace("<framenum>1", "<framenum>4")
    with pytest.raises(CartridgeError, match=r"1 of 1 events lie outside.*frame 4"):
        read_events(faked.archive_xml(record).encode(), "a.xml")


def test_read_events_number_listed_twice_is_refused(faked: ModuleType) -> None:
    record = faked.event_xml(1, 1, 100, 50, 10, is_ctc=True)
    with pytest.raises(CartridgeError, match="twice"):
        read_events(faked.archive_xml(record * 2).encode(), "a.xml")


def test_find_events_file_nested_layouts_are_found(tmp_path: Path) -> None:
    for path in (
        "007/007/processed/007.xml",
        "Müller 3/processed/other.xml",
        "12/12.xml",
        "12/notes.xml",
        "12/.hidden.xml",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("<archive/>")
    store = Store(str(tmp_path))
    assert find_events_file(store, "007") == "007/007/processed/007.xml"
    assert find_events_file(store, "Müller 3") == "Müller 3/processed/other.xml"
    assert find_events_file(store, "12") == "12/12.xml"


def test_find_events_file_missing_folder_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(CartridgeError, match=r"008 holds no CellSearch event xml.*--cellsearch"):
        find_events_file(Store(str(tmp_path)), "008")


def test_read_events_phantom_archive_boxes_of_ctcs_hold_a_true_ctc(tmp_path: Path) -> None:
    write_phantom(PhantomConfig(patients=1, fields=2, seed=3), tmp_path, progress=Progress(quiet=True), workers=1)
    store = Store(str(tmp_path))
    path = find_events_file(store, "P01")
    events = read_events(store.read_bytes(path), path)
    truth = pl.DataFrame(pl.from_arrow(store.read_table("truth.parquet")))
    ctcs = truth.filter(pl.col("kind").is_in(sorted(map(str, CTC_KINDS))))
    assert set(events["field"]) == {1, 2}
    assert events["is_ctc"].sum() > 3
    for event in events.filter("is_ctc").iter_rows(named=True):
        inside = ctcs.filter(
            (pl.col("field") == event["field"])
            & pl.col("row").is_between(event["row_low"] - 1, event["row_high"] + 1)
            & pl.col("col").is_between(event["col_low"] - 1, event["col_high"] + 1)
        )
        assert inside.height >= 1


def test_read_gallery_malformed_records_are_rows_and_the_rest_stays(faked: ModuleType, tmp_path: Path) -> None:
    good = "".join(faked.event_xml(n, 1, 100 * n, 50, 10, is_ctc=n == 2) for n in (1, 2, 3))
    bad = faked.event_xml(4, 1, 100, 50, 10, is_ctc=True)
    records = (
        good
        + bad.replace("<framenum>1", "<framenum>one")
        + bad.replace("<rid>4", "<rid>5").replace("<framenum>1", "<framenum>9")
        + bad.replace("<rid>4</rid>", "")
        + bad.replace("<rid>4", "<rid>6").replace("(60,110)", "(9060,9110)")
    )
    (tmp_path / "A.xml").write_text(faked.archive_xml(records))
    gallery = read_gallery(Store(str(tmp_path)), "A.xml")
    assert gallery.events["event_id"].to_list() == ["1", "2", "3"]
    assert [row.source.rsplit(" event ", 1)[-1] for row in gallery.set_aside] == ["4", "5", "record 6", "6"]
    assert all(str(tmp_path) in row.source and row.kind == "CartridgeError" for row in gallery.set_aside)
    reasons = " ".join(row.message for row in gallery.set_aside)
    for word in ("framenum is 'one'", "frame 9 is not on the grid", "neither rid nor eventnum", "outside of frame 1"):
        assert word in reasons


def test_read_gallery_of_celltracks_xp_tables(tmp_path: Path) -> None:
    folder = tmp_path / "XP" / "mic07"
    folder.mkdir(parents=True)
    (folder / "pic.dlm").write_bytes('"t1"¦a¦b¦1¦c\n"t2"¦a¦b¦140¦c\n'.encode("latin-1"))
    rows = ["i¦t2¦700¦500¦20¦10¦a¦b¦c¦d¦Y¦e¦f", "i¦t9¦700¦500¦20¦10¦a¦b¦c¦d¦Y¦e¦f", "i¦t1¦70¦50¦20¦10¦a¦b¦c¦d¦N¦e¦f"]
    (folder / "cells.dlm").write_bytes("\n".join(rows).encode("latin-1"))
    store = Store(str(tmp_path))
    path = find_events_file(store, "XP")
    gallery = read_gallery(store, path)
    assert gallery.events.rows() == [
        ("1", 140, 495.0, 690.0, 506.0, 711.0, True),
        ("3", 1, 45.0, 60.0, 56.0, 81.0, False),
    ]
    assert [row.source.rsplit(" event ", 1)[-1] for row in gallery.set_aside] == ["2"]
    before = digest_events(store, path)
    (folder / "pic.dlm").write_bytes('"t1"¦a¦b¦1¦c\n"t2"¦a¦b¦139¦c\n'.encode("latin-1"))
    assert digest_events(store, path) != before
