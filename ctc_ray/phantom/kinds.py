"""The kinds of object on a phantom cartridge, and the named profiles that mix them.

A kind says only which distributions a cell is drawn from (`ctc_ray.phantom.population`); every kind goes through the same
cell model, optics and camera. Kinds overlap on purpose: the label follows from the kind, the difficulty from the overlap.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType


class CellKind(StrEnum):
    """What an object on the cartridge really is.

    Source: paper Figure 2 (populations of the latent clusters and artefacts).
    """

    CTC = "ctc"
    CTC_IN_DENSE_DAPI = "ctc_in_dense_dapi"
    LEUKOCYTE = "leukocyte"
    SHINE_THROUGH = "shine_through"
    POINT_EVENT = "point_event"
    SMEAR = "smear"
    DEBRIS = "debris"
    DOUBLE = "double"
    DENSE_DAPI_LEUKOCYTE = "dense_dapi_leukocyte"
    BACKGROUND_LEUKOCYTE = "background_leukocyte"

    @property
    def is_ctc(self) -> bool:
        """True for the kinds whose truth label is `ctc`."""
        return self in CTC_KINDS

    @property
    def is_dense(self) -> bool:
        """True for the kinds that lie among densely packed nuclei."""
        return self in DENSE_KINDS

    @property
    def code(self) -> int:
        """Position in `KINDS`: the integer that arrays of kinds hold."""
        return KINDS.index(self)


KINDS: tuple[CellKind, ...] = tuple(CellKind)
CTC_KINDS = frozenset({CellKind.CTC, CellKind.CTC_IN_DENSE_DAPI})
DENSE_KINDS = frozenset({CellKind.CTC_IN_DENSE_DAPI, CellKind.DENSE_DAPI_LEUKOCYTE})
CK_KINDS: tuple[CellKind, ...] = tuple(kind for kind in KINDS if kind is not CellKind.BACKGROUND_LEUKOCYTE)
"""Kinds that carry CK: what a segmentation of the CK page should find, and what 84 +- 15 a field counts."""


@dataclass(frozen=True)
class Profile:
    """How many objects of which kinds a cartridge holds.

    Attributes:
        name: the profile's name in configs and in `phantom.json`.
        num_fields: fields of a full cartridge, for the grid when none is given.
        ck_objects_mean: mean CK objects a field.
        ck_objects_sd: standard deviation of the CK objects a field.
        kind_weights: relative frequency of each kind among the CK objects; they need not sum to one.
        background_leukocytes: mean CK-negative leukocytes a field, outside dense regions.
        ctc_spread: standard deviation of the log of a patient's factor on the weights of the CTC kinds.
    """

    name: str
    num_fields: int
    ck_objects_mean: float = 84.0
    ck_objects_sd: float = 15.0
    kind_weights: Mapping[CellKind, float] = field(default_factory=dict)
    background_leukocytes: float = 320.0
    ctc_spread: float = 0.25

    def weights(self, ctc_factor: float = 1.0) -> list[float]:
        """Probabilities in the order of `CK_KINDS`, with the CTC kinds multiplied by `ctc_factor` first."""
        raw = [self.kind_weights.get(kind, 0.0) * (ctc_factor if kind.is_ctc else 1.0) for kind in CK_KINDS]
        total = sum(raw)
        return [weight / total for weight in raw]


_OTHERS = {
    CellKind.LEUKOCYTE: 0.55,
    CellKind.DENSE_DAPI_LEUKOCYTE: 0.11,
    CellKind.POINT_EVENT: 0.16,
    CellKind.DOUBLE: 0.08,
    CellKind.DEBRIS: 0.06,
    CellKind.SHINE_THROUGH: 0.015,
    CellKind.SMEAR: 0.025,
}


def _mix(ctc: float, ctc_in_dense: float) -> Mapping[CellKind, float]:
    rest = 1.0 - ctc - ctc_in_dense
    others = {kind: weight * rest for kind, weight in _OTHERS.items()}
    return {CellKind.CTC: ctc, CellKind.CTC_IN_DENSE_DAPI: ctc_in_dense, **others}


PROFILES: Mapping[str, Profile] = MappingProxyType(
    {
        # 175 fields of 84 CK objects are the 14,700 objects a patient of the paper; CTCs are 1-2 % of them.
        "paper": Profile(name="paper", num_fields=175, kind_weights=_mix(0.0145, 0.0013)),
        # The same cells, richer in CTCs, so that a few fields hold enough labels of both classes.
        "demo": Profile(name="demo", num_fields=6, kind_weights=_mix(0.20, 0.02), ctc_spread=0.15),
    }
)
