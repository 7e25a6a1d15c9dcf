"""Reading one field image into three channels, and refusing what is not one."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import PurePosixPath
from typing import Literal

import numpy as np
import tifffile
from PIL import Image
from skimage.io import imread

from ctc_ray.errors import CartridgeError, ConfigError
from ctc_ray.schema import CROP_SIZE_PX, Channel
from ctc_ray.segment.cartridge import TIFF_SUFFIXES, FieldFile
from ctc_ray.segment.contrast import unstretch_planes
from ctc_ray.segment.tiff_pages import check_size, check_tiff, read_page
from ctc_ray.storage import Store

Contrast = Literal["raw", "unstretched"]
CELLSEARCH_PAGES = (4, 6)
"""Fewest and most pages: DNA, an extra marker, CK, CD45, and up to two more markers."""
MAX_SIDE_PX = 32_767
"""Positions are stored as 16-bit integers."""
USUAL_CHANNELS: Mapping[str, int | None] = {"DAPI": 0, "CK": 2, "CD45": 3}
"""Pages of a CellSearch TIFF where nothing tells them; page 1 is the extra marker."""
_MAX_HEADERS = 9


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


def read_field(
    store: Store, field: FieldFile, channel_map: Mapping[Channel, int | None], contrast: Contrast = "raw"
) -> np.ndarray:
    """Read one field.

    Args:
        store: store of cartridges.
        field: what to read.
        channel_map: channel -> page or colour index; None gives zeros.
        contrast: `raw` gives the file's counts; `unstretched` undoes the stretching of each page, see `unstretch`.

    Returns:
        (3, H, W) uint8 or uint16 in the order of `Channel`, contiguous; uint16, 0 to 4095, if unstretched.

    Raises:
        CartridgeError: the file is empty, truncated, no image, of the wrong size or type, has too few or too many pages,
            declares more pixels than it can hold, its CK page is constant, or it is to be unstretched and has no limits.
    """
    data = store.read_bytes(field.path)
    if not data:
        raise CartridgeError(f"{field.path} is empty (0 bytes)")
    wanted = sorted({index for index in channel_map.values() if index is not None})
    try:
        planes = _planes(data, field, wanted, contrast)
    except CartridgeError:
        raise
    except MemoryError as error:
        raise CartridgeError(f"{field.path} needs more memory than there is to be decoded") from error
    except Exception as error:  # decoders of damaged files raise anything; one file must not end the run
        raise CartridgeError(f"{field.path} cannot be decoded: {type(error).__name__}: {error}") from error
    _check_planes(planes, field)
    ck = channel_map[Channel.CK]
    if ck is not None:
        _check_signal(planes[ck], field.path)
    zeros = np.zeros_like(next(iter(planes.values())))
    return np.stack([zeros if index is None else planes[index] for index in channel_map.values()])


def _planes(data: bytes, field: FieldFile, wanted: list[int], contrast: Contrast) -> dict[int, np.ndarray]:
    """The wanted pages or colours, each (H, W)."""
    path = field.path
    if PurePosixPath(path).suffix.lower() not in TIFF_SUFFIXES:
        if contrast != "raw":
            raise CartridgeError(f"{path} is no TIFF and has no contrast limits: use segment.contrast: raw")
        with Image.open(io.BytesIO(data)) as header:
            check_size(header.size[::-1], path)
        return _split(np.asarray(imread(io.BytesIO(data))), path, wanted)
    check_tiff(data, path)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        pages = _pages(file, field, wanted)
        if len(pages) == 1:
            planes = _split(read_page(pages[0], data, path), path, wanted)
            return planes if contrast == "raw" else unstretch_planes(planes, dict.fromkeys(wanted, pages[0]), path)
        _check_count(len(pages), wanted, path, "pages")
        for index in wanted:  # before any is decoded: a header can declare what no memory holds
            _check_shape(pages[index].shape, field)
        planes = {index: read_page(pages[index], data, path) for index in wanted}
        if contrast == "raw":
            return planes
        return unstretch_planes(planes, {index: pages[index] for index in wanted}, path)


def _pages(file: tifffile.TiffFile, field: FieldFile, wanted: list[int]) -> list[tifffile.TiffPage]:
    """The pages of a file, no further than needed: the links of a damaged file may lead in a circle."""
    fewest, most = CELLSEARCH_PAGES
    limit = most + 1 if field.layout == "cellsearch" else max(wanted) + 2
    pages = [page.aspage() for page in islice(file.pages, limit)]
    if field.layout == "cellsearch" and not fewest <= len(pages) <= most:
        count = f"{len(pages)} pages" if len(pages) <= most else f"more than {most} pages"
        raise CartridgeError(
            f"{field.path} has {count}, a field has {fewest} to {most}: DNA, an extra marker, CK, CD45, further markers"
        )
    return pages


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


def _check_shape(shape: Sequence[int], field: FieldFile) -> None:
    if len(shape) != 2:
        raise CartridgeError(f"{field.path} has a page of shape {tuple(shape)}; pages are (H, W), one channel each")
    if field.shape is not None and tuple(shape) != field.shape:
        raise CartridgeError(
            f"{field.path} is {shape[0]} x {shape[1]} px, the cartridge's fields are {field.shape[0]} x {field.shape[1]}"
        )
    if min(shape) < CROP_SIZE_PX or max(shape) > MAX_SIDE_PX:
        raise CartridgeError(
            f"{field.path} is {shape[0]} x {shape[1]} px; both sides must be in {CROP_SIZE_PX} to {MAX_SIDE_PX}"
        )


def _check_planes(planes: Mapping[int, np.ndarray], field: FieldFile) -> None:
    """Refuse planes that do not go together, or that hold no image."""
    types, shapes = {str(plane.dtype) for plane in planes.values()}, {plane.shape for plane in planes.values()}
    if len(types) != 1 or len(shapes) != 1:
        raise CartridgeError(
            f"{field.path} has pages of {' and '.join(sorted(types))}, of shapes {sorted(shapes)}; all must be alike, or their "
            "counts would not be comparable"
        )
    if not types <= {"uint8", "uint16"}:
        raise CartridgeError(f"{field.path} holds {types.pop()} pixels; uint8 and uint16 are read: convert the image")
    _check_shape(shapes.pop(), field)


def _check_signal(ck: np.ndarray, path: str) -> None:
    if ck.min() == ck.max():
        raise CartridgeError(f"{path}: every pixel of the CK page is {ck.min()}, so there is nothing to segment")


def pixel_type(store: Store, fields: Sequence[FieldFile], contrast: Contrast = "raw") -> str:
    """Pixel type of a patient's fields: that of most of up to nine whose header can be read; `uint8` where none can.

    Args:
        store: store of cartridges.
        fields: of one patient.
        contrast: unstretched fields are uint16 whatever the file holds.
    """
    if contrast == "unstretched":
        return "uint16"
    chosen = sorted({round(place) for place in np.linspace(0, len(fields) - 1, min(len(fields), _MAX_HEADERS))})
    found = Counter(kind for index in chosen if (kind := _header_type(store, fields[index])) in ("uint8", "uint16"))
    if not found and len(fields) > len(chosen):
        found = Counter(kind for field in fields if (kind := _header_type(store, field)) in ("uint8", "uint16"))
    return str(found.most_common(1)[0][0]) if found else "uint8"


def _header_type(store: Store, field: FieldFile) -> str | None:
    """Pixel type that a file's header tells; None where it cannot be read."""
    try:
        with store.open_input(field.path) as stream:
            if not field.path.lower().endswith(TIFF_SUFFIXES):
                with Image.open(io.BytesIO(stream.read())) as image:
                    return "uint16" if image.mode.startswith("I") else "uint8"
            with tifffile.TiffFile(stream) as file:
                return str(file.pages[0].dtype)
    except Exception:  # noqa: BLE001  # damaged headers raise anything; the field's own turn tells what is wrong
        return None
