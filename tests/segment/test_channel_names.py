"""Which page is which channel, from the names of the filters."""

from __future__ import annotations

import pytest

from ctc_ray.errors import CartridgeError
from ctc_ray.schema import Channel
from ctc_ray.segment.channel_names import channels_of


@pytest.mark.parametrize(
    ("filters", "pages"),
    [
        (["DNA", "FITC", "CK-PE", "CD45-APC"], (0, 2, 3)),
        (["dapi", "fitc", "ck-pe", "cd45-apc"], (0, 2, 3)),
        (["CD45 APC", "DAPI/DNA", "Cytokeratin (PE)", "Her2 FITC"], (1, 2, 0)),
        (["CKPE", "CD 45", "Hoechst", ""], (2, 0, 1)),
        (["DAPI", "FITC", "PE", "APC"], (0, 2, 3)),
        (["DAPI", "CK-FITC", "Marker-PE", "CD45-APC"], (0, 1, 3)),
        (["DNA", "Empty", "CK8/18/19", "CD45", "PD-L1", "EpCAM"], (0, 2, 3)),
        (["Nucleus", "Black", "pan-CK", "CD45"], (0, 2, 3)),
    ],
)
def test_channels_are_recognised_whatever_the_case_and_separators(
    filters: list[str], pages: tuple[int, int, int]
) -> None:
    assert channels_of(filters) == dict(zip(Channel, pages, strict=True))


@pytest.mark.parametrize(
    "filters",
    [
        [],
        ["1", "2", "3", "4"],
        ["DAPI", "FITC", "CK-PE", "Marker"],  # no CD45
        ["DAPI", "CK-PE", "CK-FITC", "CD45"],  # two pages of CK
        ["DAPI CK-PE", "FITC", "Empty", "CD45"],  # two stains on one page
        ["DAPI", "FITC", "CK", "CD450"],
    ],
)
def test_names_that_do_not_tell_the_channels_apart_are_refused(filters: list[str]) -> None:
    with pytest.raises(CartridgeError, match="do not tell"):
        channels_of(filters)
