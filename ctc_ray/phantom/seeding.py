"""Random generators that depend on names, never on process, order or worker count."""

import hashlib

import numpy as np


def stable_hash(text: str) -> int:
    """64-bit integer of a text, equal in every process (Python's own `hash` is salted)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def generator(seed: int, *names: str | int) -> np.random.Generator:
    """A generator for one named purpose: the same seed and names give the same stream everywhere."""
    entropy = [seed, *(stable_hash(name) if isinstance(name, str) else name for name in names)]
    return np.random.default_rng(np.random.SeedSequence(entropy))
