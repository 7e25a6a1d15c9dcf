"""The embed stage: units of cells through a pool of embedding actors, complete per patient.

The driver sees one small status row a unit; pixels and vectors stay in the workers, which write the files themselves
(`ctc_ray/embed/stream.py`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import ray

from ctc_ray.cohort import Cohort
from ctc_ray.config import EmbedConfig, RunConfig
from ctc_ray.embed.embedder import DEFAULT_NAME
from ctc_ray.embed.stream import stream_units
from ctc_ray.embed.units import PARTS, Unit, consolidate, finished_parts, parts_folder, units_of
from ctc_ray.errors import named_error
from ctc_ray.pretrain.encoder import (
    DEFAULT_FOLDER,
    DESCRIPTION_FILE,
    WEIGHTS_FILE,
    EncoderSpec,
    decode_spec,
    read_folder,
    verify,
)
from ctc_ray.pretrain.measure import worker_precision
from ctc_ray.progress import Progress
from ctc_ray.records import (
    FailureRow,
    PlanRow,
    Record,
    StageResult,
    State,
    WorkerTally,
    identity_of,
    read_record,
    require_fresh,
    state_of,
    write_failures,
    write_record,
)

STAGE = "embed"
_PRECISION_FILE = "precision.json"


@dataclass(frozen=True)
class _Job:
    """What is to do for one patient."""

    patient: str
    output: str
    identity: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    units: tuple[Unit, ...]
    missing: tuple[Unit, ...]
    kept: Record | None = None
    """Record of vectors that stay: cells were added beside them (`segment --retry-failed`) and `units` are of those alone."""

    @property
    def units_kept(self) -> int:
        """Units of the vectors that stay."""
        return self.kept.units_computed + self.kept.units_reused if self.kept else 0


def plan_embed(config: RunConfig, cohort: Cohort, *, patients: list[str] | None = None) -> list[PlanRow]:
    """Say what `run_embed` would do, patient by patient; touches nothing and needs no Ray."""
    section = config.embed
    precision = recorded_precision(section, cohort)
    rows = []
    spec = encoder_spec(cohort, section.encoder) if has_encoder(cohort, section.encoder) else None
    for patient in cohort.select_patients(patients):
        folder = cohort.embeddings(section.encoder, patient)
        if spec is None:
            rows.append(PlanRow(patient, State.ABSENT, f"encoder {section.encoder} is not there yet: run pretrain"))
        elif read_record(cohort.store, cohort.cells(patient)) is None:
            rows.append(PlanRow(patient, State.ABSENT, "its cells are not there yet: run segment"))
        elif precision is None:
            rows.append(PlanRow(patient, State.ABSENT, "nothing is embedded with this encoder yet"))
        else:
            cells = cohort.require(cohort.cells(patient), "segment")
            identity, _, _ = embed_identity(section, cells.identity, spec, precision)
            state = state_of(cohort.store, folder, identity)
            if state is State.COMPLETE and added_shards(cohort, patient, folder):
                rows.append(PlanRow(patient, State.ABSENT, "cells were added since"))
                continue
            why = {
                State.ABSENT: "not embedded yet",
                State.STALE: "made from other cells, another encoder or other settings: --force replaces it",
                State.COMPLETE: "same cells, encoder and settings",
            }[state]
            rows.append(PlanRow(patient, state, why))
    return rows


def run_embed(
    config: RunConfig,
    cohort: Cohort,
    *,
    patients: list[str] | None = None,
    force: bool = False,
    progress: Progress,
) -> StageResult:
    """Embed all cells of the cohort (or of some patients) that are not embedded yet.

    Args:
        config: section `embed` is used.
        cohort: with the cells and the encoder.
        patients: ids; None takes all.
        force: replace embeddings that were made otherwise.
        progress: where to show it.

    Raises:
        MissingInputError: a patient was not segmented, or the encoder is not there.
        StaleOutputError: embeddings of other cells, another encoder or other settings are there, without `force`.
        SchemaError: cells cannot be read; patients without such cells are complete nevertheless.
        StorageError: parts cannot be written, on a full disk for instance; what was written is reused by the next run.
        ResourceError: not one embedding actor fits the cluster.
    """
    started = time.monotonic()
    section = config.embed
    chosen = cohort.select_patients(patients)
    for patient in chosen:
        cohort.require(cohort.cells(patient), "segment")
    spec = encoder_spec(cohort, section.encoder)
    precision = recorded_precision(section, cohort) or fix_precision(section, cohort)
    jobs, kept = [], []
    for patient in chosen:
        job = _job(section, cohort, patient, spec, precision, force=force)
        if job is None:
            kept.append(patient)
        else:
            jobs.append(job)
    cells = _run_jobs(section, cohort, jobs, precision, progress)
    done = [read_record(cohort.store, cohort.embeddings(section.encoder, p)) for p in kept]
    reused = sum(r.units_computed + r.units_reused for r in done if r is not None)
    reused += sum(len(job.units) - len(job.missing) + job.units_kept for job in jobs)
    cells += sum(r.counts.get("cells", 0) for r in done if r is not None)
    return StageResult(
        stage=STAGE,
        units_computed=sum(len(job.missing) for job in jobs),
        units_reused=reused,
        counts={"patients": len(chosen), "cells": cells, "width": spec.width},
        paths=tuple(cohort.store.describe(cohort.embeddings(section.encoder, p)) for p in chosen),
        seconds=time.monotonic() - started,
    )


def has_encoder(cohort: Cohort, encoder: str) -> bool:
    """Whether the encoder of that name is there: in the cohort, or as the one that ships with the package."""
    return encoder == DEFAULT_NAME or read_record(cohort.store, cohort.encoder(encoder)) is not None


def encoder_spec(cohort: Cohort, encoder: str) -> EncoderSpec:
    """Description of an encoder, its weights checked.

    Raises:
        MissingInputError: it is not there.
        WeightsError: it is damaged.
    """
    if encoder == DEFAULT_NAME:
        _, description = read_folder(DEFAULT_FOLDER)
        return decode_spec(description, str(DEFAULT_FOLDER))
    folder = cohort.encoder(encoder)
    cohort.require(folder, "pretrain")
    where = cohort.store.describe(folder)
    spec = decode_spec(cohort.store.read_bytes(f"{folder}/{DESCRIPTION_FILE}"), where)
    # Here and not in the actors, where a damaged file would only look like an actor that cannot start.
    verify(spec, cohort.store.read_bytes(f"{folder}/{WEIGHTS_FILE}"), where)
    return spec


def _precision_path(cohort: Cohort, encoder: str) -> str:
    return f"{cohort.embeddings(encoder, _PRECISION_FILE)}"


def recorded_precision(section: EmbedConfig, cohort: Cohort) -> str | None:
    """The precision of this cohort's embeddings: the configured one, or what `auto` resolved to the first time."""
    if section.precision != "auto":
        return section.precision
    path = _precision_path(cohort, section.encoder)
    return str(cohort.store.read_json(path)["precision"]) if cohort.store.exists(path) else None


