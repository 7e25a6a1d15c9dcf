"""Training images and their masks: which files belong together, and which of them cannot be used."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tifffile
from scipy.ndimage import label
from skimage.io import imread

from ctc_ray.errors import CartridgeError, MissingInputError, SchemaError
from ctc_ray.records import FailureRow
from ctc_ray.segment.tiff_pages import check_tiff, read_page

TIFF_SUFFIXES = (".tif", ".tiff")
IMAGE_SUFFIXES = (".png", *TIFF_SUFFIXES)
CK_PAGE = 2
"""Page of CK in a CellSearch field. Source: `ctc_ray.config`, `segment.channel_map`."""


@dataclass(frozen=True)
class PairFiles:
    """Where an image and its mask lie; `name` is the image's stem."""

    name: str
    image: Path
    mask: Path


@dataclass(frozen=True)
class Pair:
    """One training image.

    Attributes:
        name: file stem.
        image: (H, W), any real dtype, not normalised.
        labels: (H, W) int32, 0 background.
        low: grey level that normalisation takes to 0 (1 % percentile).
        high: grey level that normalisation takes to 1 (99.8 % percentile).
    """

    name: str
    image: np.ndarray
    labels: npt.NDArray[np.int32]
    low: float
    high: float


def find_pairs(images: Path, masks: Path, *, mask_suffix: str = "_ck") -> list[PairFiles]:
    """List images and the masks that belong to them, sorted by name.

    Images lie in the folder itself; where it holds none, those of its sub-folders are taken, as in a folder of cartridges
    (hidden ones are left out). A mask has its image's stem, or that stem and `mask_suffix`, and is looked for alike.

    Args:
        images: folder of PNG or TIFF files.
        masks: folder with one label image (0 background) for each of them.
        mask_suffix: text between the image's stem and the mask's extension; `_ck` is what `ctc-ray phantom` writes.

    Raises:
        MissingInputError: a folder holds no images, or a mask is missing.
        SchemaError: two images, or two masks, have one name.
    """
    found, labelled = _by_stem(images), _by_stem(masks)
    if not found:
        raise MissingInputError(f"no images ({', '.join(IMAGE_SUFFIXES)}) in {images} or the folders in it")
    pairs, missing = [], []
    for stem, path in sorted(found.items()):
        mask = labelled.get(stem) or labelled.get(stem + mask_suffix)
        if mask is None:
            missing.append(stem)
        else:
            pairs.append(PairFiles(stem, path, mask))
    if missing:
        raise MissingInputError(
            f"{len(missing)} images of {images} have no mask in {masks}, for example {missing[0]!r}: a mask is named as "
            f"its image, or with {mask_suffix!r} behind (train_segmenter.mask_suffix)"
        )
    return pairs


def _by_stem(folder: Path) -> dict[str, Path]:
    paths = _images_of(folder.glob("*"), folder) or _images_of(folder.rglob("*"), folder)
    by_stem: dict[str, Path] = {}
    for path in paths:
        if path.stem in by_stem:
            raise SchemaError(f"{by_stem[path.stem]} and {path} have one name: rename or remove one of them")
        by_stem[path.stem] = path
    return by_stem


