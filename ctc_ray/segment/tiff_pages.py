"""Pages of a TIFF, checked against their header and the file's length before anything of their size is allocated."""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Sequence

import numpy as np
import tifffile
from PIL import Image

from ctc_ray.errors import CartridgeError

Page = tifffile.TiffPage
MAX_FIELD_PX = 2**28
"""Pixels of an image: 16,384 squared. More does not fit into the memory that a field may take."""
_MAX_RATIO = {1: 1, 5: 2800, 8: 1100, 32773: 64, 32946: 1100}
"""Compression -> at most this many bytes from one (LZW's table holds strings of 4,096; deflate's limit is 1,032)."""
_DEFLATE = {8, 32946}
_BY_PILLOW = {5}
"""Compressions that tifffile leaves to an optional package."""


def check_tiff(data: bytes, path: str) -> None:
    """Refuse what does not begin as a TIFF.

    Raises:
        CartridgeError: it is something else.
    """
    if data[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        raise CartridgeError(f"{path} is not a TIFF: it begins with {data[:4]!r}")


def check_size(shape: Sequence[int], path: str) -> None:
    """Refuse dimensions that would exhaust memory.

    Raises:
        CartridgeError: more than `MAX_FIELD_PX` samples, or none.
    """
    if not 1 <= math.prod(shape) <= MAX_FIELD_PX:
        sides = " x ".join(map(str, shape))
        raise CartridgeError(f"{path} declares {sides} samples; an image has 1 to {MAX_FIELD_PX}: it is not decoded")


def read_page(page: Page, data: bytes, path: str) -> np.ndarray:
    """Decode one page.

    Args:
        page: of the file that `data` holds.
        data: the whole file.
        path: for messages.

    Returns:
        (H, W) or (H, W, samples) of the file's type; 12-bit pages as uint16.

    Raises:
        CartridgeError: the page is larger than its bytes could hold, truncated, or compressed in a way that is not read.
    """
    check_size(page.shape, path)
    _check_whole(page, len(data), path)
    if page.bitspersample == 12:
        return _unpack_12_bit(page, data, path)
    if int(page.compression) in _DEFLATE:
        _check_deflated(page, data, path)
    if int(page.compression) in _BY_PILLOW:
        with Image.open(io.BytesIO(data)) as image:
            image.seek(page.index)
            return np.asarray(image)
    return np.asarray(page.asarray())


def _check_whole(page: Page, num_bytes: int, path: str) -> None:
    """Refuse a page whose strips end after the file, or could not hold its pixels; decoders fill the rest with zeros."""
    sizes, compression = page.databytecounts, int(page.compression)
    ends = [offset + size for offset, size in zip(page.dataoffsets, sizes, strict=True)]
    if not ends or max(ends) > num_bytes or min(sizes) == 0:
        raise CartridgeError(
            f"{path} is truncated: {num_bytes} bytes, page {page.index} ends at {max(ends, default=0)}"
        )
    needed = math.prod(page.shape) * page.bitspersample // 8
    if needed > sum(sizes) * _MAX_RATIO.get(compression, 5000):
        raise CartridgeError(
            f"{path} is truncated or no true image: page {page.index} declares {needed} bytes of pixels and has {sum(sizes)}"
        )


def _check_deflated(page: Page, data: bytes, path: str) -> None:
    """Refuse a strip that unfolds to more than the whole page, before a decoder without a limit unfolds it."""
    limit = math.prod(page.shape) * page.bitspersample // 8
    for offset, size in zip(page.dataoffsets, page.databytecounts, strict=True):
        stream = zlib.decompressobj()
        unfolded = len(stream.decompress(data[offset : offset + size], limit + 1))
        if unfolded > limit:
            raise CartridgeError(f"{path}: a strip of page {page.index} holds more than the page's {limit} bytes")


def _unpack_12_bit(page: Page, data: bytes, path: str) -> np.ndarray:
    """Two pixels in three bytes, high bits first, every row from a byte of its own.

    Source: TIFF 6.0, BitsPerSample and FillOrder.
    """
    if int(page.compression) != 1 or len(page.shape) != 2 or page.is_tiled or page.fillorder != 1:
        raise CartridgeError(
            f"{path} packs 12 bits in a way that is not read (compressed, tiled or in colour): write 16 bits a pixel"
        )
    height, width = page.shape
    row_bytes = -(-width * 12 // 8)
    packed = b"".join(
        data[offset : offset + size] for offset, size in zip(page.dataoffsets, page.databytecounts, strict=True)
    )
    if len(packed) < height * row_bytes:
        raise CartridgeError(f"{path} is truncated: page {page.index} has {len(packed)} of {height * row_bytes} bytes")
    rows = np.frombuffer(packed, np.uint8, count=height * row_bytes).reshape(height, row_bytes)
    # An odd width ends in half a group of three bytes.
    whole = np.pad(rows, ((0, 0), (0, -row_bytes % 3))).reshape(height, -1, 3).astype(np.uint16)
    first = (whole[..., 0] << 4) | (whole[..., 1] >> 4)
    second = ((whole[..., 1] & 0x0F) << 8) | whole[..., 2]
    return np.stack([first, second], axis=-1).reshape(height, -1)[:, :width]
