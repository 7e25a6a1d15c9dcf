"""Signs of collapse."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from ctc_ray.pretrain.monitor import PATIENCE_STEPS, CollapseMonitor, StepMetrics, effective_rank, measure
from ctc_ray.pretrain.settings import MARKER


def test_effective_rank_counts_equal_directions() -> None:
    features = torch.cat([torch.eye(4), -torch.eye(4)])
    assert effective_rank(features) == pytest.approx(4.0, abs=1e-4)


def test_effective_rank_of_one_direction_is_one_and_of_equal_rows_zero() -> None:
    line = torch.linspace(-1, 1, 9)[:, None] * torch.ones(1, 5)
    assert effective_rank(line) == pytest.approx(1.0, abs=1e-3)
    assert effective_rank(torch.ones(6, 5)) == 0.0


@pytest.mark.parametrize(
    ("probabilities", "entropy", "marginal"),
    [
        (torch.full((2, 4, 8), 1 / 8), math.log(8), math.log(8)),
        (torch.nn.functional.one_hot(torch.zeros(2, 4, dtype=torch.long), 8).float(), 0.0, 0.0),
        (torch.nn.functional.one_hot(torch.arange(8).view(2, 4), 8).float(), 0.0, math.log(8)),
    ],
)
def test_measures_tell_the_two_kinds_of_collapse_apart(
    probabilities: torch.Tensor, entropy: float, marginal: float
) -> None:
    row = measure(
        step=1,
        loss=1.0,
        values=MARKER.schedules().at(0),
        gradient_norm=1.0,
        probabilities_TBK=probabilities,
        centre_K=torch.ones(9),
        features_BD=torch.eye(4),
        num_crops=4,
        seconds=2.0,
    )
    assert row.teacher_entropy == pytest.approx(entropy, abs=1e-5)
    assert row.marginal_entropy == pytest.approx(marginal, abs=1e-5)
    assert row.centre_norm == pytest.approx(3.0)
    assert row.crops_per_second == 2.0
    assert row.to_json()["step"] == 1


def row(probabilities_TBK: torch.Tensor, features_BD: torch.Tensor) -> StepMetrics:
    return measure(
        step=1,
        loss=1.0,
        values=MARKER.schedules().at(0),
        gradient_norm=1.0,
        probabilities_TBK=probabilities_TBK,
        centre_K=torch.ones(8),
        features_BD=features_BD,
        num_crops=4,
        seconds=2.0,
    )


NUM_PROTOTYPES = 8
ONE_EACH = torch.nn.functional.one_hot(torch.arange(8).view(2, 4), NUM_PROTOTYPES).float()
HEALTHY = row(ONE_EACH, torch.eye(8))
COLLAPSED = {
    "features": row(ONE_EACH, torch.linspace(-1, 1, 8)[:, None] * torch.ones(1, 5)),
    "one-hot": row(torch.nn.functional.one_hot(torch.full((2, 4), 3), NUM_PROTOTYPES).float(), torch.eye(8)),
    "uniform": row(torch.full((2, 4, NUM_PROTOTYPES), 1 / NUM_PROTOTYPES), torch.eye(8)),
}


@pytest.mark.parametrize("kind", COLLAPSED)
def test_collapse_is_called_after_patience_and_warned_of_once(kind: str) -> None:
    monitor = CollapseMonitor(NUM_PROTOTYPES)
    seen = [monitor.see(replace(COLLAPSED[kind], step=step)) for step in range(1, PATIENCE_STEPS + 10)]
    assert [found for found, _ in seen] == [None] * (PATIENCE_STEPS - 1) + [kind] * 10
    warnings = [warning for _, warning in seen if warning is not None]
    assert len(warnings) == 1
    assert f"at step {PATIENCE_STEPS} " in warnings[0]


@pytest.mark.parametrize("kind", COLLAPSED)
def test_single_good_step_ends_a_streak(kind: str) -> None:
    monitor = CollapseMonitor(NUM_PROTOTYPES)
    rows = [*[COLLAPSED[kind]] * (PATIENCE_STEPS - 1), HEALTHY, *[COLLAPSED[kind]] * (PATIENCE_STEPS - 1)]
    assert {monitor.see(one) for one in rows} == {(None, None)}


def test_uniform_teacher_is_no_collapse_in_the_first_steps() -> None:
    monitor = CollapseMonitor(NUM_PROTOTYPES, grace_steps=100)
    found = [monitor.see(replace(COLLAPSED["uniform"], step=step))[0] for step in range(1, 200)]
    assert found.index("uniform") == 100 + PATIENCE_STEPS - 1
    again = CollapseMonitor(NUM_PROTOTYPES, grace_steps=100)
    assert [again.see(replace(COLLAPSED["one-hot"], step=step))[0] for step in range(1, 200)].index("one-hot") == (
        PATIENCE_STEPS - 1
    )
