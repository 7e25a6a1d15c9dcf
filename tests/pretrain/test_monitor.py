"""Signs of collapse."""

from __future__ import annotations

import math

import pytest
import torch

from ctc_ray.pretrain.monitor import effective_rank, measure
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