def fix_precision(section: EmbedConfig, cohort: Cohort) -> str:
    """Resolve `auto` on a worker of the kind that embeds, and record it for every later run and machine."""
    precision = worker_precision("auto", use_gpu=section.use_gpu)
    cohort.store.write_json(_precision_path(cohort, section.encoder), {"precision": precision})
    return precision


def embed_identity(
    section: EmbedConfig, cells_identity: str, spec: EncoderSpec, precision: str
) -> tuple[str, dict[str, Any], dict[str, str]]:
    """Identity of a patient's embeddings, with the settings and inputs that enter it and its record.

    Args:
        section: settings.
        cells_identity: of the patient's cells, from their record or from the plan of those that are still to be found.
        spec: the encoder's.
        precision: what it computes in.
    """
    inputs = {"cells": cells_identity, "encoder": spec.fingerprint}
    settings = {k: v for k, v in section.identity().items() if k != "encoder"} | {"precision": precision}
    return identity_of(STAGE, settings, inputs), settings, inputs


def added_shards(cohort: Cohort, patient: str, output: str) -> list[str]:
    """Shards of a patient's cells that its complete embeddings lack: those of fields that were set aside at first.

    `segment --retry-failed` writes the cells of such fields to further shards and leaves the others as they were, under the
    same identity where the images had not changed.
    """
    record = read_record(cohort.store, output)
    there = set(record.files) if record else set()
    return [shard for shard in cohort.shards(cohort.cells(patient)) if shard.rsplit("/", 1)[-1] not in there]


