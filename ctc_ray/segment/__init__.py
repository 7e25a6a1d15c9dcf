"""Cells from cartridge fields: StarDist in torch, crops, duplicates, training."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctc_ray.segment.instances import Candidates, Instances
    from ctc_ray.segment.model import StarDist

__all__ = ["Candidates", "Instances", "StarDist"]


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that processes that only read fields do not load torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "model" if name == "StarDist" else "instances"
    return getattr(import_module(f"{__name__}.{home}"), name)
