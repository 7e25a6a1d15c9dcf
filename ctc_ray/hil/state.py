"""The frozen state of a human-in-the-loop run: which cells are labelled, which can still be drawn."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from ctc_ray.errors import ConfigError, RoleLeakError
from ctc_ray.hil.pools import Floats, Ints, Labels
from ctc_ray.hil.scores import Score
from ctc_ray.hil.svm import Classifier


@dataclass(frozen=True, eq=False)
class LoopState:
    """One moment of a run; a step makes a new state.

    Positions are rows of the training set, so that nothing here holds pixels or ids.

    Attributes:
        features: (N, D) float64 of the whole training set.
        clusters: (N,) int64 as the scenario sees them.
        labelled: (L,) int64 positions in the order of labelling.
        answers: (L,) int8 what the labeller said of them.
        pool: (P,) int64 positions that can be drawn, in a fixed order; none of them is labelled.
        seed: seed of the run.
        loop: 0 before the first draw.
        num_viewed: cells that the labeller has been asked about since the start, those without a class too.
        count: cells to choose now.
        classifier: fitted on the labelled cells; None before it is.
        cluster_scores: estimate per cluster for strategies that ask for it; empty otherwise.
    """

    features: Floats
    clusters: Ints
    labelled: Ints
    answers: Labels
    pool: Ints
    seed: int
    loop: int = 0
    num_viewed: int = 0
    count: int = 0
    classifier: Classifier | None = None
    cluster_scores: dict[int, Score] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that labelled cells and pool are disjoint.

        Raises:
            RoleLeakError: a cell is in both, or twice in the pool.
            ConfigError: labels and answers differ in number.
        """
        if len(self.labelled) != len(self.answers):
            raise ConfigError(f"{len(self.answers)} answers for {len(self.labelled)} labelled cells: give one each")
        if len(np.unique(self.pool)) != len(self.pool):
            raise RoleLeakError(f"loop {self.loop}: the pool lists a cell twice")
        shared = np.intersect1d(self.pool, self.labelled)
        if len(shared):
            raise RoleLeakError(
                f"loop {self.loop}: {len(shared)} cells are both labelled and in the pool, the first at position {shared[0]}"
            )

    def with_evidence(self, classifier: Classifier, cluster_scores: dict[int, Score], count: int) -> LoopState:
        """The same moment with what a strategy may look at, and how many cells it shall choose."""
        return dataclasses.replace(self, classifier=classifier, cluster_scores=cluster_scores, count=count)

    def with_labels(self, chosen: Ints, answers: Labels, *, repeats: bool = False) -> LoopState:
        """The next moment: chosen cells leave the pool and join the labelled ones, in the order of the choice.

        Args:
            chosen: (K,) positions, all in the pool.
            answers: (K,) what the labeller said; a cell without a class (below zero) leaves the pool and is not learnt from.
            repeats: whether a cell may be chosen twice (fault `short-cluster` of the reference).

        Raises:
            RoleLeakError: a chosen cell is not in the pool, or is chosen twice.
        """
        stray = np.setdiff1d(chosen, self.pool)
        if len(stray):
            raise RoleLeakError(f"loop {self.loop}: the strategy chose position {stray[0]}, which is not in the pool")
        if not repeats and len(np.unique(chosen)) != len(chosen):
            raise RoleLeakError(f"loop {self.loop}: the strategy chose a cell twice")
        known = answers >= 0
        return dataclasses.replace(
            self,
            labelled=np.concatenate([self.labelled, chosen[known]]),
            answers=np.concatenate([self.answers, answers[known]]).astype(np.int8),
            pool=self.pool[~np.isin(self.pool, chosen)],
            loop=self.loop + 1,
            num_viewed=self.num_viewed + len(chosen),
            count=0,
            classifier=None,
            cluster_scores={},
        )
