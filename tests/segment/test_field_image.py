"""What counts as a field image, and the reason given for what does not."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
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


def tiff_of(*images: np.ndarray) -> bytes:
    """A file of unlike pages."""
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream) as writer:
        for image in images:
            writer.write(image, photometric="rgb" if image.ndim == 3 else "minisblack", metadata=None, contiguous=False)
    return stream.getvalue()


def declared(data: bytes, height: int, width: int) -> bytes:
    """The same file with other sizes in the header of every page."""
    changed = bytearray(data)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        for page in file.pages:
            for name, value in (("ImageWidth", width), ("ImageLength", height)):
                # Type 4 is a 32-bit count; the value lies in the last four bytes of the entry.
                struct.pack_into("<HII", changed, page.aspage().tags[name].offset + 2, 4, 1, value)
    return bytes(changed)


def by_pillow(array: np.ndarray, compression: str | None) -> bytes:
    """The pages as another program compresses them."""
    stream = io.BytesIO()
    first, *others = [Image.fromarray(page) for page in array]
    first.save(stream, "TIFF", compression=compression, save_all=True, append_images=others)
    return stream.getvalue()


def deflate_bomb() -> bytes:
    """Four deflated pages of which the third unfolds to 64 MB."""
    data = bytearray(tiff(pages(), compression="zlib"))
    bomb = zlib.compress(bytes(2**26), 9)
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as file:
        tags = file.pages[2].aspage().tags
        struct.pack_into("<HII", data, tags["StripOffsets"].offset + 2, 4, 1, len(data))
        struct.pack_into("<HII", data, tags["StripByteCounts"].offset + 2, 4, 1, len(bomb))
    return bytes(data) + bomb


def looped(data: bytes) -> bytes:
    """The third page's link to its next one leads back to the first."""
    changed = bytearray(data)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        first, third = file.pages[0].offset, file.pages[2].offset
    (entries,) = struct.unpack_from("<H", changed, third)
    struct.pack_into("<I", changed, third + 2 + 12 * entries, first)
    return bytes(changed)


