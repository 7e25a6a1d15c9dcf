"""From a crop of any size and number type to counts of 48 x 48, by rules that have names.

Shape letters: C channels, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ctc_ray.config import ResizeRule
from ctc_ray.errors import SchemaError
from ctc_ray.schema import CROP_SIZE_PX

_PAD_MODES = {"pad-zero": "constant", "pad-edge": "edge", "pad-reflect": "reflect"}


@dataclass(frozen=True)
class CountsRule:
    """How the numbers of a source become stored counts.

    Attributes:
        dtype: `uint8` or `uint16`, of every crop of the import.
        maximum: highest count that is accepted.
        float_maximum: value of a floating-point image that becomes `maximum`; None refuses such images.
        any_integer: whether int32 and the like are taken where their values fit (the bits were named); uint8 among uint16,
            or the reverse, never is.
    """

    dtype: str
    maximum: int
    float_maximum: float | None = None
    any_integer: bool = False


def to_counts(crop: npt.NDArray[Any], rule: CountsRule) -> npt.NDArray[Any]:
    """Turn a crop into counts, without rescaling integers.

    Args:
        crop: (C, H, W), any dtype.
        rule: of the import.

    Returns:
        (C, H, W) of the rule's dtype.

    Raises:
        SchemaError: a dtype that the rule refuses, a value that is not finite, or one outside 0 to the rule's maximum.
    """
    if crop.dtype.kind == "f":
        return _floats_to_counts(crop, rule)
    stored_otherwise = str(crop.dtype) in ("uint8", "uint16")  # a dim 16-bit crop would fit into 8 bits by accident
    if crop.dtype != rule.dtype and (stored_otherwise or not rule.any_integer or crop.dtype.kind not in "iu"):
        raise SchemaError(f"pixels are {crop.dtype} in an import of {rule.dtype}: their counts would not be comparable")
    low, high = int(crop.min(initial=0)), int(crop.max(initial=0))
    if low < 0 or high > rule.maximum:
        raise SchemaError(
            f"counts go from {low} to {high}, outside 0 to {rule.maximum}: name the right import_crops.bits"
        )
    return crop.astype(rule.dtype, copy=False)


def _floats_to_counts(crop: npt.NDArray[Any], rule: CountsRule) -> npt.NDArray[Any]:
    if rule.float_maximum is None:
        raise SchemaError(f"pixels are {crop.dtype}: set import_crops.float_maximum and bits to say what they mean")
    bad = int(np.count_nonzero(~np.isfinite(crop)))
    if bad:
        raise SchemaError(f"{bad} of {crop.size} pixels are not finite (NaN or infinite)")
    low, high = float(crop.min(initial=0)), float(crop.max(initial=0))
    if low < 0 or high > rule.float_maximum:
        raise SchemaError(f"values go from {low:g} to {high:g}, outside 0 to float_maximum = {rule.float_maximum:g}")
    return np.rint(crop.astype(np.float64) * (rule.maximum / rule.float_maximum)).astype(rule.dtype)


def fit_crop(crop: npt.NDArray[Any], rules: Sequence[ResizeRule]) -> npt.NDArray[Any]:
    """Bring a crop to 48 x 48 by named rules, one after the other.

    `exact` changes nothing. `crop-centre` cuts sides above 48, `pad-zero`, `pad-edge` and `pad-reflect` fill sides below 48;
    what cannot be split evenly falls to the bottom and right. `bilinear` resamples a square crop (with antialiasing where it
    shrinks), which changes the scale of the image.

    Args:
        crop: (C, H, W) uint8 or uint16.
        rules: names, in order.

    Returns:
        (C, 48, 48) of the same dtype.

    Raises:
        SchemaError: after the last rule a side is not 48, or a crop to resample is not square.

    Source: departure from the reference, which resamples every crop to 224 when it embeds.
    """
    given = crop.shape[1:]
    if min(given) < 1:
        raise SchemaError(f"the crop is {given[0]} x {given[1]} px: it has no pixel")
    for rule in rules:
        if rule == "crop-centre":
            crop = _cut_centre(crop)
        elif rule == "bilinear":
            crop = _resample(crop)
        elif rule != "exact":
            crop = _pad(crop, _PAD_MODES[rule])
    if crop.shape[1:] != (CROP_SIZE_PX, CROP_SIZE_PX):
        raise SchemaError(
            f"the crop is {given[0]} x {given[1]} px, and import_crops.resize = {', '.join(rules)} does not make it "
            f"{CROP_SIZE_PX} x {CROP_SIZE_PX}"
        )
    return np.ascontiguousarray(crop)


def _cut_centre(crop: npt.NDArray[Any]) -> npt.NDArray[Any]:
    top, left = (max(0, side - CROP_SIZE_PX) // 2 for side in crop.shape[1:])
    return crop[:, top : top + CROP_SIZE_PX, left : left + CROP_SIZE_PX]


def _pad(crop: npt.NDArray[Any], mode: str) -> npt.NDArray[Any]:
    lacking = [max(0, CROP_SIZE_PX - side) for side in crop.shape[1:]]
    widths = [(0, 0), *((lack // 2, lack - lack // 2) for lack in lacking)]
    padded: npt.NDArray[Any] = np.pad(crop, widths, mode=mode)  # type: ignore[call-overload]  # its types name each mode
    return padded


def _resample(crop: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if crop.shape[1] != crop.shape[2]:
        raise SchemaError(
            f"the crop is {crop.shape[1]} x {crop.shape[2]} px: bilinear would distort what is not square; cut or pad it"
        )
    if crop.shape[1] == CROP_SIZE_PX:
        return crop
    size = (CROP_SIZE_PX, CROP_SIZE_PX)
    planes = [Image.fromarray(plane.astype(np.float32)).resize(size, Image.Resampling.BILINEAR) for plane in crop]
    scaled = np.stack([np.asarray(plane) for plane in planes])
    rounded: npt.NDArray[Any] = np.clip(np.rint(scaled), 0, np.iinfo(crop.dtype).max).astype(crop.dtype)
    return rounded
