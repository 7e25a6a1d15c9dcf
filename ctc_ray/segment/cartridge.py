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
from ctc_ray.schema import FIELD_HEIGHT_PX, FIELD_WIDTH_PX
from ctc_ray.segment.archive_xml import Geometry, read_archive
from ctc_ray.storage import Store

Layout = Literal["cellsearch", "folder"]
TIFF_SUFFIXES = (".tif", ".tiff")
IMAGE_SUFFIXES = (*TIFF_SUFFIXES, ".png")
GRIDS: Mapping[int, tuple[int, int]] = {
    210: (6, 35), 180: (5, 36), 175: (5, 35), 170: (5, 34), 144: (4, 36), 140: (4, 35)
}  # fmt: skip
"""Rows and columns of frames, for archives whose xml does not tell."""
_FRAME_NAME = re.compile(r"p(\d+)$", re.IGNORECASE)


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
        set_aside: files that are no usable field, with the reason.
        files: image file -> bytes; what the patient's identity is made of.
    """

    patient: str
    folder: str
    layout: Layout
    fields: tuple[FieldFile, ...]
    geometry: Geometry | None
    set_aside: tuple[FailureRow, ...]
    files: Mapping[str, int]


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


def find_cartridge(store: Store, patient: str, layout: Literal["auto", "cellsearch", "folder"] = "auto") -> Cartridge:
    """Find the fields of one patient folder; no image is opened.

    Args:
        store: store whose folders are patients.
        patient: name of one of them.
        layout: `auto` takes a folder as `cellsearch` where it has an xml or a TIFF named `...p<frame>`.

    Raises:
        CartridgeError: no images are found.
    """
    folders, images = _descend(store, patient)
    if not images:
        raise CartridgeError(
            f"patient {patient!r}: no images ({', '.join(IMAGE_SUFFIXES)}) in {store.describe(folders[-1])}; "
            "put the field images there, or remove the folder"
        )
    archives = [path for folder in reversed(folders) for path in _visible(store, folder, (".xml",))]
    tiffs = [path for path in images if path.lower().endswith(TIFF_SUFFIXES)]
    if layout == "auto":
        layout = "cellsearch" if tiffs and (archives or any(map(_frame_number, tiffs))) else "folder"
    set_aside: list[FailureRow] = []
    geometry = None
    if layout == "cellsearch":
        images = tiffs
        geometry = _geometry(store, archives, len(images), set_aside)
        numbered = _number_by_name(images, set_aside)
    else:
        numbered = dict(enumerate(images, start=1))
    fields = tuple(
        _field(patient, number, path, layout, geometry, set_aside) for number, path in sorted(numbered.items())
    )
    return Cartridge(
        patient=patient,
        folder=folders[-1],
        layout=layout,
        fields=tuple(field for field in fields if field is not None),
        geometry=geometry,
        set_aside=tuple(set_aside),
        files={path: store.size(path) or 0 for path in [*images, *archives]},
    )


def _descend(store: Store, patient: str) -> tuple[list[str], list[str]]:
    """Go down through single-child folders (`<id>/processed`, `<id>/<id>/processed`, `<id>/mic...`) to the images."""
    folders = [patient]
    for _ in range(5):
        images = _visible(store, folders[-1], IMAGE_SUFFIXES)
        if images:
            return folders, images
        children = [name for name in store.list_folders(folders[-1]) if not name.startswith(".")]
        if "processed" in children:
            children = ["processed"]
        if len(children) != 1:
            break
        folders.append(f"{folders[-1]}/{children[0]}")
    return folders, []


def _visible(store: Store, folder: str, suffixes: Sequence[str]) -> list[str]:
    paths = store.list_files(folder)
    return [
        path for path in paths if path.lower().endswith(tuple(suffixes)) and not path.rsplit("/", 1)[-1].startswith(".")
    ]


def _frame_number(path: str) -> int | None:
    """Number after the last "p" of the name, None where there is none."""
    match = _FRAME_NAME.search(path.rsplit("/", 1)[-1].rsplit(".", 1)[0])
    return int(match.group(1)) if match else None


def _number_by_name(images: Sequence[str], set_aside: list[FailureRow]) -> dict[int, str]:
    numbered: dict[int, str] = {}
    for path in images:
        number = _frame_number(path)
        if number is None:
            reason = "the name does not end in p<frame number>, so its place on the cartridge is unknown"
            set_aside.append(FailureRow(path, "CartridgeError", reason))
        elif number in numbered:
            reason = f"frame number {number} is taken by {numbered[number].rsplit('/', 1)[-1]}, the first file with it"
            set_aside.append(FailureRow(path, "CartridgeError", reason))
        else:
            numbered[number] = path
    return numbered


def _geometry(store: Store, archives: Sequence[str], num_images: int, set_aside: list[FailureRow]) -> Geometry | None:
    """Grid of the xml, else the known grid of that many frames, else None; an unreadable xml is set aside."""
    for path in archives:
        try:
            archive = read_archive(store.read_bytes(path), path)
        except CartridgeError as error:
            set_aside.append(FailureRow(path, type(error).__name__, str(error)))
            continue
        if archive.geometry is not None:
            return archive.geometry
    if num_images in GRIDS:
        rows, columns = GRIDS[num_images]
        return Geometry(rows, columns, FIELD_HEIGHT_PX, FIELD_WIDTH_PX)
    return None


def _field(
    patient: str, number: int, path: str, layout: Layout, geometry: Geometry | None, set_aside: list[FailureRow]
) -> FieldFile | None:
    if number > 32_767 or number < 1:
        set_aside.append(FailureRow(path, "CartridgeError", f"frame number {number} is not in 1 to 32767"))
        return None
    if layout == "folder":
        return FieldFile(patient, number, path, layout, None, (0, 0))
    if geometry is None:
        return FieldFile(patient, number, path, layout, (FIELD_HEIGHT_PX, FIELD_WIDTH_PX), (0, 0))
    shape = (geometry.field_height_px, geometry.field_width_px)
    if number > geometry.num_rows * geometry.num_columns:
        reason = f"frame {number} is not on the grid of {geometry.num_rows} x {geometry.num_columns} frames"
        set_aside.append(FailureRow(path, "CartridgeError", reason))
        return None
    return FieldFile(patient, number, path, layout, shape, geometry.origin(number))
