"""The state keeps labelled cells and pool apart; the simulated labeller is stable."""

from __future__ import annotations

import numpy as np
import pytest

from ctc_ray.errors import ConfigError, RoleLeakError
from ctc_ray.hil.labellers import NO_CLASS, ByCellId, SimulatedLabeller
from ctc_ray.hil.loop import Trial, run_trial
from ctc_ray.hil.pools import Problem
from ctc_ray.hil.settings import LoopSettings
from ctc_ray.hil.state import LoopState
from ctc_ray.labels.labeller import SimulatedExpert


def _state(problem: Problem) -> LoopState:
    labelled = np.array([5, 2])
    return LoopState(
        problem.train.features, problem.train.clusters, labelled, problem.train.labels[labelled], np.array([9, 1, 7]), 3
    )


def test_with_labels_moves_cells_in_the_order_of_the_choice(problem: Problem) -> None:
    before = _state(problem)
    after = before.with_labels(np.array([7, 9]), np.array([1, 0], np.int8))
    assert after.labelled.tolist() == [5, 2, 7, 9]
    assert after.answers.tolist()[2:] == [1, 0]
    assert after.pool.tolist() == [1]
    assert (after.loop, before.loop, before.pool.tolist()) == (1, 0, [9, 1, 7])


def test_with_labels_cell_outside_the_pool_raises(problem: Problem) -> None:
    with pytest.raises(RoleLeakError, match="position 5"):
        _state(problem).with_labels(np.array([5]), np.array([1], np.int8))


def test_with_labels_repeated_cell_raises_unless_allowed(problem: Problem) -> None:
    chosen, answers = np.array([7, 7]), np.array([1, 1], np.int8)
    with pytest.raises(RoleLeakError, match="twice"):
        _state(problem).with_labels(chosen, answers)
    assert _state(problem).with_labels(chosen, answers, repeats=True).labelled.tolist() == [5, 2, 7, 7]


def test_state_pool_and_labelled_sharing_a_cell_raises(problem: Problem) -> None:
    with pytest.raises(RoleLeakError, match="position 2"):
        LoopState(
            problem.train.features, problem.train.clusters, np.array([2]), np.array([1], np.int8), np.array([2]), 0
        )


def test_simulated_labeller_flips_the_share_asked_for_and_answers_alike_twice() -> None:
    truth = np.tile(np.array([0, 1], np.int8), 5000)
    expert = SimulatedLabeller(truth, 0.1, seed=4)
    positions = np.random.default_rng(0).permutation(len(truth))
    answers = expert.answer(positions)
    assert np.mean(answers != truth[positions]) == pytest.approx(0.1, abs=0.01)
    assert np.array_equal(answers[::-1], expert.answer(positions[::-1]))
    assert np.array_equal(SimulatedLabeller(truth).answer(positions), truth[positions])


def test_with_labels_cell_without_a_class_leaves_the_pool_and_is_not_learnt_from(problem: Problem) -> None:
    after = _state(problem).with_labels(np.array([7, 9]), np.array([NO_CLASS, 0], np.int8))
    assert after.labelled.tolist() == [5, 2, 9]
    assert after.pool.tolist() == [1]


def test_by_cell_id_asks_the_cohorts_expert_by_name(problem: Problem) -> None:
    names = np.where(problem.train.labels == 1, "ctc", "artefact")
    names[4] = "unsure"
    truth = dict(zip(problem.train.cell_ids.tolist(), names.tolist(), strict=True))
    expert = ByCellId(SimulatedExpert(truth), problem.train.cell_ids)
    positions = np.array([9, 4, 30])
    expected = [problem.train.labels[9], NO_CLASS, problem.train.labels[30]]
    assert expert.answer(positions).tolist() == expected
    settings = LoopSettings(initial=200, per_loop=40, loops=1)  # all 240 cells are asked about
    rows = run_trial(problem, Trial("limited-global", "random", None, 1, 3), settings, expert)
    assert max(row["num_train"] for row in rows) == 239


def test_simulated_labeller_rate_above_one_raises() -> None:
    with pytest.raises(ConfigError, match=r"flip_rate = 1\.5"):
        SimulatedLabeller(np.zeros(3, np.int8), 1.5)
