"""Give patients their roles: seeded, independent of order, and never changed once given."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping

import polars as pl

from ctc_ray.cohort import PATIENTS_PATH, Cohort
from ctc_ray.config import SplitConfig
from ctc_ray.errors import MissingInputError
from ctc_ray.records import PlanRow, StageResult, State

FILL_ORDER = ("train", "test", "final", "pretrain", "validation")
"""Which role gets its first patient first: without training and test patients nothing can be learnt or measured."""
_PURPOSE = {
    "train": "train (labels for the classifier)",
    "test": "test (the reported F1)",
    "final": "final (candidates of unseen patients)",
    "pretrain": "pretrain (cells for the encoder)",
}


def split_patients(config: SplitConfig, cohort: Cohort) -> StageResult:
    """Assign a role to every patient that has none yet.

    Args:
        config: seed and the weight of each role.
        cohort: its `patients.parquet` is rewritten; roles already there stay.

    Returns:
        Counts: patients of each role; `units_computed` newly assigned, `units_reused` already assigned.

    Raises:
        MissingInputError: there are fewer patients than roles that every cohort needs.

    Source: paper, 60/10/10/10 of 90 patients; the validation role is ours.
    """
    started = time.monotonic()
    patients = cohort.patients()
    known = dict(patients.filter(pl.col("role").is_not_null()).select("patient", "role").iter_rows())
    _require_enough(config, patients.height, cohort)
    roles = assign_roles(list(patients["patient"]), known, config)
    if len(known) < patients.height:
        cohort.write_patients(
            patients.with_columns(role=pl.col("patient").replace_strict(roles, return_dtype=pl.String))
        )
    counts = {role: sum(given == role for given in roles.values()) for role in FILL_ORDER}
    return StageResult(
        stage="split",
        units_computed=patients.height - len(known),
        units_reused=len(known),
        counts=counts,
        paths=(PATIENTS_PATH,),
        seconds=time.monotonic() - started,
    )


def plan_split(config: SplitConfig, cohort: Cohort) -> list[PlanRow]:
    """Say which patients would get a role.

    Raises:
        MissingInputError: as `split_patients`.
    """
    patients = cohort.patients()
    _require_enough(config, patients.height, cohort)
    rows = []
    for patient, role in patients.select("patient", "role").iter_rows():
        if role is None:
            rows.append(PlanRow(patient, State.ABSENT, "has no role yet"))
        else:
            rows.append(PlanRow(patient, State.COMPLETE, f"keeps its role {role}"))
    return rows


def assign_roles(patients: list[str], known: Mapping[str, str], config: SplitConfig) -> dict[str, str]:
    """Choose a role for each patient; pure, independent of the order of `patients`.

    Args:
        patients: all patient ids.
        known: roles already given; they are kept.
        config: seed and weights.

    Returns:
        Patient -> role. Targets are the weights' shares of all patients by largest remainder, after one patient for each
        role in `FILL_ORDER`; new patients, in the order of a seeded hash of their ids, fill the largest gap.
    """
    weights = {role: float(getattr(config, role)) for role in FILL_ORDER if getattr(config, role) > 0}
    have = dict.fromkeys(FILL_ORDER, 0)
    for role in known.values():
        have[role] += 1
    targets = _targets(len(patients), weights)
    roles = dict(known)
    for patient in sorted(set(patients) - set(known), key=lambda name: _rank(config.seed, name)):
        empty = [role for role in weights if have[role] == 0]
        role = empty[0] if empty else max(weights, key=lambda r: (targets[r] - have[r], weights[r]))
        roles[patient] = role
        have[role] += 1
    return roles


def _targets(num_patients: int, weights: Mapping[str, float]) -> dict[str, int]:
    """Patients per role: one each first, then the largest remainder."""
    total = sum(weights.values())
    targets = {role: int(position < num_patients) for position, role in enumerate(weights)}
    for _ in range(num_patients - sum(targets.values())):
        role = max(weights, key=lambda r: num_patients * weights[r] / total - targets[r])
        targets[role] += 1
    return targets


def _rank(seed: int, patient: str) -> str:
    """Order of a patient in the draw: depends on the seed and the id alone."""
    return hashlib.blake2b(f"{seed}/{patient}".encode(), digest_size=16).hexdigest()


def _require_enough(config: SplitConfig, num_patients: int, cohort: Cohort) -> None:
    needed = [role for role in _PURPOSE if getattr(config, role) > 0]
    if num_patients < len(needed):
        raise MissingInputError(
            f"{cohort.store.uri} has {num_patients} patients, a split needs at least {len(needed)}, one for each of: "
            f"{', '.join(_PURPOSE[role] for role in needed)}. Segment more patients, or set the weight of a role to 0"
        )
