"""Who answers: the protocol that the simulated expert and the gallery's reader share."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Protocol

from ctc_ray.errors import LabelError


class Labeller(Protocol):
    """Answers about cells."""

    def label(self, cell_ids: Sequence[str]) -> list[str]:
        """Give one of `LABELS` for each cell, in the order asked."""
        ...


class SimulatedExpert:
    """Answers from the truth, with a share of flipped answers.

    Args:
        truth: cell_id -> label.
        error_rate: share of cells whose answer is flipped between `ctc` and not `ctc`.
        seed: which cells these are; a cell is always answered alike, whenever and with whatever others it is asked.
    """

    def __init__(self, truth: Mapping[str, str], *, error_rate: float = 0.0, seed: int = 42) -> None:
        self._truth = dict(truth)
        self._error_rate = error_rate
        self._seed = seed

    def __len__(self) -> int:
        return len(self._truth)

    def label(self, cell_ids: Sequence[str]) -> list[str]:
        """Answer, in the order asked.

        Raises:
            LabelError: a cell is unknown to the expert.
        """
        unknown = [name for name in cell_ids if name not in self._truth]
        if unknown:
            raise LabelError(
                f"the simulated expert has no truth for {len(unknown)} of {len(cell_ids)} cells, the first {unknown[0]}: "
                "ask only about patients of its truth table"
            )
        return [self._answer(name) for name in cell_ids]

    def _answer(self, name: str) -> str:
        label = self._truth[name]
        if unit_hash(self._seed, "error", name) >= self._error_rate:
            return label
        return "non_ctc" if label == "ctc" else "ctc"


def unit_hash(seed: int, purpose: str, name: str) -> float:
    """Number in [0, 1) that depends on seed, purpose and name alone: a draw that does not know of row order."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
