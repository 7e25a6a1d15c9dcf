"""Embedding: a vector for every crop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctc_ray.embed.embedder import Embedder

__all__ = ["Embedder"]


def __getattr__(name: str) -> Any:
    """Import the embedder, and with it Torch and timm, when it is asked for: workers that only join files do without."""
    if name == "Embedder":
        from ctc_ray.embed.embedder import Embedder

        return Embedder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
