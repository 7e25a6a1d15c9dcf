"""Stretched pages: their limits, and the counts they were before."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from ctc_ray.errors import CartridgeError
from ctc_ray.schema import Channel
from ctc_ray.segment.cartridge import FieldFile
from ctc_ray.segment.contrast import PageLimits, field_limits, unstretch
from ctc_ray.segment.field_image import pixel_type, read_field
from ctc_ray.storage import Store

SHAPE = (60, 80)
CHANNELS = {Channel.DAPI: 0, Channel.CK: 2, Channel.CD45: 3}


def counts() -> np.ndarray:
    """Four pages of 12-bit counts, each with a range of its own."""
    rng = np.random.default_rng(3)
    return np.stack([rng.integers(100 * page + 20, 900 * page + 1000, SHAPE) for page in range(4)]).astype(np.uint16)


def stretched(pages: np.ndarray, dtype: str = "uint8", offset: int = 0, tags: bool = True) -> bytes:
    """A file as CellTracks writes it: each page over the full range of its type, the limits in tags 754 to 756."""
    stream = io.BytesIO()
    top = np.iinfo(dtype).max
    with tifffile.TiffWriter(stream) as writer:
        for page in pages.astype(float):
            low, high = int(page.min()), int(page.max())
            pixels = np.rint((page - low) / (high - low) * top).astype(dtype)
            limits = [(754, "H", 1, 1), (755, "H", 1, low + offset), (756, "H", 1, high + offset)] if tags else []
            writer.write(
                pixels,
                photometric="minisblack",
                metadata=None,
                contiguous=False,
                extratags=[(*limit, False) for limit in limits],
            )
    return stream.getvalue()


def field(tmp_path: Path, data: bytes, number: int = 1) -> FieldFile:
    (tmp_path / f"p{number}.tif").write_bytes(data)
    return FieldFile("A", number, f"p{number}.tif", "cellsearch", SHAPE, (0, 0))


def reference(page: np.ndarray, low: int, high: int) -> np.ndarray:
    """The published formula, pixel by pixel."""
    restored = np.empty(page.shape, dtype=np.float64)
    highest = page.max()
    for index, value in np.ndenumerate(page):
        restored[index] = low + float(value) * ((high - low) / float(highest))
    if restored.max() > 32_767:
        restored -= 32_768
    return restored


@pytest.mark.parametrize("offset", [0, 32_768])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_unstretched_field_has_the_counts_of_before_in_every_page(tmp_path: Path, dtype: str, offset: int) -> None:
    pages = counts()
    file = field(tmp_path, stretched(pages, dtype, offset))
    found = read_field(Store(str(tmp_path)), file, CHANNELS, "unstretched")
    assert found.dtype == np.uint16
    step = np.ptp(pages[[0, 2, 3]], axis=(1, 2)) / np.iinfo(dtype).max
    for channel, page in enumerate((0, 2, 3)):
        assert np.abs(found[channel].astype(int) - pages[page].astype(int)).max() <= np.ceil(step[channel] / 2)
    with tifffile.TiffFile(tmp_path / "p1.tif") as raw:
        low, high = pages[2].min() + offset, pages[2].max() + offset
        np.testing.assert_allclose(found[1], reference(raw.pages[2].asarray(), low, high), atol=0.5)


def test_raw_field_is_the_file_whatever_the_tags(tmp_path: Path) -> None:
    file = field(tmp_path, stretched(counts()))
    with tifffile.TiffFile(tmp_path / "p1.tif") as raw:
        expected = np.stack([raw.pages[page].asarray() for page in (0, 2, 3)])
    np.testing.assert_array_equal(read_field(Store(str(tmp_path)), file, CHANNELS), expected)
    np.testing.assert_array_equal(read_field(Store(str(tmp_path)), file, CHANNELS, "raw"), expected)


def test_equal_counts_are_equal_after_unstretching_and_differ_before(tmp_path: Path) -> None:
    dim = np.tile(np.linspace(100, 800, 80), (60, 1)).astype(np.uint16)
    bright = dim.copy()
    bright[0, 0] = 4000
    store = Store(str(tmp_path))
    files = [field(tmp_path, stretched(np.stack([page] * 4), "uint16"), n) for n, page in ((1, dim), (2, bright))]
    raw = [read_field(store, file, CHANNELS)[1, 30, 40] for file in files]
    restored = [read_field(store, file, CHANNELS, "unstretched")[1, 30, 40] for file in files]
    assert abs(int(raw[0]) - int(raw[1])) > 10_000
    assert restored[0] == restored[1] == dim[30, 40]


def test_field_without_limits_cannot_be_unstretched(tmp_path: Path) -> None:
    file = field(tmp_path, stretched(counts(), tags=False))
    with pytest.raises(CartridgeError, match=r"p1.tif.*755.*raw"):
        read_field(Store(str(tmp_path)), file, CHANNELS, "unstretched")


@pytest.mark.parametrize("limits", [(10, 9), (0, 4096), (100, 33_000), (40_000, 65_535)])
def test_limits_that_give_no_12_bit_counts_are_refused(limits: tuple[int, int]) -> None:
    with pytest.raises(CartridgeError, match="contrast limits"):
        unstretch(np.array([[0, 255]], dtype=np.uint8), PageLimits(*limits))


@given(low=st.integers(0, 4095), high=st.integers(0, 4095), seed=st.integers(0, 9), offset=st.sampled_from([0, 32_768]))
@settings(max_examples=40, deadline=None)
def test_unstretched_page_keeps_the_order_of_pixels_and_lies_between_its_limits(
    low: int, high: int, seed: int, offset: int
) -> None:
    low, high = sorted((low, high))
    page = np.random.default_rng(seed).integers(0, 256, (7, 9)).astype(np.uint8)
    restored = unstretch(page, PageLimits(low + offset, high + offset))
    assert low <= restored.min()
    assert restored.max() == high
    order = np.argsort(page.ravel(), kind="stable")
    assert (np.diff(restored.ravel()[order].astype(int)) >= 0).all()


def test_limits_of_all_pages_are_listed_as_they_are_in_the_file(tmp_path: Path) -> None:
    pages = counts()
    files = [field(tmp_path, stretched(pages, offset=32_768), 1), field(tmp_path, stretched(pages, tags=False), 2)]
    (tmp_path / "p3.tif").write_bytes(b"broken")
    files += [FieldFile("A", 3, "p3.tif", "cellsearch", SHAPE, (0, 0))]
    table = field_limits(Store(str(tmp_path)), files)
    assert table["field"].to_pylist() == [1] * 4
    assert table["page"].to_pylist() == [0, 1, 2, 3]
    assert table["lower"].to_pylist() == [int(page.min()) + 32_768 for page in pages]
    assert table["upper"].to_pylist() == [int(page.max()) + 32_768 for page in pages]


def test_unstretched_fields_are_16_bit_whatever_the_file(tmp_path: Path) -> None:
    file = field(tmp_path, stretched(counts()))
    assert pixel_type(Store(str(tmp_path)), [file]) == "uint8"
    assert pixel_type(Store(str(tmp_path)), [file], "unstretched") == "uint16"
