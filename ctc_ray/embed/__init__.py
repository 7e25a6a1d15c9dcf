"""Embedding: a vector for every crop."""

from ctc_ray.embed.embedder import Embedder

__all__ = ["Embedder"]
