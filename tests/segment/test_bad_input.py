"""A folder with everything that can be wrong: each thing a row with its reason, the rest segmented."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import tifffile

from ctc_ray.cohort import Cohort
from ctc_ray.config import SegmentConfig, load_config
from ctc_ray.errors import TooManyFailuresError
from ctc_ray.progress import Progress
from ctc_ray.records import FailureRow, read_failures
from ctc_ray.segment.cartridge import find_cartridge
from ctc_ray.segment.field_image import pixel_type
from ctc_ray.segment.plan import plan_patients, resolve_settings
from ctc_ray.segment.read_step import TASK_SCHEMA, FieldTask, read_fields
from ctc_ray.segment.stage import run_segment
from ctc_ray.storage import Store

PATIENT = "Müller 3 (späte Probe)"
SHAPE = (144, 176)
GOOD_FRAMES = (1, 2)


def tiff(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, image, photometric="minisblack")
    return stream.getvalue()


def pages(seed: int, count: int = 4, shape: tuple[int, int] = SHAPE, dtype: str = "uint8") -> np.ndarray:
    image = np.random.default_rng(seed).poisson(6.0, (count, *shape))
    image[:, 60:70, 80:90] = 200
    return image.astype(dtype)


def absurd_header() -> bytes:
    """175 bytes that declare 3,000,000 x 3,000,000 pixels on each of four pages."""
    tags = [(256, 3_000_000), (257, 3_000_000), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 1)]
    out = b"II*\0" + struct.pack("<I", 8)
    for page in range(4):
        body = b"".join(struct.pack("<HHII", code, 4, 1, value) for code, value in tags)
        following = 0 if page == 3 else len(out) + 2 + len(body) + 4
        out += struct.pack("<H", len(tags)) + body + struct.pack("<I", following)
    return out


def bad_fields() -> list[tuple[str, bytes, str]]:
    """Name, content and a word of the reason for each file that is no field."""
    good = tiff(pages(0))
    constant = pages(0)
    constant[2] = 9
    return [
        ("a p010.tif", good[: len(good) // 3], "truncated|pages|decoded"),
        ("a p011.tif", b"", "0 bytes"),
        ("a p012.tif", tiff(pages(0, shape=(144, 177))), "144 x 177"),
        ("a p013.tif", tiff(pages(0, count=3)), "3 pages"),
        ("a p014.tif", tiff(pages(0, count=8)), "more than 6 pages"),
        ("a p015.tif", tiff(np.full((4, *SHAPE), np.nan, dtype=np.float32)), "float32"),
        ("a p016.tif", tiff(constant), "CK page is 9"),
        ("a p017.tif", b"GIF89a" + bytes(500), "not a TIFF"),
        ("a p018.tif", tiff(np.full((4, *SHAPE), 65_535, dtype=np.uint16)), "65535"),
        ("a p019.tif", absurd_header(), "3000000 x 3000000"),
        ("a p020.tif", tiff(pages(0, dtype="uint16")), "other fields uint8"),
        ("b p001.tif", good, "frame number 1 is taken"),
        ("overview.tif", good, "does not end in p<frame number>"),
        ("a p999.tif", good, "not on the grid"),
        ("a p021.png", b"x", "is a TIFF"),
    ]


BOMB = '<!DOCTYPE a [<!ENTITY b "xxxxxxxxxx"><!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;">]><archive>&c;</archive>'


def grid_xml() -> str:
    return (
        "<archive><runs><record><numrows>5</numrows><numcols>5</numcols>"
        f"<camxsize>{SHAPE[1]}</camxsize><camysize>{SHAPE[0]}</camysize></record></runs></archive>"
    )


@dataclass
class BadFolder:
    """Folder of cartridges with one patient, and a word of the reason for each source that must be set aside."""

    root: Path
    expected: dict[str, str]


@pytest.fixture
def bad_folder(tmp_path: Path) -> BadFolder:
    folder = tmp_path / "Proben für März" / PATIENT / "processed"
    folder.mkdir(parents=True)
    for frame in GOOD_FRAMES:
        (folder / f"a p{frame:03d}.tif").write_bytes(tiff(pages(frame)))
    expected = {}
    for name, data, reason in bad_fields():
        (folder / name).write_bytes(data)
        expected[name] = reason
    (folder / "a p022.tif").mkdir()
    expected["a p022.tif"] = "is a folder"
    (folder / f"{PATIENT}.xml").write_text(BOMB, encoding="utf-8")
    expected[f"{PATIENT}.xml"] = "refused"
    (folder / "grid.xml").write_text(grid_xml(), encoding="utf-8")
    if os.geteuid() != 0:  # root reads everything
        (folder / "a p023.tif").write_bytes(tiff(pages(0)))
        (folder / "a p023.tif").chmod(0)
        expected["a p023.tif"] = "cannot read"
    return BadFolder(
        tmp_path / "Proben für März", {f"{PATIENT}/processed/{name}": why for name, why in expected.items()}
    )


def read_all(root: Path, settings_of: SegmentConfig, weights: Path) -> tuple[pa.Table, Sequence[FailureRow]]:
    """Find and read one patient's fields as the stage does."""
    store = Store(str(root))
    settings = resolve_settings(settings_of.model_copy(update={"weights": str(weights)}), "fp32")
    cartridge = find_cartridge(store, PATIENT)
    dtype = pixel_type(store, cartridge.fields)
    tasks = [
        FieldTask(field, "parts", dtype, settings.channel_map, settings.fingerprint).to_json()
        for field in cartridge.fields
    ]
    table = pa.table({"task": tasks}, schema=TASK_SCHEMA)
    return read_fields(table, cartridges=store, settings=settings), cartridge.set_aside


