"""Numbers of a simulated experiment, and the situation before its first loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ctc_ray.hil.pools import Ints

Mode = Literal["faithful", "corrected"]
PAPER_SEEDS = (164, 29, 7, 190, 71)
"""Source: reference implementation (five numbers drawn from 1 to 199 with seed 42)."""


@dataclass(frozen=True)
class LoopSettings:
    """Numbers of a simulated experiment.

    Attributes:
        mode: `faithful` repeats the reference draw for draw, `corrected` mends its faults.
        initial: labels before the first loop (limited-global).
        per_loop: labels a loop (limited-global).
        loops: loops.
        mc_splits: Monte-Carlo splits that score the clusters.
        flip_rate: share of wrong answers of the simulated labeller.
        held_back: share of the training cells that `rare-positive` hides at the start, to be found again.
        seconds_per_cell: what a look at a cell takes the expert.
        budget_s: what the expert spends in a loop of `rare-positive`.
    """

    mode: Mode = "corrected"
    initial: int = 100
    per_loop: int = 100
    loops: int = 4
    mc_splits: int = 100
    flip_rate: float = 0.0
    held_back: float = 0.5
    seconds_per_cell: float = 3.0
    budget_s: float = 300.0


@dataclass(frozen=True)
class Search:
    """What `rare-positive` looks for.

    Attributes:
        cluster: the weakest; strategies choose inside it. None: everywhere.
        finds: class that is learnt from, 1 CTC or 0; cells that the classifier gives the other class are looked at.
        quotas: cells of that class to find in each loop, however many must be looked at; None: as many looks as `counts` says.
    """

    cluster: int | None
    finds: int
    quotas: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class Start:
    """The situation before the first loop.

    Attributes:
        clusters: (N,) clusters of the training set as this scenario sees them.
        labelled: (L,) positions that are labelled, in order.
        pool: (P,) positions that can be drawn, in order.
        counts: cells to draw in each loop.
        within_pool: name of the strategy that chooses inside this pool.
        search: what is looked for, and alone learnt from; None: every answer is learnt from.
    """

    clusters: Ints
    labelled: Ints
    pool: Ints
    counts: tuple[int, ...]
    within_pool: str
    search: Search | None = None
