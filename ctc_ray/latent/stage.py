"""The map stage: fit once, then place every embedded patient, slice by slice."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache

import polars as pl
import pyarrow as pa

from ctc_ray.cohort import Cohort
from ctc_ray.config import MapConfig, RunConfig
from ctc_ray.errors import MissingInputError, ResourceError, StaleOutputError
from ctc_ray.labels.consensus import digest_labels, read_labels
from ctc_ray.labels.patients import process_identity, ray_is_connected, run_over
from ctc_ray.latent.by_unit import PatientJob, run_by_unit
from ctc_ray.latent.comparison import compare_with_other
from ctc_ray.latent.embeddings import Float32, embedded_patients
from ctc_ray.latent.fit import fit_map
from ctc_ray.latent.model import SUMMARY_FILE, LatentMap, load_map
from ctc_ray.progress import Progress
from ctc_ray.records import PlanRow, Record, StageResult, State, identity_of, publish, read_record, state_of
from ctc_ray.storage import Store

STAGE = "map"
_FIT_ROLES = ("train", "test")


@dataclass(frozen=True)
class FitPlan:
    """What the fit of a map would be made from, and where it stands."""

    roles: dict[str, str]
    """Patient -> role, of the patients that the fit uses."""
    identity: str
    state: State
    labels: pl.DataFrame
    """Consensus labels of those patients."""
    labels_digest: str
    labels_changed: bool
    """Whether the finished fit saw other labels: no reason to fit again, since a map is frozen, unless forced."""


def run_map(config: RunConfig, cohort: Cohort, *, force: bool = False, progress: Progress | None = None) -> StageResult:
    """Fit the latent map if there is none, and place the patients that are not on it yet.

    Args:
        config: section `map`; with `compare_with` the agreement with another map is written too.
        cohort: embedded, and split into roles; labels if there are any.
        force: fit again where settings, fitted patients or labels changed, and place again where embeddings did.
        progress: where progress goes.

    Returns:
        Patients placed and reused; counts: cells placed, clusters, fits made.

    Raises:
        MissingInputError: no training patient, or a training or test patient without embeddings; or no map of `compare_with`.
        StaleOutputError: the map, or a patient's place on it, was made otherwise, and `force` is not set.
        SchemaError: too few cells to fit on.
        ResourceError: cuML is asked for and is not there.
        TooManyFailuresError: more patients than `map.max_failure_fraction` could not be placed; all others are.
    """
    started = time.monotonic()
    settings = config.map
    folder = cohort.latent(settings.encoder, settings.name)
    plan = plan_fit(settings, cohort)
    if plan.state is State.STALE and not force:
        raise StaleOutputError(
            f"{cohort.store.describe(folder)} was fitted with other settings or other embeddings. Run again with --force to fit "
            "a new map, or choose another map.name"
        )
    refit = plan.state is not State.COMPLETE or (force and plan.labels_changed)
    if refit:
        call = (cohort.store, settings, plan.roles, plan.labels.to_arrow(), plan.identity, plan.labels_digest)
        gpus = _gpus_of_fit(settings, cohort)
        list(run_over(fit_and_publish, [call], description="fit PCA, UMAP, HDBSCAN", progress=progress, num_gpus=gpus))
    digest = models_digest(cohort, settings)
    units = _units(cohort, settings, digest)
    todo = [patient for patient, (_, state) in units.items() if state is not State.COMPLETE]
    _refuse_stale([patient for patient in todo if units[patient][1] is State.STALE], cohort, folder, force=force)
    jobs = [_job(cohort, settings, patient, digest, units[patient][0]) for patient in todo]
    placed = run_by_unit(
        cohort,
        jobs,
        place_cells,
        (folder, digest),
        unit_cells=settings.unit_cells,
        max_failure_fraction=settings.max_failure_fraction,
        description="place cells",
        progress=progress,
    )
    compared = compare_with_other(settings, cohort, progress=progress)
    summary = cohort.store.read_json(f"{folder}/{SUMMARY_FILE}")
    return StageResult(
        stage=STAGE,
        units_computed=len(todo) - len(placed.set_aside),
        units_reused=len(units) - len(todo),
        set_aside=len(placed.set_aside),
        counts={"cells": placed.cells, "clusters": int(summary["num_clusters"]), "fits": int(refit)},
        paths=(folder,) if compared is None else (folder, compared),
        seconds=time.monotonic() - started,
    )


def _gpus_of_fit(config: MapConfig, cohort: Cohort) -> int:
    """GPUs that the fit asks Ray for; raises ResourceError where cuML is asked for and the cluster has none."""
    if config.backend == "cpu" or not ray_is_connected():
        return 0
    import ray

    there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    if there.get("GPU", 0.0) >= 1.0:
        return 1
    if config.backend == "cuml":
        raise ResourceError(
            f"map.backend=cuml needs a GPU, and the Ray cluster that maps {cohort.store.uri} has none: add a machine with one, "
            "or set map.backend=cpu"
        )
    return 0


def _refuse_stale(stale: list[str], cohort: Cohort, folder: str, *, force: bool) -> None:
    if stale and not force:
        raise StaleOutputError(
            f"patients {', '.join(stale)} were embedded anew since they were placed on {cohort.store.describe(folder)}: "
            "run again with --force to place them again"
        )


def plan_map(config: RunConfig, cohort: Cohort) -> list[PlanRow]:
    """Say whether the map would be fitted and which patients would be placed; raises MissingInputError as `run_map`."""
    settings = config.map
    plan = plan_fit(settings, cohort)
    why = {
        State.ABSENT: f"no map yet: fit on {len(plan.roles)} patients",
        State.STALE: "fitted with other settings or other embeddings",
        State.COMPLETE: "labels changed since; the map stays as it is unless --force"
        if plan.labels_changed
        else "fitted",
    }
    rows = [PlanRow("fit", plan.state, why[plan.state])]
    if plan.state is not State.COMPLETE:
        return rows + [
            PlanRow(p, State.ABSENT, "placed after the fit") for p in embedded_patients(cohort, settings.encoder)
        ]
    for patient, (_, state) in _units(cohort, settings, models_digest(cohort, settings)).items():
        reason = {State.ABSENT: "not on this map", State.STALE: "embedded anew", State.COMPLETE: "placed"}
        rows.append(PlanRow(patient, state, reason[state]))
    return rows


def plan_fit(config: MapConfig, cohort: Cohort) -> FitPlan:
    """Work out the patients, the identity and the state of a fit.

    A finished fit keeps its patients: new ones extend the cohort and do not make the map stale, nor do new labels. A fitted
    patient with new embeddings does.

    Raises:
        MissingInputError: as `run_map`.
    """
    folder = cohort.latent(config.encoder, config.name)
    record = read_record(cohort.store, folder)
    known = {
        patient: role for patient, role in cohort.patients().select("patient", "role").iter_rows() if role in _FIT_ROLES
    }
    fitted = _fitted_patients(record) if record else []
    roles = {patient: known[patient] for patient in fitted if patient in known} if fitted else known
    if config.cluster_with == "pool" and not fitted:
        roles = {patient: role for patient, role in roles.items() if role == "train"}
    if "train" not in roles.values():
        raise MissingInputError(
            f"{cohort.store.uri} has no patient of role train: run `ctc-ray split {cohort.store.uri}` first"
        )
    inputs = {
        patient: cohort.require(cohort.embeddings(config.encoder, patient), "embed").identity for patient in roles
    }
    identity = identity_of(STAGE, config.identity(), inputs)
    labels = read_labels(cohort, roles.keys())
    digest = digest_labels(labels)
    changed = record is not None and record.inputs.get("labels") != digest
    return FitPlan(roles, identity, state_of(cohort.store, folder, identity), labels, digest, changed)


def _fitted_patients(record: Record) -> list[str]:
    prefix = "embeddings/"
    return [name[len(prefix) :] for name in record.inputs if name.startswith(prefix)]


def models_digest(cohort: Cohort, config: MapConfig) -> str:
    """Digest of a map's models: what a classifier or a patient's place on the map pins."""
    folder = cohort.latent(config.encoder, config.name)
    cohort.require(folder, STAGE)
    return str(cohort.store.read_json(f"{folder}/{SUMMARY_FILE}")["models"])


def fit_and_publish(
    store: Store, config: MapConfig, roles: dict[str, str], labels: pa.Table, identity: str, labels_digest: str
) -> int:
    """Fit a map and write its files and record; returns the number of clusters. Runs on a worker."""
    started = time.monotonic()
    cohort = Cohort(store)
    fitted = fit_map(cohort, config, roles, pl.DataFrame(pl.from_arrow(labels)))
    inputs = {
        f"embeddings/{patient}": embedded
        for patient, embedded in embedded_patients(cohort, config.encoder).items()
        if patient in roles
    }
    node, pid = process_identity()
    record = Record(
        stage=STAGE,
        unit=config.name,
        identity=identity,
        config=config.identity(),
        inputs={**inputs, "labels": labels_digest},
        counts={
            "plane_cells": len(fitted.plane_ids),
            "clustered_cells": len(fitted.cluster_ids),
            "clusters": fitted.clusters.num_clusters,
        },
        seconds=time.monotonic() - started,
        units_computed=1,
        workers=[{"node": node, "pid": pid, "units": 1}],
    )
    publish(store, cohort.latent(config.encoder, config.name), fitted.files(), record)
    return fitted.clusters.num_clusters


def _units(cohort: Cohort, config: MapConfig, digest: str) -> dict[str, tuple[str, State]]:
    """Embedded patient -> identity and state of its place on the map; one placed on a former map counts as absent."""
    units = {}
    for patient, embedded in embedded_patients(cohort, config.encoder).items():
        identity = identity_of(f"{STAGE}-cells", {}, {"map": digest, "embeddings": embedded})
        folder = cohort.latent_cells(config.encoder, config.name, patient)
        state = state_of(cohort.store, folder, identity)
        if state is State.STALE:
            record = read_record(cohort.store, folder)
            if record is not None and record.inputs.get("map") != digest:
                state = State.ABSENT
        units[patient] = (identity, state)
    return units


@lru_cache(maxsize=1)
def _loaded(store_uri: str, folder: str, digest: str) -> LatentMap:
    """A worker loads a map once; the digest makes a refitted map another one."""
    return load_map(Store(store_uri), folder)


def place_cells(
    store: Store, patient: str, cell_ids: list[str], vectors_ND: Float32, folder: str, digest: str
) -> pa.Table:
    """Place a slice of a patient's cells on the map of a folder. Runs on a worker."""
    return _loaded(store.address, folder, digest).table(cell_ids, patient, vectors_ND)


def _job(cohort: Cohort, config: MapConfig, patient: str, digest: str, identity: str) -> PatientJob:
    """What placing one patient reads, writes and records."""
    inputs = {"map": digest, "embeddings": embedded_patients_identity(cohort, config.encoder, patient)}
    return PatientJob(
        source=cohort.embeddings(config.encoder, patient),
        output=cohort.latent_cells(config.encoder, config.name, patient),
        record=Record(stage=STAGE, unit=patient, identity=identity, config={}, inputs=inputs),
    )


def embedded_patients_identity(cohort: Cohort, encoder: str, patient: str) -> str:
    """Identity of one patient's embeddings."""
    return cohort.require(cohort.embeddings(encoder, patient), "embed").identity
