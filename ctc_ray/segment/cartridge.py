"""Cartridges as CellSearch archives them, or plain folders of images: which fields there are, and where they lie.

Source: CellSearch archives as the ACCEPT tool reads them (layouts, names, grids, serpentine order).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ctc_ray.cohort import check_patient_id
from ctc_ray.errors import CartridgeError, MissingInputError
from ctc_ray.records import FailureRow
from ctc_ray.schema import FIELD_HEIGHT_PX, FIELD_WIDTH_PX, Channel
from ctc_ray.segment.archive_files import ArchiveFiles, FrameOrder, read_archive_files
from ctc_ray.segment.archive_xml import Geometry
from ctc_ray.storage import Store

Layout = Literal["cellsearch", "folder"]
TIFF_SUFFIXES = (".tif", ".tiff")
IMAGE_SUFFIXES = (*TIFF_SUFFIXES, ".png")
MAX_FIELD_BYTES = 4 * 2**30
_MAX_FOLDERS = 5
_MAX_FRAME = 32_767
_FRAME_NAME = re.compile(r"p(\d{1,9})$", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True)
class FieldFile:
    """One field of one patient.

    Attributes:
        patient: patient id.
        field: frame number, 1-based.
        path: file, relative to the store of cartridges.
        layout: how its pages are arranged.
        shape: (H, W) that it must have in pixels; None where any size will do.
        origin: (row, column) of the field's corner in the cartridge, pixels.
    """

    patient: str
    field: int
    path: str
    layout: Layout
    shape: tuple[int, int] | None
    origin: tuple[int, int]


@dataclass(frozen=True)
class Cartridge:
    """The fields of one patient.

    Attributes:
        patient: patient id, the folder's name as it is.
        folder: relative to the store of cartridges.
        layout: how the files are arranged.
        fields: by frame number.
        geometry: grid of frames; None where it is unknown, and then every field's origin is (0, 0).
        set_aside: images that are no usable field, and what is wrong with the archive's other files, with the reason.
        files: file -> bytes; what the patient's identity is made of.
        channels: channel -> page, from 0, as the xml names the filters; None where it does not.
    """

    patient: str
    folder: str
    layout: Layout
    fields: tuple[FieldFile, ...]
    geometry: Geometry | None
    set_aside: tuple[FailureRow, ...]
    files: Mapping[str, int]
    channels: Mapping[Channel, int] | None = None


def is_image(path: str) -> bool:
    """Whether a file or folder is named as an image."""
    return path.lower().endswith(IMAGE_SUFFIXES)


def find_patients(store: Store) -> list[str]:
    """Names of the patient folders, sorted; hidden ones are skipped.

    Raises:
        MissingInputError: the folder of cartridges does not exist.
        CartridgeError: it holds no folders.
        ConfigError: a name cannot be a patient id.
    """
    if not store.exists(""):
        raise MissingInputError(
            f"no folder of cartridges at {store.describe()}: give the folder that holds one folder a patient"
        )
    patients = [name for name in store.list_folders() if not name.startswith(".")]
    if store.exists("phantom.json"):  # synthetic cartridges may have their instance masks beside the patients
        patients = [name for name in patients if name != "masks"]
    if not patients:
        raise CartridgeError(
            f"{store.describe()} is empty of patients: --cartridges needs one folder a patient, with its field images inside"
        )
    return [check_patient_id(name) for name in patients]


def find_cartridge(
    store: Store,
    patient: str,
    layout: Literal["auto", "cellsearch", "folder"] = "auto",
    frame_order: FrameOrder = "auto",
) -> Cartridge:
    """Find the fields of one patient folder; no image is opened.

    Args:
        store: store whose folders are patients.
        patient: name of one of them.
        layout: `auto` takes a folder as `cellsearch` where it has an xml, tables of CellTracks-XP, or a TIFF named
            `...p<frame>`.
        frame_order: from which row of the grid frames count; `auto`: from the bottom in a CellTracks-XP archive of 140.

    Raises:
        CartridgeError: no images are found, or a folder cannot be listed.
    """
    try:
        folders, images = _descend(store, patient)
        strays = _strays(store, folders[-1])
        if not images:
            raise CartridgeError(
                f"patient {patient!r}: no images ({', '.join(IMAGE_SUFFIXES)}) in {store.describe(folders[-1])}; "
                "put the field images there, or remove the folder"
            )
        return _cartridge(store, patient, folders, images, strays, layout, frame_order)
    except CartridgeError:
        raise
    except OSError as error:
        raise CartridgeError(f"patient {patient!r}: {store.describe(patient)} cannot be read: {error}") from error


def _cartridge(
    store: Store,
    patient: str,
    folders: Sequence[str],
    images: list[str],
    set_aside: list[FailureRow],
    layout: Literal["auto", "cellsearch", "folder"],
    frame_order: FrameOrder,
) -> Cartridge:
    beside = [path for folder in reversed(folders) for path in _visible(store, folder, (".xml", ".dlm"))]
    tiffs = [path for path in images if path.lower().endswith(TIFF_SUFFIXES)]
    if layout == "auto":
        layout = "cellsearch" if tiffs and (beside or any(map(_frame_number, tiffs))) else "folder"
    archive = ArchiveFiles()
    if layout == "cellsearch":
        set_aside += [_reject(path, "a CellSearch field is a TIFF") for path in sorted(set(images) - set(tiffs))]
        images = tiffs
        archive = read_archive_files(store, patient, beside, folders[-1])
        numbered = _number_by_name(images, archive.frames_of_pictures, set_aside)
        archive = archive.with_grid(numbered, frame_order)
    else:
        numbered = dict(enumerate(images, start=1))
    set_aside += archive.set_aside
    sizes = {path: store.size(path) or 0 for path in images}
    fields = [
        _field(patient, number, path, layout, archive.geometry, sizes[path], set_aside)
        for number, path in sorted(numbered.items())
    ]
    return Cartridge(
        patient=patient,
        folder=folders[-1],
        layout=layout,
        fields=tuple(field for field in fields if field is not None),
        geometry=archive.geometry,
        set_aside=tuple(set_aside),
        files=sizes | {path: store.size(path) or 0 for path in archive.files},
        channels=archive.channels,
    )


def _descend(store: Store, patient: str) -> tuple[list[str], list[str]]:
    """Go down through single-child folders (`<id>/processed`, `<id>/<id>/processed`, `<id>/mic...`) to the images.

    The first folder with TIFFs of frames is taken; failing that, or if frames are fewer than images further up (an overview
    beside `processed` is passed by, a folder of masks below the images is not gone into), the first with images.
    """
    folders = [patient]
    first: tuple[list[str], list[str]] | None = None
    while len(folders) <= _MAX_FOLDERS:
        images = _visible(store, folders[-1], IMAGE_SUFFIXES)
        if any(map(_frame_number, images)) and (first is None or len(images) > len(first[1])):
            return folders, images
        if images and first is None:
            first = list(folders), images
        children = [name for name in store.list_folders(folders[-1]) if not name.startswith(".") and not is_image(name)]
        if "processed" in children:
            children = ["processed"]
        if len(children) != 1:
            break
        folders.append(f"{folders[-1]}/{children[0]}")
    return first or (folders[:_MAX_FOLDERS], [])


def _visible(store: Store, folder: str, suffixes: Sequence[str]) -> list[str]:
    paths = store.list_files(folder)
    return [
        path for path in paths if path.lower().endswith(tuple(suffixes)) and not path.rsplit("/", 1)[-1].startswith(".")
    ]


def _strays(store: Store, folder: str) -> list[FailureRow]:
    """What is named as an image and is none: folders and devices."""
    names = [name for name in store.list_folders(folder) if is_image(name) and not name.startswith(".")]
    return [_reject(f"{folder}/{name}", "it is a folder or a device, not a file") for name in names]


def _reject(path: str, reason: str) -> FailureRow:
    return FailureRow(path, CartridgeError.__name__, f"{path}: {reason}")


def _frame_number(path: str) -> int | None:
    """Number after the last "p" of the name, None where there is none."""
    match = _FRAME_NAME.search(path.rsplit("/", 1)[-1].rsplit(".", 1)[0])
    return int(match.group(1)) if match else None


def _number_by_name(
    images: Sequence[str], frames_of_pictures: Mapping[str, int], set_aside: list[FailureRow]
) -> dict[int, str]:
    numbered: dict[int, str] = {}
    for path in images:
        number = _frame_number(path)
        if number is None:
            number = frames_of_pictures.get(path.rsplit("/", 1)[-1].rsplit(".", 1)[0])
        if number is None:
            reason = "the name does not end in p<frame number>, so its place on the cartridge is unknown"
            set_aside.append(_reject(path, reason))
        elif number in numbered:
            reason = f"frame number {number} is taken by {numbered[number].rsplit('/', 1)[-1]}, the first file with it"
            set_aside.append(_reject(path, reason))
        else:
            numbered[number] = path
    return numbered


def _field(
    patient: str,
    number: int,
    path: str,
    layout: Layout,
    geometry: Geometry | None,
    num_bytes: int,
    set_aside: list[FailureRow],
) -> FieldFile | None:
    reason = None
    if not 1 <= number <= _MAX_FRAME:
        reason = f"frame number {number} is not in 1 to {_MAX_FRAME}"
    elif num_bytes > MAX_FIELD_BYTES:
        reason = f"it has {num_bytes} bytes; a field has at most {MAX_FIELD_BYTES}"
    elif layout == "cellsearch" and geometry is not None and number > geometry.num_frames:
        reason = f"frame {number} is not on the grid of {geometry.num_rows} x {geometry.num_columns} frames"
    if reason is not None:
        set_aside.append(_reject(path, reason))
        return None
    if layout == "folder":
        return FieldFile(patient, number, path, layout, None, (0, 0))
    if geometry is None:
        return FieldFile(patient, number, path, layout, (FIELD_HEIGHT_PX, FIELD_WIDTH_PX), (0, 0))
    shape = (geometry.field_height_px, geometry.field_width_px)
    return FieldFile(patient, number, path, layout, shape, geometry.origin(number))
