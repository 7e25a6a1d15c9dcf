"""What counts as a field image, and the reason given for what does not."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import tifffile
from skimage.io import imsave

from ctc_ray.errors import CartridgeError, ConfigError
from ctc_ray.schema import Channel
from ctc_ray.segment.cartridge import FieldFile, Layout
from ctc_ray.segment.field_image import check_channel_map, pixel_type, read_field
from ctc_ray.storage import Store

CELLSEARCH = {Channel.DAPI: 0, Channel.CK: 2, Channel.CD45: 3}
SHAPE = (60, 80)


def pages(dtype: str = "uint8", count: int = 4, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 200, (count, *shape)).astype(dtype)


def tiff(array: np.ndarray, **options: object) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, array, photometric="minisblack", **options)
    return stream.getvalue()


def read(
    tmp_path: Path, data: bytes, *, name: str = "A/p1.tif", layout: Layout = "cellsearch", **options: object
) -> np.ndarray:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(data)
    channel_map = options.get("channel_map", CELLSEARCH)
    file = FieldFile("A", 1, name, layout, SHAPE if layout == "cellsearch" else None, (0, 0))
    return read_field(Store(str(tmp_path)), file, channel_map)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("count", [4, 6])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_cellsearch_field_gives_dna_ck_and_cd45(
    tmp_path: Path, dtype: str, count: int, compression: str | None
) -> None:
    array = pages(dtype, count)
    found = read(tmp_path, tiff(array, compression=compression))
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, array[[0, 2, 3]])


def test_single_page_image_serves_as_every_channel(tmp_path: Path) -> None:
    image = pages()[0]
    channel_map = {Channel.DAPI: 0, Channel.CK: 0, Channel.CD45: None}
    found = read(tmp_path, tiff(image), layout="folder", channel_map=channel_map)
    np.testing.assert_array_equal(found, np.stack([image, image, np.zeros_like(image)]))


@pytest.mark.parametrize("name", ["A/x.png", "A/x.tif"])
def test_colour_image_is_split_by_the_channel_map(tmp_path: Path, name: str) -> None:
    image = np.moveaxis(pages(count=3), 0, -1)
    stream = io.BytesIO()
    if name.endswith("png"):
        imsave(tmp_path / "x.png", image, check_contrast=False)
        data = (tmp_path / "x.png").read_bytes()
    else:
        tifffile.imwrite(stream, image, photometric="rgb")
        data = stream.getvalue()
    found = read(
        tmp_path, data, name=name, layout="folder", channel_map={Channel.DAPI: 2, Channel.CK: 1, Channel.CD45: 0}
    )
    np.testing.assert_array_equal(found, np.moveaxis(image, -1, 0)[[2, 1, 0]])


def bad_files() -> list[tuple[str, bytes, str]]:
    good = tiff(pages())
    flat = pages()
    flat[2] = 7
    white = np.full_like(pages("uint16"), 65_535)
    return [
        ("empty", b"", "0 bytes"),
        ("text", b"this is no image at all", "not a TIFF"),
        ("header", good[:4], "decoded|pages"),
        ("half", good[: len(good) // 2], "truncated|pages|decoded"),
        ("tail", good[:-200], "truncated|pages|decoded"),
        ("three pages", tiff(pages(count=3)), "3 pages"),
        ("size", tiff(pages(shape=(60, 81))), "60 x 81"),
        ("float", tiff(pages("float32")), "float32"),
        ("nan", tiff(np.full((4, *SHAPE), np.nan, np.float32)), "float32"),
        ("int32", tiff(pages("int32")), "int32"),
        ("constant", tiff(flat), "CK"),
        ("saturated", tiff(white), "65535"),
    ]


@pytest.mark.parametrize(("data", "reason"), [pytest.param(d, r, id=n) for n, d, r in bad_files()])
def test_bad_file_is_refused_with_file_and_reason(tmp_path: Path, data: bytes, reason: str) -> None:
    with pytest.raises(CartridgeError, match=reason) as refused:
        read(tmp_path, data)
    assert "A/p1.tif" in str(refused.value)


@pytest.mark.parametrize("cut", range(50, 20_000, 1733))
def test_truncated_field_never_passes_as_whole(tmp_path: Path, cut: int) -> None:
    data = tiff(pages(), compression="zlib")
    with pytest.raises(CartridgeError):
        read(tmp_path, data[: min(cut, len(data) - 1)])


def test_missing_channel_names_the_map(tmp_path: Path) -> None:
    with pytest.raises(CartridgeError, match="channel_map"):
        read(tmp_path, tiff(pages()[0]), layout="folder")


def test_small_image_is_refused_because_crops_do_not_fit(tmp_path: Path) -> None:
    channel_map = {Channel.DAPI: 0, Channel.CK: 0, Channel.CD45: None}
    with pytest.raises(CartridgeError, match="48"):
        read(tmp_path, tiff(pages(shape=(40, 90))[0]), layout="folder", channel_map=channel_map)


@pytest.mark.parametrize(
    "channel_map",
    [
        {"DAPI": 0, "CK": 2},
        {"DAPI": 0, "CK": None, "CD45": 3},
        {"DAPI": 0, "CK": -1, "CD45": 3},
        {"DAPI": 0, "CK": 2, "CD45": 3, "FITC": 1},
    ],
)
def test_channel_map_that_cannot_be_used_is_refused(channel_map: dict[str, int | None]) -> None:
    with pytest.raises(ConfigError, match="channel_map"):
        check_channel_map(channel_map)


def test_pixel_type_is_that_of_the_first_readable_field(tmp_path: Path) -> None:
    (tmp_path / "p1.tif").write_bytes(b"broken")
    (tmp_path / "p2.tif").write_bytes(tiff(pages("uint16")))
    fields = [FieldFile("A", n, f"p{n}.tif", "cellsearch", SHAPE, (0, 0)) for n in (1, 2)]
    assert pixel_type(Store(str(tmp_path)), fields) == "uint16"
    assert pixel_type(Store(str(tmp_path)), fields[:1]) == "uint8"