def tiff_12_bit(images: np.ndarray, strips: int = 1) -> bytes:
    """12-bit pages (P, H, W), packed bit by bit: high bits first, rows from a byte of their own."""
    _, height, width = images.shape
    out, link = bytearray(b"II*\0" + bytes(4)), 4
    for image in images:
        starts, sizes = [], []
        for rows in np.array_split(image, strips):
            bits = [format(value, "012b") for value in rows.ravel()]
            lines = ["".join(bits[row * width : (row + 1) * width]) for row in range(len(rows))]
            packed = b"".join(
                int(line, 2).to_bytes(len(line) // 8, "big")
                for line in (line + "0" * (-len(line) % 8) for line in lines)
            )
            starts.append(len(out))
            sizes.append(len(packed))
            out += packed
        arrays = len(out)
        out += struct.pack(f"<{2 * strips}I", *starts, *sizes)
        where = (starts[0], sizes[0]) if strips == 1 else (arrays, arrays + 4 * strips)
        tags = [(256, width), (257, height), (258, 12), (259, 1), (262, 1), (273, where[0]), (277, 1)]
        tags += [(278, -(-height // strips)), (279, where[1])]
        struct.pack_into("<I", out, link, len(out))
        out += struct.pack("<H", len(tags))
        for code, value in tags:
            out += struct.pack("<HHII", code, 4, strips if code in (273, 279) else 1, value)
        link = len(out)
        out += bytes(4)
    return bytes(out)


def read(
    tmp_path: Path, data: bytes, *, name: str = "A/p1.tif", layout: Layout = "cellsearch", **options: object
) -> np.ndarray:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(data)
    channel_map = options.get("channel_map", CELLSEARCH)
    file = FieldFile("A", 1, name, layout, SHAPE if layout == "cellsearch" else None, (0, 0))
    return read_field(Store(str(tmp_path)), file, channel_map)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("count", [4, 5, 6])
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
        ("seven pages", tiff(pages(count=7)), "more than 6 pages"),
        ("nan pages", tiff(np.where(pages() < 90, np.nan, 1.0).astype(np.float32)), "float32"),
        ("mixed", tiff_of(*pages()[:2], pages("uint16")[2], pages()[3]), "uint16 and uint8"),
        ("mixed sizes", tiff_of(*pages()[:3], pages(shape=(60, 81))[0]), "60 x 81"),
        ("colour pages", tiff_of(*[np.moveaxis(pages(count=3), 0, -1)] * 4), r"\(H, W\)"),
        ("huge", declared(good, 30_000, 30_000), "30000 x 30000"),
        ("beyond any memory", declared(good, 2**31, 2**31), "decoded|2147483648"),
        ("no size", declared(good, 0, 80), "0 x 80|decoded"),
        ("deflate bomb", deflate_bomb(), "holds more than"),
        ("loop of pages", looped(good), "more than 6 pages"),
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


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", None])
@pytest.mark.parametrize("cut", range(50, 20_000, 1733))
def test_truncated_field_never_passes_as_whole(tmp_path: Path, cut: int, compression: str | None) -> None:
    data = by_pillow(pages(), compression)
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


@pytest.mark.parametrize("width", [80, 81])
@pytest.mark.parametrize("strips", [1, 4])
def test_packed_12_bit_pages_are_read_as_counts(tmp_path: Path, width: int, strips: int) -> None:
    array = np.random.default_rng(1).integers(0, 4096, (4, 60, width)).astype(np.uint16)
    (tmp_path / "p1.tif").write_bytes(tiff_12_bit(array, strips))
    file = FieldFile("A", 1, "p1.tif", "cellsearch", (60, width), (0, 0))
    found = read_field(Store(str(tmp_path)), file, CELLSEARCH)
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, array[[0, 2, 3]])
    (tmp_path / "p1.tif").write_bytes(tiff_12_bit(array, strips)[:-800])
    with pytest.raises(CartridgeError):
        read_field(Store(str(tmp_path)), file, CELLSEARCH)


def test_12_bit_counts_in_16_bit_pages_are_kept_as_they_are(tmp_path: Path) -> None:
    array = np.random.default_rng(1).integers(0, 4096, (4, *SHAPE)).astype(np.uint16)
    np.testing.assert_array_equal(read(tmp_path, tiff(array)), array[[0, 2, 3]])


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_compressed_pages_are_read_as_the_plain_ones(tmp_path: Path, dtype: str, compression: str) -> None:
    array = pages(dtype)
    np.testing.assert_array_equal(read(tmp_path, by_pillow(array, compression)), array[[0, 2, 3]])


def test_extra_pages_may_be_of_another_kind(tmp_path: Path) -> None:
    array = pages()
    found = read(tmp_path, tiff_of(array[0], pages("uint16", shape=(20, 20))[0], array[2], array[3]))
    np.testing.assert_array_equal(found, array[[0, 2, 3]])


def test_field_of_a_big_tiff_is_read(tmp_path: Path) -> None:
    array = pages()
    np.testing.assert_array_equal(read(tmp_path, tiff(array, bigtiff=True)), array[[0, 2, 3]])
    np.testing.assert_array_equal(read(tmp_path, tiff(array, byteorder=">")), array[[0, 2, 3]])


def test_png_that_declares_absurd_sizes_is_refused_unread(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.fromarray(pages()[0]).save(stream, "PNG")
    data = bytearray(stream.getvalue())
    struct.pack_into(">II", data, 16, 200_000, 200_000)
    struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))
    channel_map = {Channel.DAPI: 0, Channel.CK: 0, Channel.CD45: None}
    with pytest.raises(CartridgeError, match=r"x\.png"):
        read(tmp_path, bytes(data), name="A/x.png", layout="folder", channel_map=channel_map)


def test_one_odd_field_does_not_decide_the_pixel_type(tmp_path: Path) -> None:
    for number in range(1, 31):
        (tmp_path / f"p{number}.tif").write_bytes(tiff(pages("uint16" if number == 1 else "uint8")))
    fields = [FieldFile("A", n, f"p{n}.tif", "cellsearch", SHAPE, (0, 0)) for n in range(1, 31)]
    assert pixel_type(Store(str(tmp_path)), fields) == "uint8"


@given(data=st.binary(min_size=0, max_size=400), at=st.integers(0, 600))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_header_is_refused_or_gives_the_right_shape(tmp_path: Path, data: bytes, at: int) -> None:
    damaged = bytearray(tiff(pages()))
    damaged[at : at + len(data)] = data
    try:
        found = read(tmp_path, bytes(damaged))
    except CartridgeError:
        return
    assert found.shape == (3, *SHAPE)
