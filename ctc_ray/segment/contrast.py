"""Contrast-stretched pages: the limits that CellTracks wrote beside them, and the counts they were before.

CellTracks may stretch every page to the full range of its pixel type and keep the two limits in private tags: 754 marks such a
file, 755 is the lower and 756 the upper limit. The same grey level then means another signal in the next frame.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import tifffile

from ctc_ray.errors import CartridgeError, MissingInputError
from ctc_ray.segment.cartridge import TIFF_SUFFIXES, FieldFile
from ctc_ray.storage import StorageError, Store

LOWER_TAG = 755
UPPER_TAG = 756
OFFSET = 32_768
"""Some archives store signed counts with this offset."""
_MAX_PAGES = 6
MAX_COUNT = 4095
"""The camera has 12 bits."""
LIMITS_SCHEMA = pa.schema([("field", pa.int16()), ("page", pa.int16()), ("lower", pa.uint16()), ("upper", pa.uint16())])
"""`contrast/<patient>.parquet`: tags 755 and 756 as they are in the file; `page` counts from 0."""


@dataclass(frozen=True)
class PageLimits:
    """Counts between which a page was stretched, as its tags hold them (uint16, perhaps with `OFFSET`)."""

    lower: int
    upper: int


def page_limits(page: tifffile.TiffPage) -> PageLimits | None:
    """Read the limits of a page; None where it has none.

    Raises:
        CartridgeError: only one of the two tags is there, or a tag is no 16-bit count.
    """
    lower, upper = (page.tags[code].value if code in page.tags else None for code in (LOWER_TAG, UPPER_TAG))
    if lower is None and upper is None:
        return None
    if not (
        isinstance(lower, int) and isinstance(upper, int) and max(lower, upper) <= 65_535 and min(lower, upper) >= 0
    ):
        raise CartridgeError(
            f"page {page.index} has the contrast limits {lower!r} and {upper!r} (tags {LOWER_TAG} and {UPPER_TAG}), "
            "expected two 16-bit counts"
        )
    return PageLimits(lower, upper)


def unstretch(page: np.ndarray, limits: PageLimits) -> npt.NDArray[np.uint16]:
    """Counts of a page before it was stretched.

    Args:
        page: (H, W) uint8 or uint16, as in the file.
        limits: of that page.

    Returns:
        (H, W) uint16, 0 to 4095: lower + page * (upper - lower) / maximum of the page, rounded.

    Raises:
        CartridgeError: the limits are in the wrong order or beyond 12 bits, or only one has the offset of 32,768.

    Source: ACCEPT, `read_im_and_scale`: it divides by the page's own maximum, and takes 32,768 off a restored page that lies
    above 32,767. Departures: rounded to whole counts; limits for which that gives no 12-bit counts are refused.
    """
    lower, upper = limits.lower, limits.upper
    if lower >= OFFSET and upper >= OFFSET:
        lower, upper = lower - OFFSET, upper - OFFSET
    if not 0 <= lower <= upper <= MAX_COUNT:
        raise CartridgeError(
            f"contrast limits {limits.lower} to {limits.upper} (tags {LOWER_TAG} and {UPPER_TAG}) give no counts of "
            f"0 to {MAX_COUNT}: use segment.contrast: raw"
        )
    highest = max(int(page.max()), 1)
    scaled = page.astype(np.float64) * ((upper - lower) / highest) + lower
    return np.asarray(np.rint(scaled), dtype=np.uint16)


def unstretch_planes(
    planes: Mapping[int, np.ndarray], pages: Mapping[int, tifffile.TiffPage], path: str
) -> dict[int, np.ndarray]:
    """Restore several planes of a file.

    Args:
        planes: index -> (H, W).
        pages: index -> the page with its limits.
        path: for messages.

    Raises:
        CartridgeError: a page has no limits, or limits that cannot be used.
    """
    restored: dict[int, np.ndarray] = {}
    for index, plane in planes.items():
        try:
            limits = page_limits(pages[index])
            if limits is None:
                raise CartridgeError(
                    f"page {pages[index].index} has no contrast limits (tags {LOWER_TAG} and {UPPER_TAG}), which "
                    "segment.contrast: unstretched needs: use raw, or another cohort for cartridges without them"
                )
            restored[index] = unstretch(plane, limits)
        except CartridgeError as error:
            raise CartridgeError(f"{path}: {error}") from error
    return restored


def field_limits(store: Store, fields: Iterable[FieldFile]) -> pa.Table:
    """Limits of all pages of some fields, from the headers of their files.

    Args:
        store: store of cartridges.
        fields: which; a file that cannot be read any more gives no rows.

    Returns:
        Table of `LIMITS_SCHEMA`, by field and page; pages without limits have no row.
    """
    rows = [
        {"field": field.field, "page": index, "lower": limits.lower, "upper": limits.upper}
        for field in fields
        if field.path.lower().endswith(TIFF_SUFFIXES)
        for index, limits in enumerate(_limits_of(store, field))
        if limits is not None
    ]
    return pa.Table.from_pylist(rows, schema=LIMITS_SCHEMA)


def _limits_of(store: Store, field: FieldFile) -> Sequence[PageLimits | None]:
    try:
        with store.open_input(field.path) as stream, tifffile.TiffFile(stream) as file:
            return [page_limits(page.aspage()) for page in islice(file.pages, _MAX_PAGES)]
    except (CartridgeError, MissingInputError, StorageError, tifffile.TiffFileError):
        return []
