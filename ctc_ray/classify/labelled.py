"""The labelled cells that a classifier learns from and is scored on, by role."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from ctc_ray.cohort import Cohort
from ctc_ray.errors import LabelError, RoleLeakError
from ctc_ray.labels.consensus import digest_labels, one_per_physical_cell, read_labels, with_class

TRAIN_ROLE = "train"
SCORED_ROLES = ("validation", "test")


@dataclass(frozen=True)
class LabelledCells:
    """Labelled cells of the roles, one detection a physical cell.

    Attributes:
        frame: columns cell_id, patient, label, is_ctc, physical_id, role and others; sorted by cell_id.
        digest: of the ids and labels in the frame.
    """

    frame: pl.DataFrame
    digest: str

    def of(self, role: str) -> pl.DataFrame:
        """Rows of one role."""
        return self.frame.filter(pl.col("role") == role)


def labelled_cells(cohort: Cohort) -> LabelledCells:
    """Read consensus labels of training, validation and test patients.

    Cells labelled `unsure` are left out. Of the detections of one physical cell the most probable labelled one stays.

    Raises:
        LabelError: there are no labels of training patients.
        RoleLeakError: one physical cell is labelled in two roles.
    """
    roles = dict(cohort.patients().select("patient", "role").iter_rows())
    wanted = [patient for patient, role in roles.items() if role in (TRAIN_ROLE, *SCORED_ROLES)]
    labels = with_class(read_labels(cohort, wanted))
    if not set(labels["patient"]) & {patient for patient, role in roles.items() if role == TRAIN_ROLE}:
        raise LabelError(
            f"{cohort.store.uri} has no labelled cell of a training patient: label cells (`ctc-ray label`), or bring labels in "
            "with `ctc-ray import-labels`"
        )
    frame = one_per_physical_cell(cohort, labels).with_columns(
        role=pl.col("patient").replace_strict(roles, return_dtype=pl.String)
    )
    check_no_leak(frame)
    return LabelledCells(frame, digest_labels(frame))


def check_no_leak(frame: pl.DataFrame) -> None:
    """Refuse a cell or patient in two roles.

    Args:
        frame: columns cell_id, patient, physical_id, role.

    Raises:
        RoleLeakError: a patient, a cell or a physical cell of one patient has two roles.
    """
    keys = {"patient": ["patient"], "cell": ["cell_id"], "physical cell": ["patient", "physical_id"]}
    for what, columns in keys.items():
        torn = frame.group_by(columns).agg(roles=pl.col("role").unique().sort()).filter(pl.col("roles").list.len() > 1)
        if torn.height:
            first = torn.row(0, named=True)
            raise RoleLeakError(
                f"{what} {first[columns[-1]]} has the roles {' and '.join(first['roles'])}: what is learnt from would be "
                "scored on. Keep one role a patient in patients.parquet"
            )
