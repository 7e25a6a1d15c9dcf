"""Cells from cartridge fields: StarDist in torch, crops, duplicates, training."""

from ctc_ray.segment.instances import Candidates, Instances
from ctc_ray.segment.model import StarDist

__all__ = ["Candidates", "Instances", "StarDist"]
