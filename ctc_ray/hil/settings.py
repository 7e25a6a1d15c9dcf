"""Numbers of a simulated experiment, and the situation before its first loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from ctc_ray.config import FaultName
from ctc_ray.errors import ConfigError
from ctc_ray.hil.pools import Ints

Mode = Literal["faithful", "corrected"]
PAPER_SEEDS = (164, 29, 7, 190, 71)
"""Source: reference implementation (five numbers drawn from 1 to 199 with seed 42)."""

FAULTS: Final[dict[FaultName, str]] = {
    "short-cluster": "cluster-f1 fills the quota of a cluster that is too small from the one listed after the lowest; cells repeat",
    "rounding": "cluster-f1 gives the whole difference of rounded quotas to the lowest cluster",
    "unscored-clusters": "cluster-f1 never draws from a cluster without a score, and stops where every F1 is 1",
    "undefined-is-zero": "undefined scores are 0, the F1 of a cluster with non-CTC labels and predictions only is 1",
    "reseeding": "the start, random and cluster-f1 draw with one generator, seeded anew before every draw",
    "monte-carlo": "clusters are scored by Monte-Carlo splits of the labelled cells though there are validation patients",
    "test-target": "rare-positive chooses region and class by the test set",
    "fixed-target": "rare-positive keeps the region and the class of the first loop",
    "first-predictions": "rare-positive keeps the predictions of the first classifier for the cells to look at",
}
"""What each fault of the reference does. The last three are of `rare-positive` alone."""


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
        faults: faults of the reference that corrected mode leaves in, names of `FAULTS`; faithful mode has all of them.

    Raises:
        ConfigError: an unknown fault, or faults in faithful mode.
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
    faults: tuple[FaultName, ...] = ()

    def __post_init__(self) -> None:
        unknown = [name for name in self.faults if name not in FAULTS]
        if unknown:
            raise ConfigError(f"no fault {unknown[0]!r}: known are {', '.join(FAULTS)}")
        if self.mode == "faithful" and self.faults:
            raise ConfigError(
                f"faithful mode has every fault: leave out {', '.join(self.faults)}, or choose corrected mode"
            )

    def keeps(self, fault: FaultName) -> bool:
        """Whether a fault of the reference is left in."""
        return self.mode == "faithful" or fault in self.faults


@dataclass(frozen=True)
class Target:
    """What one loop of `rare-positive` looks for.

    Attributes:
        cluster: strategies choose inside it; None: everywhere.
        finds: class that is learnt from, 1 CTC or 0; cells that the classifier gives the other class are looked at.
        quota: cells of that class to find, however many must be looked at; None: as many looks as the loop has cells to draw.
    """

    cluster: int | None
    finds: int
    quota: int | None = None


@dataclass(frozen=True)
class Search:
    """How `rare-positive` comes to its targets.

    Attributes:
        everywhere: the random arm: it looks in all clusters for what `cluster-f1` found with the same seed.
        main_cluster: the region, where it is given; None: the weakest cluster.
        planned: targets of the loops, None for one that looks at nothing; without them each is chosen before its loop.
    """

    everywhere: bool = False
    main_cluster: int | None = None
    planned: tuple[Target | None, ...] | None = None


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