def _images_of(paths: Iterable[Path], folder: Path) -> list[Path]:
    return sorted(
        path
        for path in paths
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def read_pairs(images: Path, masks: Path) -> list[Pair]:
    """Read images and their masks, sorted by name; the first that cannot be used ends it.

    Args:
        images: as for `find_pairs`.
        masks: as for `find_pairs`.

    Raises:
        MissingInputError: as for `find_pairs`.
        SchemaError: as for `find_pairs`.
        CartridgeError: as for `read_pair`; a mask without objects is read.
    """
    return [read_pair(files, allow_empty=True) for files in find_pairs(images, masks)]


def read_usable_pairs(
    files: Sequence[PairFiles], *, page: int = CK_PAGE, allow_empty: bool = False
) -> tuple[list[tuple[PairFiles, Pair]], list[FailureRow]]:
    """Read what can be used, and say of the rest why it cannot.

    Args:
        files: from `find_pairs`.
        page: as for `read_pair`.
        allow_empty: as for `read_pair`.

    Returns:
        Usable pairs, and a row with its reason for each of the others; both in the order of `files`.
    """
    usable, failures = [], []
    for one in files:
        try:
            usable.append((one, read_pair(one, page=page, allow_empty=allow_empty)))
        except CartridgeError as error:
            failures.append(FailureRow(source=str(one.image), kind=type(error).__name__, message=str(error)))
    return usable, failures


def read_pair(files: PairFiles, *, page: int = CK_PAGE, allow_empty: bool = False) -> Pair:
    """Read one image and its mask.

    Args:
        files: where they lie.
        page: page of an image that has several, from 0; of the mask the first page is taken.
        allow_empty: whether a mask without objects says that there are none, rather than that somebody forgot them.

    Raises:
        CartridgeError: a file cannot be decoded; the image is no single channel, holds values that are not finite, or has
            no contrast; the mask has another shape, is no label image, or is empty.
    """
    image, mask = _decode(files.image, page), _decode(files.mask, 0)
    if image.ndim != 2:
        raise CartridgeError(f"{files.image} has shape {image.shape}; a training image has one channel, (H, W)")
    if image.shape != mask.shape:
        raise CartridgeError(f"{files.image} has shape {image.shape}, its mask {files.mask} {mask.shape}")
    low, high = _grey_levels(image, files.image)
    return Pair(files.name, image, _labels(mask, files.mask, allow_empty=allow_empty), low, high)


def _decode(path: Path, page: int) -> np.ndarray:
    try:
        data = path.read_bytes()
        if not data:
            raise CartridgeError(f"{path} is empty (0 bytes)")
        return _decode_tiff(data, str(path), page) if path.suffix.lower() in TIFF_SUFFIXES else _decode_png(data)
    except CartridgeError:
        raise
    except Exception as error:  # decoders of damaged files raise anything; one file must not end the training
        raise CartridgeError(f"{path} cannot be read as an image: {type(error).__name__}: {error}") from error


def _decode_png(data: bytes) -> np.ndarray:
    return np.asarray(imread(io.BytesIO(data)))


def _decode_tiff(data: bytes, path: str, page: int) -> np.ndarray:
    check_tiff(data, path)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        # No further than needed: the links of a damaged file may lead in a circle.
        pages = [one.aspage() for one in islice(file.pages, page + 1)]
        if page < len(pages):
            return read_page(pages[page], data, path)
        following = file.pages.next_page_offset
        if not pages or (following and any(data[following : following + 4])):
            raise CartridgeError(f"{path} is truncated: its {len(pages)} pages announce another that is not there")
        if len(pages) > 1:
            raise CartridgeError(f"{path} has {len(pages)} pages, and train_segmenter.page asks for {page} (from 0)")
        return read_page(pages[0], data, path)


def _grey_levels(image: np.ndarray, path: Path) -> tuple[float, float]:
    if np.iscomplexobj(image) or not np.issubdtype(image.dtype, np.number):
        raise CartridgeError(f"{path} holds {image.dtype} pixels; a training image has real numbers")
    if not np.isfinite(image).all():
        count = int((~np.isfinite(image)).sum())
        raise CartridgeError(f"{path} holds {count} pixels that are not finite (NaN or infinity)")
    low, high = np.percentile(image, [1.0, 99.8])
    if low >= high:
        raise CartridgeError(f"{path} has no contrast: its 1 and 99.8 percentiles both are {low:g}")
    return float(low), float(high)


def _labels(mask: np.ndarray, path: Path, *, allow_empty: bool) -> npt.NDArray[np.int32]:
    if not (np.issubdtype(mask.dtype, np.number) or mask.dtype == bool) or np.iscomplexobj(mask):
        raise CartridgeError(f"{path} holds {mask.dtype} pixels; a mask holds the number of the object, 0 elsewhere")
    labels = mask.astype(np.int32)
    if (labels != mask).any() or labels.min() < 0:
        raise CartridgeError(f"{path} is no label image: it holds values that are negative, not whole or too large")
    numbers = np.unique(labels[labels > 0])
    if not len(numbers) and not allow_empty:
        raise CartridgeError(
            f"{path} holds no object; if its image shows none, set train_segmenter.empty_masks=background"
        )
    pieces = int(label(labels > 0, structure=np.ones((3, 3)))[1]) if len(numbers) == 1 else 1
    if pieces > 1:
        raise CartridgeError(
            f"{path} marks {pieces} separate pieces with the one value {numbers[0]}: a mask needs a number for each object"
        )
    return labels
