"""What lies beside the images of an archive: its xml, or the tables of CellTracks-XP; and the grid that follows."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ctc_ray.errors import CartridgeError, CtcRayError, MissingInputError
from ctc_ray.records import FailureRow
from ctc_ray.schema import FIELD_HEIGHT_PX, FIELD_WIDTH_PX, Channel
from ctc_ray.segment.archive_xml import MAX_XML_BYTES, Archive, Geometry, read_archive
from ctc_ray.segment.celltracks_xp import NUM_FRAMES_FROM_BOTTOM, PICTURES_NAME, read_pictures
from ctc_ray.segment.channel_names import channels_of
from ctc_ray.storage import StorageError, Store

FrameOrder = Literal["auto", "top", "bottom"]
GRIDS: Mapping[int, tuple[int, int]] = {
    210: (6, 35), 180: (5, 36), 175: (5, 35), 170: (5, 34), 144: (4, 36), 140: (4, 35)
}  # fmt: skip
"""Rows and columns of frames, for archives whose xml does not tell."""
_MIN_PRESENT = 0.95
"""Share of a known grid's frames that must be there for the grid to be taken where some are missing."""


@dataclass(frozen=True)
class ArchiveFiles:
    """What the files beside the images tell.

    Attributes:
        geometry: grid of frames; None where it is unknown.
        channels: channel -> page, from 0; None where the filters' names do not tell.
        frames_of_pictures: name of a picture -> frame number, from the tables of CellTracks-XP; empty without them.
        files: paths of what was read.
        set_aside: what could not be read or understood, with the reason.
    """

    geometry: Geometry | None = None
    channels: Mapping[Channel, int] | None = None
    frames_of_pictures: Mapping[str, int] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    set_aside: tuple[FailureRow, ...] = ()

    def with_grid(self, frames: Collection[int], order: FrameOrder) -> ArchiveFiles:
        """Fill in the grid where the xml does not tell it, and where its frames begin.

        Args:
            frames: frame numbers of the images.
            order: `top`, `bottom`, or `auto` for the bottom in a CellTracks-XP archive of 140 frames.
        """
        geometry = self.geometry or known_grid(frames)
        if geometry is None:
            return self
        is_old = bool(self.frames_of_pictures) and geometry.num_frames == NUM_FRAMES_FROM_BOTTOM
        from_bottom = is_old if order == "auto" else order == "bottom"
        return replace(self, geometry=replace(geometry, from_bottom=from_bottom))


def known_grid(frames: Collection[int]) -> Geometry | None:
    """Grid of an archive of so many frames; None where no known grid holds them, or too few are there to tell.

    Args:
        frames: frame numbers, 1-based. A few may be missing, at the end too.
    """
    for num_frames, (rows, columns) in sorted(GRIDS.items()):
        if max(frames, default=0) <= num_frames:
            is_whole = len(frames) >= _MIN_PRESENT * num_frames
            return Geometry(rows, columns, FIELD_HEIGHT_PX, FIELD_WIDTH_PX) if is_whole else None
    return None


def read_archive_files(store: Store, patient: str, paths: Sequence[str], folder: str) -> ArchiveFiles:
    """Read the xml of an archive, and the frame map of CellTracks-XP.

    Args:
        store: store of cartridges.
        patient: whose name the xml usually bears; such a file is tried first.
        paths: xml and dlm files in and above the folder of the images.
        folder: of the images, for messages.
    """
    set_aside: list[FailureRow] = []
    named = sorted(
        (path for path in paths if path.lower().endswith(".xml")), key=lambda path: not _bears(path, patient)
    )
    path, archive = _first_archive(store, named, set_aside)
    tables = [path for path in paths if path.rsplit("/", 1)[-1].lower() == PICTURES_NAME]
    pictures = _pictures(store, tables[0], set_aside) if tables else {}
    if not named and not tables:
        message = (
            f"{store.describe(folder)} has no xml: the grid is taken from the number of frames, the pages in their usual "
            "order, and there are no events to compare with"
        )
        set_aside.append(FailureRow(folder, MissingInputError.__name__, message))
    channels = None
    if archive is not None and path is not None and any(archive.filters):
        try:
            channels = channels_of(archive.filters)
        except CartridgeError as error:
            message = f"{path}: {error}; pages are taken in their usual order (segment.channel_map overrides)"
            set_aside.append(FailureRow(path, type(error).__name__, message))
    return ArchiveFiles(
        geometry=archive.geometry if archive else None,
        channels=channels,
        frames_of_pictures=pictures,
        files=(*named, *tables[:1]),
        set_aside=tuple(set_aside),
    )


def _first_archive(
    store: Store, paths: Sequence[str], set_aside: list[FailureRow]
) -> tuple[str | None, Archive | None]:
    """The first xml that tells the grid, else the first that can be read; those that cannot are set aside."""
    readable: list[tuple[str, Archive]] = []
    for path in paths:
        try:
            if (store.size(path) or 0) > MAX_XML_BYTES:
                raise CartridgeError(f"{path} is larger than the {MAX_XML_BYTES} bytes of an archive's xml")
            archive = read_archive(store.read_bytes(path), path)
        except (CartridgeError, MissingInputError, StorageError) as error:
            set_aside.append(FailureRow(path, type(error).__name__, str(error)))
            continue
        if archive.geometry is not None:
            return path, archive
        readable.append((path, archive))
    return readable[0] if readable else (None, None)


def _pictures(store: Store, path: str, set_aside: list[FailureRow]) -> dict[str, int]:
    try:
        return read_pictures(store.read_bytes(path), path)
    except CtcRayError as error:
        set_aside.append(FailureRow(path, type(error).__name__, str(error)))
        return {}


def _bears(path: str, patient: str) -> bool:
    return path.rsplit("/", 1)[-1].rsplit(".", 1)[0] == patient
