"""Seeded synthetic cartridges: cells, optics, fields in the CellSearch layout, and the truth about them."""

from ctc_ray.phantom.crops import draw_crops
from ctc_ray.phantom.fields import PhantomField, draw_field
from ctc_ray.phantom.kinds import PROFILES, CellKind, Profile
from ctc_ray.phantom.write import PhantomResult, write_phantom

__all__ = [
    "PROFILES",
    "CellKind",
    "PhantomField",
    "PhantomResult",
    "Profile",
    "draw_crops",
    "draw_field",
    "write_phantom",
]