def _job(
    section: EmbedConfig, cohort: Cohort, patient: str, spec: EncoderSpec, precision: str, *, force: bool
) -> _Job | None:
    """The patient's units and which of them are missing; None where the output is complete."""
    output = cohort.embeddings(section.encoder, patient)
    cells = cohort.require(cohort.cells(patient), "segment")
    identity, settings, inputs = embed_identity(section, cells.identity, spec, precision)
    shards, kept = cohort.shards(cohort.cells(patient)), None
    if require_fresh(cohort.store, output, identity, force=force) is State.COMPLETE:
        shards, kept = added_shards(cohort, patient, output), read_record(cohort.store, output)
        if not shards:
            cohort.store.delete_folder(f"{output}/{PARTS}")  # left where a run was killed after its record
            return None
    folder = parts_folder(output, identity)
    units = units_of(cohort.store, patient, shards, folder, section.unit_cells)
    present = finished_parts(cohort.store, folder)
    missing = tuple(unit for unit in units if unit.part not in present)
    return _Job(patient, output, identity, settings, inputs, tuple(units), missing, kept)


def _run_jobs(section: EmbedConfig, cohort: Cohort, jobs: list[_Job], precision: str, progress: Progress) -> int:
    """Embed what is missing and complete each patient as soon as its last unit is there; returns cells."""
    by_part = {unit.part: job for job in jobs for unit in job.missing}
    waiting = {job.patient: {unit.part for unit in job.missing} for job in jobs}
    tallies = {job.patient: WorkerTally() for job in jobs}
    failures: dict[str, list[FailureRow]] = {job.patient: [] for job in jobs}
    started = time.monotonic()
    cells = sum(_finish(cohort, job, tallies[job.patient], started) for job in jobs if not job.missing)
    units = [unit for job in jobs for unit in job.missing]
    if units:
        with progress.task("embed", total=len(units)) as task:
            for row in stream_units(section, cohort.store, units, precision, progress):
                job = by_part[row["part"]]
                if row["part"] not in waiting[job.patient]:
                    continue  # done again after a worker was lost
                waiting[job.patient].remove(row["part"])
                if row["kind"]:
                    failures[job.patient].append(FailureRow(row["part"], row["kind"], row["message"]))
                else:
                    tallies[job.patient].add(row["node"], row["pid"])
                if not waiting[job.patient] and not failures[job.patient]:
                    cells += _finish(cohort, job, tallies[job.patient], started)
                task.advance(note=f"patient {job.patient}")
    for patient, rows in failures.items():
        write_failures(cohort.store, STAGE, patient, rows)
    failed = [row for rows in failures.values() for row in rows]
    if failed:
        first = failed[0]
        raise named_error(
            first.kind, f"{len(failed)} of {len(units)} units could not be embedded. First: {first.message}"
        )
    return cells


def _finish(cohort: Cohort, job: _Job, tally: WorkerTally, started: float) -> int:
    """Join a patient's parts in a worker, write its record last, remove the parts; returns its cells."""
    former = read_record(cohort.store, job.output)
    # The task needs a processor for moments only; asking for none lets it run while the pool holds them all.
    join = ray.remote(num_cpus=0)(consolidate)
    sizes: dict[str, int] = ray.get(join.remote(cohort.store, job.output, list(job.units)))
    cells = sum(unit.stop - unit.start for unit in job.units)
    if job.kept is not None:
        sizes = job.kept.files | sizes
        cells += job.kept.counts.get("cells", 0)
    record = Record(
        stage=STAGE,
        unit=job.patient,
        identity=job.identity,
        config=job.settings,
        inputs=job.inputs,
        files=sizes,
        counts={"cells": cells},
        seconds=time.monotonic() - started,
        units_computed=len(job.missing),
        units_reused=len(job.units) - len(job.missing) + job.units_kept,
        workers=tally.rows(),
    )
    write_record(cohort.store, job.output, record)
    for name in sorted(set(former.files if former else ()) - set(sizes)):
        cohort.store.delete(f"{job.output}/{name}")
    cohort.store.delete_folder(f"{job.output}/{PARTS}")
    return cells
