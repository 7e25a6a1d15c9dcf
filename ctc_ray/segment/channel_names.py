"""Which page is which channel, from the names of the filters in an archive's xml."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ctc_ray.errors import CartridgeError
from ctc_ray.schema import Channel

_STAINS = {
    Channel.DAPI: re.compile(r"DAPI|DNA|HOECHST|NUCLE(US|AR|IC)"),
    Channel.CK: re.compile(r"(PAN)?CK(\d|PE|$)|(PAN)?(CYTO)?KERATIN"),
    Channel.CD45: re.compile(r"CD45(?!\d)"),
}
"""What the beginning of a word of a filter's name says about the stained molecule."""
_DYES = {Channel.CK: re.compile(r"PE$"), Channel.CD45: re.compile(r"APC$")}
"""Dyes of the CellSearch kit, for filters that are named by dye alone."""


def channels_of(filters: Sequence[str]) -> dict[Channel, int]:
    """Find the pages of DAPI, CK and CD45.

    Args:
        filters: name of each page's filter in page order, such as `DNA`, `FITC`, `CK-PE`, `CD45-APC`; case and separators do
            not matter. The stain decides; a dye (PE for CK, APC for CD45) counts where no filter names the stain.

    Returns:
        Channel -> page, from 0.

    Raises:
        CartridgeError: a channel has no page or more than one, or one page has two stains.

    Source: CellSearch kit (DAPI; CK 8, 18 and 19 in PE; CD45 in APC).
    """
    words = [_words(name) for name in filters]
    found: dict[Channel, list[int]] = {
        channel: [page for page, names in enumerate(words) if any(map(stain.match, names))]
        for channel, stain in _STAINS.items()
    }
    stained = {page for pages in found.values() for page in pages}
    for channel, dye in _DYES.items():
        if not found[channel]:
            found[channel] = [
                page for page, names in enumerate(words) if page not in stained and any(map(dye.match, names))
            ]
    chosen = [page for pages in found.values() for page in pages]
    if any(len(pages) != 1 for pages in found.values()) or len(set(chosen)) != len(chosen):
        told = ", ".join(f"{channel.name} on {_pages(pages)}" for channel, pages in found.items())
        raise CartridgeError(f"the filter names {list(filters)} do not tell DAPI, CK and CD45 apart ({told})")
    return {channel: pages[0] for channel, pages in found.items()}


def _words(name: str) -> list[str]:
    """Words of a name in capitals, and the name without separators (`CD 45` is `CD45`)."""
    words = re.split(r"[^A-Z0-9]+", name.upper())
    return [word for word in (*words, "".join(words)) if word]


def _pages(pages: Sequence[int]) -> str:
    return f"page {' and '.join(str(page + 1) for page in pages)}" if pages else "no page"