def test_reading_step_gives_every_bad_file_its_reason_and_reads_the_good_ones(
    bad_folder: BadFolder, bright_spot_weights: Path
) -> None:
    read, set_aside = read_all(bad_folder.root, SegmentConfig(), bright_spot_weights)
    reasons = {row.source: row.message for row in set_aside}
    for row in read.to_pylist():
        field = FieldTask.from_json(row["task"]).field
        if row["image"] is None:
            assert row["kind"] in ("CartridgeError", "StorageError")
            reasons[field.path] = row["message"]
        else:
            assert field.field in GOOD_FRAMES
            expected = pages(field.field)[[0, 2, 3]].tobytes()
            assert row["image"] == expected
    assert set(reasons) == set(bad_folder.expected)
    for source, word in bad_folder.expected.items():
        assert pl.Series([reasons[source]]).str.contains(word).all(), (source, reasons[source])


@pytest.mark.parametrize(
    "xml",
    [
        pytest.param(None, id="missing"),
        pytest.param("", id="empty"),
        pytest.param("<archive><runs>", id="broken"),
        pytest.param("no xml", id="text"),
        pytest.param(BOMB, id="entity bomb"),
        pytest.param('<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><archive>&b;</archive>', id="external"),
        pytest.param('<!DOCTYPE archive SYSTEM "http://localhost/a.dtd"><archive/>', id="external document type"),
        pytest.param("<archive>" + "<a>" * 50_000 + "</a>" * 50_000 + "</archive>", id="deep nesting"),
    ],
)
def test_bad_xml_is_one_row_and_the_fields_are_planned(
    tmp_path: Path, bright_spot_weights: Path, xml: str | None
) -> None:
    folder = tmp_path / "cartridges" / PATIENT / "processed"
    folder.mkdir(parents=True)
    (folder / "a p001.tif").write_bytes(tiff(pages(1, shape=(1036, 1384))))
    if xml is not None:
        (folder / "a.xml").write_text(xml, encoding="utf-8")
    cohort = Cohort.open(str(tmp_path / "cohort"), create=True)
    config = SegmentConfig(weights=str(bright_spot_weights))
    settings = resolve_settings(config, "fp32")
    (plan,), empty = plan_patients(
        config, settings, cohort, Store(str(tmp_path / "cartridges")), patients=None, retry_failed=False
    )
    assert empty == {}
    assert [field.field for field in plan.todo] == [1]
    source = f"{PATIENT}/processed" if xml is None else f"{PATIENT}/processed/a.xml"
    assert [row.source for row in plan.cartridge.set_aside] == [source]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_stage_sets_everything_bad_aside_goes_on_and_ends_with_an_error(
    bad_folder: BadFolder, bright_spot_weights: Path, tmp_path: Path, write_cartridge: Callable[..., Path]
) -> None:
    write_cartridge("12", root=bad_folder.root.name)
    (bad_folder.root / "leer").mkdir()
    options = [f"segment.weights={bright_spot_weights}", "segment.max_failure_fraction=0.95"]
    cohort = Cohort.open(str(tmp_path / "Kohorte März"), create=True)
    lenient = load_config(None, options)
    result = run_segment(lenient, cohort, cartridges=str(bad_folder.root), progress=Progress(quiet=True))
    num_bad = len(bad_folder.expected) + 1  # and the empty patient
    assert (result.units_computed, result.set_aside) == (4, num_bad)
    failures = read_failures(cohort.store, "segment", PATIENT)
    reasons = dict(failures.select("source", "message").iter_rows())
    assert set(reasons) == set(bad_folder.expected)
    for source, word in bad_folder.expected.items():
        assert pl.Series([reasons[source]]).str.contains(word).all(), (source, reasons[source])
    assert read_failures(cohort.store, "segment", "leer").height == 1
    table = cohort.read_columns(cohort.cells(PATIENT), ["field", "global_row", "global_col", "row", "col"])
    assert set(table["field"].to_pylist()) == set(GOOD_FRAMES)

    num_fields = num_bad - 1 + 4  # the xml is no field
    strict = load_config(None, [options[0], "segment.max_failure_fraction=0.1"])
    with pytest.raises(TooManyFailuresError, match=f"{num_bad - 1} of {num_fields} fields"):
        run_segment(strict, cohort, cartridges=str(bad_folder.root), progress=Progress(quiet=True))
    assert cohort.patient_ids() == ["12", PATIENT]
