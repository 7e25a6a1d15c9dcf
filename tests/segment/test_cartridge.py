"""Which files of a patient folder are fields, and where they lie on the cartridge."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ctc_ray.errors import CartridgeError, ConfigError, MissingInputError
from ctc_ray.schema import Channel
from ctc_ray.segment.archive_files import known_grid
from ctc_ray.segment.archive_xml import MAX_XML_BYTES, Geometry, read_archive
from ctc_ray.segment.cartridge import MAX_FIELD_BYTES, find_cartridge, find_patients
from ctc_ray.storage import Store


def touch(root: Path, *names: str) -> Store:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return Store(str(root))


@pytest.mark.parametrize("folder", ["007", "007/processed", "007/007/processed", "007/mic1234", "007/a/b"])
def test_fields_are_found_at_every_known_depth(tmp_path: Path, folder: str) -> None:
    store = touch(tmp_path, f"{folder}/cartid_p2.tif", f"{folder}/cartid_p11.tif", f"{folder}/.hidden_p3.tif")
    cartridge = find_cartridge(store, "007")
    assert cartridge.layout == "cellsearch"
    assert [field.field for field in cartridge.fields] == [2, 11]
    assert cartridge.folder == folder
    assert set(cartridge.files) == {f"{folder}/cartid_p2.tif", f"{folder}/cartid_p11.tif"}


def test_frame_number_is_the_text_after_the_last_p(tmp_path: Path) -> None:
    store = touch(tmp_path, "A/processed/p12patient-p1p175.tif")
    assert [field.field for field in find_cartridge(store, "A").fields] == [175]


def test_duplicate_frame_numbers_are_set_aside_with_the_reason(tmp_path: Path) -> None:
    store = touch(tmp_path, "A/a_p001.tif", "A/b_p1.tif", "A/c_p002.tif", "A/A.xml")
    (tmp_path / "A" / "A.xml").write_text("<archive/>")
    cartridge = find_cartridge(store, "A")
    assert [field.path for field in cartridge.fields] == ["A/a_p001.tif", "A/c_p002.tif"]
    assert [row.source for row in cartridge.set_aside] == ["A/b_p1.tif"]
    assert "a_p001.tif" in cartridge.set_aside[0].message


def test_name_without_a_frame_number_is_set_aside(tmp_path: Path) -> None:
    store = touch(tmp_path, "A/a_p1.tif", "A/overview.tif", "A/A.xml")
    (tmp_path / "A" / "A.xml").write_text("<archive/>")
    cartridge = find_cartridge(store, "A")
    assert [row.source for row in cartridge.set_aside] == ["A/overview.tif"]


def test_folder_of_ordinary_images_is_numbered_by_name(tmp_path: Path) -> None:
    cartridge = find_cartridge(touch(tmp_path, "nuclei/b.png", "nuclei/a.tif"), "nuclei")
    assert cartridge.layout == "folder"
    assert [(field.field, field.path) for field in cartridge.fields] == [(1, "nuclei/a.tif"), (2, "nuclei/b.png")]
    assert cartridge.geometry is None


def test_empty_patient_folder_names_the_folder(tmp_path: Path) -> None:
    (tmp_path / "Müller 3" / "processed").mkdir(parents=True)
    with pytest.raises(CartridgeError, match="Müller 3"):
        find_cartridge(Store(str(tmp_path)), "Müller 3")


def test_folder_of_cartridges_missing_or_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="nowhere"):
        find_patients(Store(str(tmp_path / "nowhere")))
    with pytest.raises(CartridgeError, match="one folder a patient"):
        find_patients(Store(str(tmp_path)))


def test_patients_keep_their_names_as_they_are(tmp_path: Path) -> None:
    store = touch(tmp_path, "007/a_p1.tif", "12/a_p1.tif", "Müller 3/a_p1.tif", ".git/x", "truth.parquet")
    assert find_patients(store) == ["007", "12", "Müller 3"]


def test_patient_folder_with_a_leading_underscore_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="_x"):
        find_patients(touch(tmp_path, "_x/a_p1.tif"))


def test_broken_xml_is_set_aside_and_the_fields_stay(tmp_path: Path) -> None:
    store = touch(tmp_path, "A/a_p1.tif", "A/A.xml")
    cartridge = find_cartridge(store, "A")
    assert len(cartridge.fields) == 1
    assert [row.source for row in cartridge.set_aside] == ["A/A.xml"]
    assert cartridge.geometry is None


def test_grid_of_175_frames_without_xml_is_the_known_one(tmp_path: Path) -> None:
    store = touch(tmp_path, *(f"A/a_p{frame}.tif" for frame in range(1, 176)))
    cartridge = find_cartridge(store, "A")
    assert cartridge.geometry == Geometry(5, 35, 1036, 1384)
    origins = {field.field: field.origin for field in cartridge.fields}
    assert origins[1] == (0, 0)
    assert origins[35] == (0, 34 * 1384)
    assert origins[36] == (1036, 34 * 1384)
    assert origins[70] == (1036, 0)


def test_frame_beyond_the_grid_is_set_aside(write_cartridge: Callable[..., Path], tmp_path: Path) -> None:
    write_cartridge("A", frames=(1, 2, 3), grid=(1, 2))
    cartridge = find_cartridge(Store(str(tmp_path / "cartridges")), "A")
    assert [field.field for field in cartridge.fields] == [1, 2]
    assert "1 x 2" in cartridge.set_aside[0].message


XML = """<?xml version="1.0"?><export>
<runs><record><numrows>2</numrows><numcols>3</numcols><camxsize>100</camxsize><camysize>80</camysize></record></runs>
<test_filters><record><filtername>DAPI</filtername></record><record><filtername>CK-PE</filtername></record></test_filters>
<events>
<record><rid>7</rid><framenum>4</framenum><location>(250, 130),(230, 110)</location><assigned>true</assigned></record>
<record><eventnum>8</eventnum><framenum>1</framenum><location>(9, 8),(3, 2)</location><numselected>2</numselected></record>
<record><rid>9</rid><framenum>1</framenum><location>(9, 8),(3, 2)</location><numselected>0</numselected></record>
<record><rid>10</rid><framenum>x</framenum><location>(9, 8),(3, 2)</location></record>
</events></export>"""


def test_events_are_read_in_field_pixels_with_the_far_corner_first() -> None:
    archive = read_archive(XML.encode(), "a.xml")
    assert archive.geometry == Geometry(2, 3, 80, 100)
    assert archive.filters == ("DAPI", "CK-PE")
    first, second, third = archive.events
    # Frame 4 is the first of the second row, which runs right to left: column 2.
    assert (first.field, first.top, first.left, first.bottom, first.right) == (4, 30, 30, 50, 50)
    assert (first.event_id, first.is_ctc) == ("7", True)
    assert (second.event_id, second.is_ctc, second.left, second.top) == ("8", True, 3, 2)
    assert third.is_ctc is False
    assert [event.event_id for event in archive.rejected] == ["10"]


BOMB = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "xx"><!ENTITY c "&b;&b;">]><archive>&c;</archive>'
OUTSIDE = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><archive>&b;</archive>'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB, "refused"),
        (OUTSIDE, "refused"),
        ("<archive>", "well-formed"),
        ("<html/>", "html"),
        ("", "well-formed"),
        (XML.replace("<numcols>3", "<numcols>three"), "four integers"),
        (XML.replace("<numrows>2", "<numrows>-2"), "grid"),
    ],
)
def test_hostile_or_broken_xml_is_refused(text: str, reason: str) -> None:
    with pytest.raises(CartridgeError, match=reason):
        read_archive(text.encode(), "a.xml")


@pytest.mark.parametrize(
    ("num_frames", "grid"),
    [(210, (6, 35)), (180, (5, 36)), (175, (5, 35)), (170, (5, 34)), (144, (4, 36)), (140, (4, 35))],
)
def test_known_grids_are_told_by_their_number_of_frames(num_frames: int, grid: tuple[int, int]) -> None:
    geometry = known_grid(range(1, num_frames + 1))
    assert geometry == Geometry(*grid, 1036, 1384)


def test_known_grid_with_a_few_frames_missing_is_still_told() -> None:
    frames = set(range(1, 176)) - {3, 90, 175}
    assert known_grid(frames) == Geometry(5, 35, 1036, 1384)
    assert known_grid(set(range(1, 176)) - set(range(20, 60))) is None
    assert known_grid([1, 2, 175]) is None
    assert known_grid(range(1, 300)) is None
    assert known_grid([]) is None


def test_missing_xml_is_listed_and_the_fields_stay(tmp_path: Path) -> None:
    cartridge = find_cartridge(touch(tmp_path, "A/processed/a_p1.tif"), "A")
    assert len(cartridge.fields) == 1
    assert [(row.source, row.kind) for row in cartridge.set_aside] == [("A/processed", "MissingInputError")]


def test_xml_named_as_the_sample_is_preferred_and_others_are_not_read(tmp_path: Path) -> None:
    store = touch(tmp_path, "A/a_p1.tif", "A/0_notes.xml", "A/A.xml")
    (tmp_path / "A" / "A.xml").write_text(XML)
    cartridge = find_cartridge(store, "A")
    assert cartridge.geometry == Geometry(2, 3, 80, 100)
    assert [row.source for row in cartridge.set_aside if row.source.endswith("xml")] == ["A/A.xml"]  # its filter names


def test_overview_beside_the_frames_folder_is_passed_by(tmp_path: Path) -> None:
    store = touch(tmp_path, "A/overview.tif", "A/A.xml", "A/processed/a_p1.tif", "A/processed/a_p2.tif")
    (tmp_path / "A" / "A.xml").write_text("<archive/>")
    cartridge = find_cartridge(store, "A")
    assert [field.path for field in cartridge.fields] == ["A/processed/a_p1.tif", "A/processed/a_p2.tif"]


def test_masks_below_the_images_are_not_taken_for_frames(tmp_path: Path) -> None:
    cartridge = find_cartridge(touch(tmp_path, "A/one.tif", "A/two.tif", "A/masks/crop1.tif", "A/masks/crop2.tif"), "A")
    assert [field.path for field in cartridge.fields] == ["A/one.tif", "A/two.tif"]


def test_folder_or_device_named_as_an_image_is_listed(tmp_path: Path) -> None:
    store = touch(tmp_path, "A/a_p1.tif", "A/A.xml", "A/a_p2.tif/inside.txt")
    (tmp_path / "A" / "A.xml").write_text("<archive/>")
    os.mkfifo(tmp_path / "A" / "a_p3.tif")
    cartridge = find_cartridge(store, "A")
    assert [field.field for field in cartridge.fields] == [1]
    assert sorted(row.source for row in cartridge.set_aside) == ["A/a_p2.tif", "A/a_p3.tif"]


def test_pages_follow_the_names_of_the_filters(tmp_path: Path) -> None:
    store = touch(tmp_path, "A/a_p1.tif", "A/A.xml")
    names = ("CD45-APC", "FITC", "DNA", "ck-pe")
    filters = "".join(f"<record><filtername>{name}</filtername></record>" for name in names)
    (tmp_path / "A" / "A.xml").write_text(f"<archive><test_filters>{filters}</test_filters></archive>")
    cartridge = find_cartridge(store, "A")
    assert cartridge.channels == {Channel.DAPI: 2, Channel.CK: 3, Channel.CD45: 0}
    assert cartridge.set_aside == ()


def test_filter_names_that_tell_nothing_are_listed_and_the_usual_pages_are_taken(tmp_path: Path) -> None:
    store = touch(tmp_path, "A/a_p1.tif", "A/A.xml")
    filters = "<record><filtername>1</filtername></record>" * 4
    (tmp_path / "A" / "A.xml").write_text(f"<archive><test_filters>{filters}</test_filters></archive>")
    cartridge = find_cartridge(store, "A")
    assert cartridge.channels is None
    assert [row.source for row in cartridge.set_aside] == ["A/A.xml"]
    assert "usual order" in cartridge.set_aside[0].message


def test_absurdly_large_files_are_set_aside_unread(tmp_path: Path) -> None:
    store = touch(tmp_path, "A/a_p1.tif", "A/a_p2.tif", "A/A.xml")
    for name, size in (("a_p2.tif", MAX_FIELD_BYTES + 1), ("A.xml", MAX_XML_BYTES + 1)):
        with (tmp_path / "A" / name).open("r+b") as file:
            file.truncate(size)  # sparse: it takes no room
    cartridge = find_cartridge(store, "A")
    assert [field.field for field in cartridge.fields] == [1]
    assert sorted(row.source for row in cartridge.set_aside) == ["A/A.xml", "A/a_p2.tif"]


def test_frame_number_of_any_length_is_read_or_set_aside(tmp_path: Path) -> None:
    store = touch(tmp_path, "A/a_p0.tif", "A/a_p40000.tif", f"A/a_p{'9' * 60}.tif", "A/a_p2.tif", "A/A.xml")
    (tmp_path / "A" / "A.xml").write_text("<archive/>")
    cartridge = find_cartridge(store, "A")
    assert [field.field for field in cartridge.fields] == [2]
    assert len(cartridge.set_aside) == 3


def test_folder_that_cannot_be_listed_is_refused_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = touch(tmp_path, "A/a_p1.tif")

    def refuse(path: str = "") -> list[str]:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(store, "list_folders", refuse)
    with pytest.raises(CartridgeError, match=r"'A'.*Permission denied"):
        find_cartridge(store, "A")
