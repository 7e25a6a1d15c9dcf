"""Parameters of many cells at once: one array per parameter, drawn first, rendered later.

Legend: N objects, K nuclear lobes, M map kinds, T texture nodes a side.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

NUM_LOBES = 14
"""Lobes an object's nucleus (or the chain of a ribbon) may have; unused ones have weight zero."""
NUM_TEXTURES = 4
"""Texture maps an object: outline, CK, DAPI, CD45."""
TEXTURE_NODES = 12


@dataclass(frozen=True)
class Objects:
    """N objects and everything that decides how they look; what is random about a cell is drawn here, once.

    A cell seen in two fields is rendered twice from the same row, so both views show the same cell. Positions are (row,
    column) in pixels of the tile or crop. Signals are peak counts of a 12-bit camera before blur.

    Attributes:
        kind: (N,) int8 codes into `KINDS`.
        row, col: (N,) centre of the body, px.
        radius_px: (N,) half of the diameter of the body.
        diameter_um: (N,) equivalent diameter.
        axis_ratio: (N,) long over short axis of the body.
        angle: (N,) direction of the long axis, radians.
        irregularity: (N,) strength of the outline's waviness.
        lobe_rows, lobe_cols, lobe_weights: (N, K) nuclear lobes (or the chain of a ribbon), px from the centre.
        lobe_radius_px: (N,) radius of one lobe.
        ribbon: (N,) bool, the body follows the chain of lobes (smears, fibres) instead of the ellipse.
        dapi, ck, cd45: (N,) peak signal, counts.
        haze: (N, 3) autofluorescence of the body in DAPI, CK and CD45, counts.
        dapi_texture, ck_grain: (N,) relative granularity.
        ck_ring, cd45_ring: (N,) fraction of the signal in the shell of the body, 0 to 1.
        ck_polarity: (N,) relative gradient of CK across the body, along `angle`.
        ck_exclusion: (N,) fraction of CK that the nucleus displaces, 0 to 1.
        defocus_px: (N,) extra blur of this object, standard deviation.
        textures: (N, M, T, T) unit normal nodes of the texture maps.
    """

    kind: npt.NDArray[np.int8]
    row: FloatArray
    col: FloatArray
    radius_px: FloatArray
    diameter_um: FloatArray
    axis_ratio: FloatArray
    angle: FloatArray
    irregularity: FloatArray
    lobe_rows: FloatArray
    lobe_cols: FloatArray
    lobe_weights: FloatArray
    lobe_radius_px: FloatArray
    ribbon: npt.NDArray[np.bool_]
    dapi: FloatArray
    ck: FloatArray
    cd45: FloatArray
    haze: FloatArray
    dapi_texture: FloatArray
    ck_grain: FloatArray
    ck_ring: FloatArray
    cd45_ring: FloatArray
    ck_polarity: FloatArray
    ck_exclusion: FloatArray
    defocus_px: FloatArray
    textures: FloatArray

    def __len__(self) -> int:
        return len(self.kind)

    def take(self, index: npt.NDArray[np.intp] | npt.NDArray[np.bool_] | slice) -> "Objects":
        """The chosen rows, by index or mask."""
        return Objects(**{item.name: getattr(self, item.name)[index] for item in fields(self)})

    def moved(self, row: FloatArray, col: FloatArray) -> "Objects":
        """The same objects at other positions."""
        return replace(self, row=row.astype(np.float32), col=col.astype(np.float32))

    def shifted(self, down_px: float, right_px: float) -> "Objects":
        """The same objects in a frame whose origin lies `down_px`, `right_px` further up and left."""
        return self.moved(self.row + np.float32(down_px), self.col + np.float32(right_px))

    def reach_px(self) -> FloatArray:
        """(N,) distance from the centre beyond which an object is dark, blur included."""
        body = np.where(self.ribbon, 0.0, self.radius_px * np.sqrt(self.axis_ratio) * (1.0 + 0.5 * self.irregularity))
        lobes = np.hypot(self.lobe_rows, self.lobe_cols) * (self.lobe_weights > 0)
        nucleus = lobes.max(axis=1) + 1.3 * self.lobe_radius_px
        blur = 3.0 * np.sqrt(self.defocus_px**2 + 1.0)
        return np.asarray(np.maximum(body, nucleus) + blur, dtype=np.float32)


def concatenate(parts: Sequence[Objects]) -> Objects:
    """All objects of the parts, in order.

    Raises:
        ValueError: there is no part.
    """
    if not parts:
        raise ValueError("no objects to concatenate: give at least one (empty ones are allowed)")
    return Objects(
        **{item.name: np.concatenate([getattr(part, item.name) for part in parts]) for item in fields(Objects)}
    )
