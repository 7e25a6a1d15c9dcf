"""Schedules are functions of the step, used before its update."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ctc_ray.errors import ConfigError
from ctc_ray.pretrain.schedules import Schedules, cosine, linear_then_constant, warmup_cosine
from ctc_ray.pretrain.settings import MARKER, PAPER, DinoSettings


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


RATES = st.floats(1e-6, 1.0)
LENGTHS = st.integers(1, 400)


@given(start=RATES, end=RATES, num_steps=LENGTHS, step=st.integers(0, 500))
@settings(max_examples=60, deadline=None)
def test_cosine_and_line_stay_between_their_ends_and_move_one_way(
    start: float, end: float, num_steps: int, step: int
) -> None:
    for schedule in (cosine, linear_then_constant):
        now, later = (schedule(s, start=start, end=end, num_steps=num_steps) for s in (step, step + 1))
        assert min(start, end) * (1 - 1e-9) <= now <= max(start, end) * (1 + 1e-9)
        assert (later - now) * (end - start) >= -1e-12
        assert schedule(0, start=start, end=end, num_steps=num_steps) == pytest.approx(start)
        assert schedule(num_steps, start=start, end=end, num_steps=num_steps) == end


@given(start=RATES, end=RATES, num_steps=LENGTHS, step=st.integers(0, 400))
@settings(max_examples=40, deadline=None)
def test_cosine_is_symmetric_about_its_middle(start: float, end: float, num_steps: int, step: int) -> None:
    assume(step <= num_steps)
    pair = [cosine(s, start=start, end=end, num_steps=num_steps) for s in (step, num_steps - step)]
    assert sum(pair) == pytest.approx(start + end)


@given(peak=RATES, num_steps=LENGTHS, share=st.floats(0.0, 1.0), step=st.integers(0, 500))
@settings(max_examples=60, deadline=None)
def test_warmup_rises_to_peak_and_never_exceeds_it(peak: float, num_steps: int, share: float, step: int) -> None:
    warmup = round(num_steps * share)
    value = warmup_cosine(step, peak=peak, end=peak / 100, warmup_steps=warmup, num_steps=num_steps)
    assert 0 < value <= peak * (1 + 1e-9)
    if step < warmup:
        assert value == pytest.approx(peak * (step + 1) / warmup)
    if step >= num_steps and num_steps > warmup:
        assert value == peak / 100


@given(steps=st.integers(1, 2000), at=st.floats(0.0, 1.0), preset=st.sampled_from([MARKER, PAPER]))
@settings(max_examples=60, deadline=None)
def test_values_depend_on_the_share_of_the_run_done_alone(steps: int, at: float, preset: DinoSettings) -> None:
    """A run of ten times the length has the same values at the same share of it, up to the length of a step."""
    short, long = (replace(preset, steps=n).schedules() for n in (steps, 10 * steps))
    step = min(int(at * steps), steps - 1)
    near = [long.at(10 * step + offset) for offset in (-10, 0, 19) if 10 * step + offset >= 0]
    value = short.at(step)
    for name in ("weight_decay", "teacher_momentum", "teacher_temperature"):
        around = [getattr(v, name) for v in near]
        slack = 0.05 * (max(around) - min(around)) + 10.0 / steps
        assert min(around) - slack <= getattr(value, name) <= max(around) + slack
    assert 0 < value.learning_rate <= preset.learning_rate
