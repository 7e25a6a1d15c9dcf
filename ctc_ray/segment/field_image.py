"""Reading one field image into three channels, and refusing what is not one."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

import numpy as np
import tifffile
from skimage.io import imread

from ctc_ray.errors import CartridgeError, ConfigError
from ctc_ray.schema import CROP_SIZE_PX, Channel
from ctc_ray.segment.cartridge import TIFF_SUFFIXES, FieldFile, Layout
from ctc_ray.storage import Store

MIN_CELLSEARCH_PAGES = 4
MAX_SIDE_PX = 32_767
"""Positions are stored as 16-bit integers."""


def check_channel_map(channel_map: Mapping[str, int | None]) -> dict[Channel, int | None]:
    """Read the configuration's map from channel names to pages.

    Args:
        channel_map: DAPI, CK and CD45 -> page or colour index from 0, or null for a channel of zeros.

    Raises:
        ConfigError: a name is unknown or missing, an index negative, or CK (which is segmented) null.
    """
    names = [channel.name for channel in Channel]
    if set(channel_map) != set(names):
        raise ConfigError(f"segment.channel_map names {sorted(channel_map)}; it needs exactly {names}")
    if channel_map["CK"] is None:
        raise ConfigError("segment.channel_map gives no page for CK, the channel that is segmented")
    if any(index is not None and index < 0 for index in channel_map.values()):
        raise ConfigError(f"segment.channel_map is {dict(channel_map)}; pages count from 0")
    return {channel: channel_map[channel.name] for channel in Channel}


def read_field(store: Store, field: FieldFile, channel_map: Mapping[Channel, int | None]) -> np.ndarray:
    """Read one field.

    Args:
        store: store of cartridges.
        field: what to read.
        channel_map: channel -> page or colour index; None gives zeros.

    Returns:
        (3, H, W) uint8 or uint16 in the order of `Channel`, contiguous.

    Raises:
        CartridgeError: the file is empty, truncated, no image, of the wrong size or type, lacks a page, or its CK page is
            constant.
    """
    data = store.read_bytes(field.path)
    if not data:
        raise CartridgeError(f"{field.path} is empty (0 bytes)")
    try:
        planes = _planes(data, field.path, field.layout, [index for index in channel_map.values() if index is not None])
    except CartridgeError:
        raise
    except Exception as error:  # decoders of damaged files raise anything; one file must not end the run
        raise CartridgeError(f"{field.path} cannot be decoded: {type(error).__name__}: {error}") from error
    first = next(iter(planes.values()))
    zeros = np.zeros_like(first)
    pixels = np.stack([zeros if index is None else planes[index] for index in channel_map.values()])
    _check_pixels(pixels, field)
    return pixels


def _planes(data: bytes, path: str, layout: Layout, wanted: list[int]) -> dict[int, np.ndarray]:
    """The wanted pages or colours, each (H, W)."""
    if PurePosixPath(path).suffix.lower() not in TIFF_SUFFIXES:
        return _split(np.asarray(imread(io.BytesIO(data))), path, wanted)
    if data[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        raise CartridgeError(f"{path} is not a TIFF: it begins with {data[:4]!r}")
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        pages = list(file.pages)
        if layout == "cellsearch" and len(pages) < MIN_CELLSEARCH_PAGES:
            raise CartridgeError(
                f"{path} has {len(pages)} pages, a field has at least {MIN_CELLSEARCH_PAGES}: DNA, extra, CK, CD45"
            )
        if len(pages) == 1:
            _check_whole(pages[0], len(data), path)
            return _split(pages[0].asarray(), path, wanted)
        _check_count(len(pages), wanted, path, "pages")
        for index in wanted:
            _check_whole(pages[index], len(data), path)
        planes = {index: pages[index].asarray() for index in wanted}
    shapes = {plane.shape for plane in planes.values()}
    if len(shapes) != 1 or any(plane.ndim != 2 for plane in planes.values()):
        raise CartridgeError(f"{path} has pages of shapes {sorted(shapes)}; all must be one (H, W)")
    return planes


def _split(image: np.ndarray, path: str, wanted: list[int]) -> dict[int, np.ndarray]:
    """Planes of an image (H, W), (H, W, colours) or (pages, H, W); the short axis is the one that is split."""
    if image.ndim == 2:
        image = image[None]
    elif image.ndim == 3 and image.shape[-1] <= 4 < image.shape[0]:
        image = np.moveaxis(image, -1, 0)
    if image.ndim != 3:
        raise CartridgeError(f"{path} has shape {image.shape}; a field is (H, W), (H, W, colours) or (pages, H, W)")
    _check_count(len(image), wanted, path, "channels")
    return {index: image[index] for index in wanted}


def _check_count(count: int, wanted: list[int], path: str, what: str) -> None:
    if max(wanted) >= count:
        raise CartridgeError(
            f"{path} has {count} {what}, and segment.channel_map asks for index {max(wanted)} (from 0)"
        )


def _check_whole(page: tifffile.TiffPage | tifffile.TiffFrame, num_bytes: int, path: str) -> None:
    """Refuse a page whose strips lie beyond the end of the file: some decoders would fill them with zeros."""
    ends = [offset + size for offset, size in zip(page.dataoffsets, page.databytecounts, strict=True)]
    if not ends or max(ends) > num_bytes or min(page.databytecounts) == 0:
        raise CartridgeError(
            f"{path} is truncated: {num_bytes} bytes, page {page.index} ends at {max(ends, default=0)}"
        )


def _check_pixels(pixels: np.ndarray, field: FieldFile) -> None:
    shape = pixels.shape[1:]
    if pixels.dtype not in (np.uint8, np.uint16):
        raise CartridgeError(f"{field.path} holds {pixels.dtype} pixels; uint8 and uint16 are read: convert the image")
    if field.shape is not None and shape != field.shape:
        raise CartridgeError(
            f"{field.path} is {shape[0]} x {shape[1]} px, the cartridge's fields are {field.shape[0]} x {field.shape[1]}"
        )
    if min(shape) < CROP_SIZE_PX or max(shape) > MAX_SIDE_PX:
        raise CartridgeError(
            f"{field.path} is {shape[0]} x {shape[1]} px; both sides must be in {CROP_SIZE_PX} to {MAX_SIDE_PX}"
        )
    ck = pixels[Channel.CK]
    if ck.min() == ck.max():
        raise CartridgeError(f"{field.path}: every pixel of the CK page is {ck.min()}, so there is nothing to segment")


def pixel_type(store: Store, fields: Sequence[FieldFile]) -> str:
    """Pixel type of a patient's fields: that of the first one whose header can be read; `uint8` where none can."""
    for field in fields:
        try:
            with store.open_input(field.path) as stream:
                if not field.path.lower().endswith(TIFF_SUFFIXES):
                    return str(np.asarray(imread(io.BytesIO(stream.read()))).dtype)
                with tifffile.TiffFile(stream) as file:
                    found = file.pages[0].dtype
        except Exception:  # noqa: BLE001  # damaged headers raise anything; the field's own turn tells what is wrong
            continue
        if found in (np.uint8, np.uint16):
            return str(found)
    return "uint8"
