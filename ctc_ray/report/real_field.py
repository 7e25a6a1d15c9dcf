"""A real fluorescence field with its instances and its score, as the report shows it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class RealField:
    """One real image that went through segmentation."""

    image: npt.NDArray[np.float32]
    """(H, W) intensities as read."""
    labels: npt.NDArray[np.int32]
    """(H, W) instances found; 0 is background."""
    average_precision_50: float
    """AP at IoU 0.5: TP / (TP + FP + FN), as StarDist's `matching` gives it."""
    num_true: int
    """Instances of the expert's mask."""
    num_found: int
    """Cells that the segment stage wrote for this field."""
    source: str
    """Where the image and its mask come from."""
