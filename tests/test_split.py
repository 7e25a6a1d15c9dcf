"""Roles of patients: proportions, stability, and refusals."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctc_ray.cohort import Cohort
from ctc_ray.config import SplitConfig
from ctc_ray.errors import MissingInputError
from ctc_ray.records import State
from ctc_ray.split import FILL_ORDER, assign_roles, plan_split, split_patients

PAPER = SplitConfig(pretrain=60, train=10, validation=0, test=10, final=10)


def names(num: int) -> list[str]:
    return [f"P{i:03d}" for i in range(num)]


def cohort_of(path: Path, patients: list[str]) -> Cohort:
    cohort = Cohort.open(str(path), create=True)
    cohort.add_patients(dict.fromkeys(patients, "cartridge"))
    return cohort


def test_split_of_ninety_patients_gives_the_papers_numbers() -> None:
    counts = Counter(assign_roles(names(90), {}, PAPER).values())
    assert counts == {"pretrain": 60, "train": 10, "test": 10, "final": 10}


def test_split_does_not_depend_on_the_order_of_patients_but_on_the_seed() -> None:
    forward, backward = assign_roles(names(40), {}, PAPER), assign_roles(names(40)[::-1], {}, PAPER)
    assert forward == backward
    assert forward != assign_roles(names(40), {}, PAPER.model_copy(update={"seed": 1}))


@settings(max_examples=40, deadline=None)
@given(num=st.integers(1, 60), seed=st.integers(0, 99), weights=st.lists(st.integers(0, 9), min_size=5, max_size=5))
def test_split_fills_every_weighted_role_before_any_gets_a_second(num: int, seed: int, weights: list[int]) -> None:
    if not any(weights):
        weights[0] = 1
    config = SplitConfig(seed=seed, **dict(zip(FILL_ORDER, weights, strict=True)))
    counts = Counter(assign_roles(names(num), {}, config).values())
    wanted = [role for role, weight in zip(FILL_ORDER, weights, strict=True) if weight]
    assert sum(counts.values()) == num
    assert set(counts) == set(wanted[:num])
    for role, weight in zip(FILL_ORDER, weights, strict=True):
        assert counts[role] <= max(1, num * weight / sum(weights) + 1)


@settings(max_examples=30, deadline=None)
@given(first=st.integers(4, 30), more=st.integers(0, 30))
def test_split_of_a_grown_cohort_keeps_every_role(first: int, more: int) -> None:
    config = SplitConfig()
    before = assign_roles(names(first), {}, config)
    after = assign_roles(names(first + more), before, config)
    assert {patient: after[patient] for patient in before} == before
    assert len(after) == first + more


def test_split_patients_writes_roles_once_and_keeps_them(tmp_path: Path) -> None:
    cohort = cohort_of(tmp_path, ["007", "12", "Müller 3", "x", "y"])
    assert [row.state for row in plan_split(SplitConfig(), cohort)] == [State.ABSENT] * 5
    first = split_patients(SplitConfig(), cohort)
    roles = dict(cohort.patients().select("patient", "role").iter_rows())
    assert (first.units_computed, first.units_reused) == (5, 0)
    assert set(roles.values()) == set(FILL_ORDER)
    cohort.add_patients({"new": "cartridge"})
    again = split_patients(SplitConfig(seed=99), cohort)
    assert (again.units_computed, again.units_reused) == (1, 5)
    later = dict(cohort.patients().select("patient", "role").iter_rows())
    assert {patient: later[patient] for patient in roles} == roles
    assert later["new"] is not None


def test_split_of_three_patients_is_refused_with_what_is_needed(tmp_path: Path) -> None:
    cohort = cohort_of(tmp_path, ["a", "b", "c"])
    with pytest.raises(MissingInputError, match=r"has 3 patients, a split needs at least 4.*final"):
        split_patients(SplitConfig(), cohort)
    assert split_patients(SplitConfig(pretrain=0), cohort).units_computed == 3
