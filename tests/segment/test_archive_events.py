"""Records of an archive's xml: what is an event, and the reason given for what is none."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctc_ray.errors import CartridgeError
from ctc_ray.segment.archive_xml import EVENT_SLACK_PX, Archive, ArchiveEvent, Geometry, read_archive

RUN = "<runs><record><numrows>2</numrows><numcols>3</numcols><camxsize>100</camxsize><camysize>80</camysize></record></runs>"
GRID = Geometry(2, 3, 80, 100)


def archive(records: str, run: str = RUN, root: str = "archive") -> Archive:
    return read_archive(f"<{root}>{run}<events>{records}</events></{root}>".encode(), "a.xml")


def record(**texts: object) -> str:
    values = {"rid": 5, "framenum": 1, "location": "(40, 30),(20, 10)", "assigned": "true"} | texts
    return "<record>" + "".join(f"<{k}>{v}</{k}>" for k, v in values.items() if v is not None) + "</record>"


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        ({"framenum": None}, "framenum is None"),
        ({"framenum": "x"}, "framenum is 'x'"),
        ({"framenum": "0"}, "framenum is '0'"),
        ({"framenum": "-3"}, "framenum is '-3'"),
        ({"framenum": "²"}, "framenum is '²'"),
        ({"framenum": "1.5"}, "framenum is '1.5'"),
        ({"location": None}, "location is None"),
        ({"location": "(40, 30)"}, "expected"),
        ({"location": "40 30 20 10"}, "expected"),
        ({"location": "(40, 30),(20, ten)"}, "expected"),
        ({"location": "(40, 30),(20, 10),(1, 1)"}, "expected"),
        ({"location": "(nan, 30),(20, 10)"}, "expected"),
        ({"assigned": "perhaps"}, "assigned is 'perhaps'"),
        ({"assigned": None, "numselected": "many"}, "numselected is 'many'"),
        ({"framenum": "7"}, "frame 7 is not on the grid of 2 x 3"),
        ({"location": "(440, 30),(420, 10)"}, "outside of frame 1"),
        ({"location": "(40, -100),(20, -120)"}, "outside of frame 1"),
    ],
)
def test_malformed_record_is_rejected_with_its_number_and_the_rest_is_kept(
    texts: dict[str, object], reason: str
) -> None:
    read = archive(record(rid=1) + record(**texts) + record(rid=9))
    assert [event.event_id for event in read.events] == ["1", "9"]
    (rejected,) = read.rejected
    assert rejected.event_id == "5"
    assert reason in rejected.reason


def test_record_without_a_number_is_named_by_its_place() -> None:
    read = archive(record() + record(rid=None))
    assert [(event.event_id, "rid" in event.reason) for event in read.rejected] == [("record 2", True)]


def test_box_may_reach_a_little_out_of_its_frame() -> None:
    near = archive(record(location=f"({99 + EVENT_SLACK_PX}, 30),(80, 10)"))
    far = archive(record(location=f"({101 + EVENT_SLACK_PX}, 30),(80, 10)"))
    assert (len(near.events), len(near.rejected)) == (1, 0)
    assert (len(far.events), far.rejected[0].outside) == (0, True)


@pytest.mark.parametrize("root", ["archive", "export"])
def test_both_roots_and_both_names_of_the_number_are_read(root: str) -> None:
    (event,) = archive(record(rid=None, eventnum=12), root=root).events
    assert event.event_id == "12"


@pytest.mark.parametrize(
    ("texts", "is_ctc"),
    [
        ({"assigned": "true"}, True),
        ({"assigned": "FALSE", "numselected": 2}, False),
        ({"assigned": None, "numselected": 0}, False),
        ({"assigned": None, "numselected": 1}, True),
        ({"assigned": None, "numselected": 3}, True),
        ({"assigned": None, "numselected": 4}, False),
        ({"assigned": None}, None),
    ],
)
def test_decision_is_assigned_in_newer_and_numselected_in_older_archives(
    texts: dict[str, object], is_ctc: bool | None
) -> None:
    (event,) = archive(record(**texts)).events
    assert event.is_ctc is is_ctc


@given(
    frame=st.integers(1, 6),
    top=st.integers(0, 60),
    left=st.integers(0, 80),
    height=st.integers(0, 15),
    width=st.integers(0, 15),
)
@settings(max_examples=40, deadline=None)
def test_location_written_far_corner_first_in_cartridge_pixels_comes_back_in_field_pixels(
    frame: int, top: int, left: int, height: int, width: int
) -> None:
    row, column = GRID.origin(frame)
    far, near = f"({column + left + width}, {row + top + height})", f"({column + left}, {row + top})"
    (event,) = archive(record(framenum=frame, location=f"{far},{near}")).events
    assert event == ArchiveEvent("5", frame, top, left, top + height, left + width, is_ctc=True)


HOSTILE = {
    "entity bomb": '<!DOCTYPE a [<!ENTITY b "xx"><!ENTITY c "&b;&b;">]><archive>&c;</archive>',
    "external entity": '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><archive>&b;</archive>',
    "parameter entity": '<!DOCTYPE a [<!ENTITY % p SYSTEM "http://localhost/x"> %p;]><archive/>',
    "external document type": '<!DOCTYPE archive SYSTEM "http://localhost/a.dtd"><archive/>',
    "public document type": '<!DOCTYPE archive PUBLIC "-//A//B" "http://localhost/a.dtd"><archive/>',
    "deep nesting": "<archive>" + "<a>" * 200_000 + "</a>" * 200_000 + "</archive>",
    "unknown encoding": '<?xml version="1.0" encoding="utf-99"?><archive/>',
    "null bytes": "<archive>\0</archive>",
}


@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in HOSTILE.items()])
def test_hostile_xml_is_refused(text: str) -> None:
    with pytest.raises(CartridgeError, match=r"refused|well-formed") as refused:
        read_archive(text.encode(), "a.xml")
    assert "a.xml" in str(refused.value)


def test_document_type_without_entities_is_harmless() -> None:
    read = read_archive(b"<!DOCTYPE archive [<!ELEMENT archive ANY>]><archive/>", "a.xml")
    assert read.events == ()
