"""A real fluorescence field with its instances, as the report shows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from ctc_ray.errors import SchemaError
from ctc_ray.records import digest_of


@dataclass(frozen=True)
class RealField:
    """One image with the instances that segmentation found, and how well they agree with a reference mask.

    Attributes:
        image: (H, W) any real dtype, counts.
        labels: (H, W) integer; 0 is background, n >= 1 is instance n.
        average_precision_50: true positives over all true, found and missed instances at IoU 0.5; 0 to 1.
        num_true: instances of the reference mask.
        num_found: instances that the segmentation stage found.
        source: where image and mask come from, in words.

    Raises:
        SchemaError: image and labels differ in shape, or are not two-dimensional.
    """

    image: npt.NDArray[Any]
    labels: npt.NDArray[Any]
    average_precision_50: float
    num_true: int
    num_found: int
    source: str

    def __post_init__(self) -> None:
        if self.image.ndim != 2 or self.image.shape != self.labels.shape:
            raise SchemaError(
                f"a real field needs image and labels of one shape (H, W), not {self.image.shape} and {self.labels.shape}"
            )

    def digest(self) -> str:
        """Digest of pixels, instances and scores."""
        scores = [self.average_precision_50, self.num_true, self.num_found, self.source]
        return digest_of([digest_of(self.image.tobytes()), digest_of(self.labels.tobytes()), *scores])
