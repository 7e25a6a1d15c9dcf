"""Schedules are functions of the step, used before its update."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from ctc_ray.errors import ConfigError
from ctc_ray.pretrain.schedules import Schedules, cosine, warmup_cosine
from ctc_ray.pretrain.settings import MARKER, PAPER


def test_warmup_cosine_rises_then_falls_to_end() -> None:
    values = [warmup_cosine(s, peak=1.0, end=0.1, warmup_steps=10, num_steps=100) for s in range(101)]
    assert values[0] == pytest.approx(0.1)
    assert values[9] == 1.0
    assert all(a < b for a, b in itertools.pairwise(values[:10]))
    assert all(a >= b for a, b in itertools.pairwise(values[9:]))
    assert values[100] == pytest.approx(0.1)


def test_cosine_halfway_is_mean_of_ends() -> None:
    assert cosine(50, start=3.0, end=1.0, num_steps=100) == pytest.approx(2.0)
    assert cosine(500, start=3.0, end=1.0, num_steps=100) == 1.0


def test_first_step_trains_at_warmup_rate_and_not_at_peak() -> None:
    schedules = replace(MARKER, steps=100).schedules()
    assert 0 < schedules.at(0).learning_rate <= MARKER.learning_rate / 10 + 1e-12


def test_paper_preset_gives_reference_values_in_effect() -> None:
    schedules = PAPER.schedules()
    assert schedules.num_steps == 1_951_500
    assert schedules.warmup_steps == 15_612
    last = schedules.at(29_999)
    assert last.learning_rate == pytest.approx(9.999e-4, rel=1e-4)
    assert last.weight_decay == pytest.approx(0.0402, abs=1e-4)
    assert last.teacher_momentum == 0.995
    assert last.teacher_temperature == 0.04
    assert not schedules.at(7_805).train_last_layer
    assert schedules.at(7_806).train_last_layer


def test_shorter_paper_run_scales_its_schedules() -> None:
    schedules = replace(PAPER, steps=300).schedules()
    assert schedules.warmup_steps == 156
    assert schedules.freeze_last_layer_steps == 78
    assert schedules.at(299).learning_rate > 0.99e-3


def test_marker_momentum_ends_at_one() -> None:
    schedules = replace(MARKER, steps=50).schedules()
    assert schedules.at(0).teacher_momentum == pytest.approx(0.99)
    assert schedules.at(50).teacher_momentum == 1.0
    assert math.isclose(schedules.at(0).teacher_temperature, 0.04)


def test_warmup_longer_than_schedule_raises_config_error() -> None:
    schedules = MARKER.schedules()
    with pytest.raises(ConfigError, match="warm-up"):
        Schedules(**{**schedules.__dict__, "warmup_steps": 5000, "num_steps": 100})
