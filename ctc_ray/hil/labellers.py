"""Who answers for a chosen cell: the loop asks any labeller in the same way, a simulated one or a person."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from ctc_ray.errors import ConfigError
from ctc_ray.hil.pools import Ints, Labels
from ctc_ray.labels.consensus import CLASS_OF_LABEL
from ctc_ray.labels.labeller import Labeller as CellLabeller

NO_CLASS = -1
"""Answer for a cell that the expert is unsure of: it leaves the pool and is not learnt from."""


class Labeller(Protocol):
    """Answers for cells of the training set."""

    def answer(self, positions: Ints) -> Labels:
        """Label cells.

        Args:
            positions: (K,) positions in the training set, in the order in which they are shown.

        Returns:
            (K,) int8, 1 CTC, 0 not, -1 (`NO_CLASS`) where the expert cannot tell, in the same order.
        """
        ...


class SimulatedLabeller:
    """Answers with the known label, wrong for a fixed, seeded share of the cells.

    A cell that is asked twice gets the same answer, whichever strategy asks: strategies differ by what they choose alone.

    Args:
        truth: (N,) int8 true labels of the training set.
        flip_rate: chance that a cell's answer is wrong, 0 to 1.
        seed: seed of the choice of these cells.

    Raises:
        ConfigError: the rate is outside 0 to 1.
    """

    def __init__(self, truth: Labels, flip_rate: float = 0.0, seed: int = 0) -> None:
        if not 0.0 <= flip_rate <= 1.0:
            raise ConfigError(f"hil.flip_rate = {flip_rate} is no share: give a number from 0 to 1")
        flipped = np.random.default_rng([seed, 0x666C6970]).random(len(truth)) < flip_rate
        self._answers: Labels = np.where(flipped, 1 - truth, truth).astype(np.int8)

    def answer(self, positions: Ints) -> Labels:
        """Label cells; see `Labeller.answer`."""
        return self._answers[positions]


class ByCellId:
    """Asks a labeller of the cohort, who knows cells by id and answers with label names.

    Args:
        labeller: anyone with `label(cell_ids)`, for example the simulated expert of `ctc_ray.labels`.
        cell_ids: (N,) ids of the training set.
    """

    def __init__(self, labeller: CellLabeller, cell_ids: npt.NDArray[np.str_]) -> None:
        self._labeller = labeller
        self._cell_ids = cell_ids

    def answer(self, positions: Ints) -> Labels:
        """Label cells; `unsure` has no class. See `Labeller.answer`."""
        names = self._labeller.label([str(name) for name in self._cell_ids[positions]])
        return np.array([CLASS_OF_LABEL.get(name, NO_CLASS) for name in names], dtype=np.int8)
