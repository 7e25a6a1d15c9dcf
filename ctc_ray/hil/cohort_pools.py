"""A simulation's problem from a cohort: labelled cells on a finished latent map, pool and test apart by patient."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from ctc_ray.cohort import Cohort
from ctc_ray.config import HilConfig
from ctc_ray.errors import LabelError, MissingInputError
from ctc_ray.hil.pools import CellSet, Problem, cell_set
from ctc_ray.hil.release import fill_background
from ctc_ray.labels.consensus import digest_labels, one_per_physical_cell, read_labels, with_class
from ctc_ray.records import read_record

_ROLES = ("train", "test", "validation")


@dataclass(frozen=True, eq=False)
class CohortInputs:
    """What a simulation reads of a cohort, small enough for the driver.

    Attributes:
        labels: columns cell_id, patient, label, is_ctc, role of the labelled cells with a class.
        inputs: name -> identity or digest, for the record.
    """

    labels: pl.DataFrame
    inputs: dict[str, str]


def read_inputs(cohort: Cohort, config: HilConfig) -> CohortInputs:
    """Find the labelled cells of the roles train, test and validation, and what identifies them.

    Raises:
        MissingInputError: the latent map is not finished.
        LabelError: no patient of the role train or test has labels.
    """
    record = cohort.require(cohort.latent(config.encoder, config.map), "map")
    roles = cohort.patients().filter(pl.col("role").is_in(list(_ROLES))).select("patient", "role")
    labels = with_class(read_labels(cohort, list(roles["patient"]))).join(roles, on="patient", how="inner")
    for role in ("train", "test"):
        if labels.filter(pl.col("role") == role).is_empty():
            patients = ", ".join(cohort.patients_by_role(role)) or "none"
            raise LabelError(
                f"{cohort.store.uri}: no labelled cell of a patient with the role {role} (patients: {patients}); "
                f"label some with `ctc-ray label` or `ctc-ray import-labels`, or change the roles with `ctc-ray split`"
            )
    inputs = {"map": record.identity, "labels": digest_labels(labels)}
    for patient, role in roles.filter(pl.col("patient").is_in(labels["patient"].unique().to_list())).iter_rows():
        placed = read_record(cohort.store, cohort.latent_cells(config.encoder, config.map, patient))
        if placed is None:
            raise MissingInputError(
                f"patient {patient} has labels but no place on the latent map: run `ctc-ray map {cohort.store.uri}` first"
            )
        inputs[f"cells/{patient}"] = f"{role} {placed.identity}"
    return CohortInputs(labels, inputs)


def read_problem(cohort: Cohort, config: HilConfig, found: CohortInputs) -> Problem:
    """Gather PCA scores and clusters of the labelled cells, a few thousand rows without pixels.

    One detection stays of each physical cell. Cells of the role train are the pool, of the role test the test set, of the role
    validation (where there are any of both classes) what scores the clusters. Background cells of the pool and of the
    validation set take the cluster of the nearest pool cell that has one, for strategies that ask for clusters.

    Raises:
        LabelError: a labelled cell is not on the map, or a set has one class only.
    """
    labels = one_per_physical_cell(cohort, found.labels).select("cell_id", "patient", "role", "is_ctc")
    frames = [_place(cohort, config, str(patient), group) for (patient,), group in labels.group_by("patient")]
    cells = pl.concat(frames).sort("cell_id")
    train, umap = _cells_of(cells, "train")
    test, _ = _cells_of(cells, "test")
    filled = fill_background(umap, train.clusters, umap, train.clusters)
    return Problem(train, filled, test, _validation(cells, umap, train))


def _place(cohort: Cohort, config: HilConfig, patient: str, labels: pl.DataFrame) -> pl.DataFrame:
    folder = cohort.latent_cells(config.encoder, config.map, patient)
    cohort.require(folder, "map")
    columns = ["cell_id", "pca", "umap_x", "umap_y", "cluster"]
    placed = pl.DataFrame(pl.from_arrow(cohort.read_columns(folder, columns)))
    joined = labels.join(placed, on="cell_id", how="left")
    lost = joined.filter(pl.col("cluster").is_null())
    if lost.height:
        raise LabelError(
            f"patient {patient}: {lost.height} labelled cells, the first {lost['cell_id'][0]}, are not on the latent map: run "
            f"`ctc-ray map {cohort.store.uri}` again, or `ctc-ray labels relink {cohort.store.uri}` after a new segmentation"
        )
    return joined


def _cells_of(cells: pl.DataFrame, role: str) -> tuple[CellSet, np.ndarray]:
    mine = cells.filter(pl.col("role") == role)
    features = mine["pca"].to_numpy()
    if features.dtype == object:  # a list column without a fixed size
        features = np.stack(list(features))
    found = cell_set(
        f"role {role}", mine["cell_id"].to_list(), features, mine["is_ctc"].to_numpy(), mine["cluster"].to_numpy()
    )
    return found, mine.select("umap_x", "umap_y").to_numpy()


def _validation(cells: pl.DataFrame, train_umap: np.ndarray, train: CellSet) -> CellSet | None:
    mine = cells.filter(pl.col("role") == "validation")
    if mine["is_ctc"].n_unique() < 2:
        return None
    found, umap = _cells_of(cells, "validation")
    filled = fill_background(train_umap, train.clusters, umap, found.clusters)
    return cell_set(found.name, found.cell_ids, found.features, found.labels, filled)
