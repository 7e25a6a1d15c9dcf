"""The pretrain stage: DINO on Ray Train over the patients of role `pretrain`, and the import of published weights."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from ctc_ray.cohort import Cohort
from ctc_ray.config import PretrainConfig, RunConfig
from ctc_ray.errors import MissingInputError, ResourceError, RoleLeakError, SchemaError
from ctc_ray.pretrain.encoder import (
    DEFAULT_FOLDER,
    EncoderSpec,
    build_backbone,
    decode_spec,
    embedding_width,
    encode_encoder,
    load_strictly,
    read_folder,
)
from ctc_ray.pretrain.event_files import encode_events, event_file_name
from ctc_ray.pretrain.imports import encode_published
from ctc_ray.pretrain.intensity import (
    IntensityRule,
    constants_from_histogram,
    stored_full_scale,
)
from ctc_ray.pretrain.launch import check_resources, fit
from ctc_ray.pretrain.measure import measure_intensities, worker_precision
from ctc_ray.pretrain.settings import settings_of
from ctc_ray.pretrain.worker import TENSORBOARD, RunPlan, initial_weights, plan_to_json
from ctc_ray.progress import Progress
from ctc_ray.records import (
    PlanRow,
    Record,
    StageResult,
    State,
    digest_of,
    identity_of,
    library_versions,
    publish,
    read_record,
    require_fresh,
    state_of,
)
from ctc_ray.schema import CROP_SIZE_PX
from ctc_ray.storage import Store

STAGE = "pretrain"
_PLAN_FILE = "plan.json"


def plan_pretrain(config: RunConfig, cohort: Cohort) -> list[PlanRow]:
    """Say what `run_pretrain` would do; touches nothing and needs no Ray."""
    section = config.pretrain
    folder = cohort.encoder(section.encoder_id)
    waiting = [p for p in cohort.patients_by_role("pretrain") if read_record(cohort.store, cohort.cells(p)) is None]
    if waiting or not cohort.patients_by_role("pretrain"):
        why = f"cells of {', '.join(waiting)} are not there yet" if waiting else "no patient has the role pretrain yet"
        return [PlanRow(section.encoder_id, State.ABSENT, why)]
    moved = set(_trained_on(section, cohort)) - set(cohort.patients_by_role("pretrain"))
    if moved:
        why = f"trained on {', '.join(sorted(moved))}, who no longer have the role pretrain: --force trains a new one"
        return [PlanRow(section.encoder_id, State.STALE, why)]
    inputs = _inputs(section, cohort, force=False)
    state = state_of(cohort.store, folder, identity_of(STAGE, _settings(section), inputs))
    why = {
        State.ABSENT: f"not trained yet ({len(inputs)} inputs)",
        State.STALE: "trained with other settings or on other cells: --force replaces it",
        State.COMPLETE: "same settings, same cells",
    }[state]
    return [PlanRow(section.encoder_id, state, why)]


def run_pretrain(config: RunConfig, cohort: Cohort, *, force: bool = False, progress: Progress) -> StageResult:
    """Train the encoder, or continue a run that was interrupted, and publish it.

    Args:
        config: section `pretrain` is used.
        cohort: with segmented patients of role `pretrain`.
        force: replace an encoder that was made otherwise.
        progress: where to show it.

    Raises:
        MissingInputError: no patient has the role, or one was not segmented.
        StaleOutputError: another encoder has the name, without `force`.
        SchemaError: too few crops, or crops that are constant.
        ResourceError: the cluster has too few processors, or its workers kept failing.
        WeightsError: a damaged checkpoint, a loss that is not finite, or a shipped encoder of another architecture or number
            of channels.
        StorageError: a checkpoint cannot be written; the one before is intact.
    """
    started = time.monotonic()
    section = config.pretrain
    folder = cohort.encoder(section.encoder_id)
    inputs = _inputs(section, cohort, force=force)
    identity = identity_of(STAGE, _settings(section), inputs)
    if require_fresh(cohort.store, folder, identity, force=force) is State.COMPLETE:
        record = read_record(cohort.store, folder)
        counts = dict(record.counts) if record is not None else {}
        return _result(cohort, folder, counts, computed=0, reused=counts.get("steps", 0), started=started)
    shards = _shards(cohort, [p.removeprefix("cells/") for p in inputs if p.startswith("cells/")])
    plan = _plan(section, cohort, folder, identity, shards, progress)
    steps_before = max(plan.checkpoints().steps(), default=0)
    settings = settings_of(section, channels=plan.channels, precision=plan.precision)
    workers = check_resources(plan, settings.batch_size)
    initial_weights(section, plan.channels)  # here, since it needs no worker to say that they do not fit
    if steps_before < settings.steps:
        fit(plan, workers, settings.steps, steps_before, progress)
    counts = _publish(plan, inputs, settings.steps, steps_before, started, progress)
    computed = settings.steps - steps_before
    return _result(cohort, folder, counts, computed=computed, reused=steps_before, started=started)


def import_encoder(
    config: RunConfig, cohort: Cohort, file: Path, encoder_id: str, *, force: bool = False
) -> StageResult:
    """Bring published weights (`backbone.*`, as in `ctc_dino.pt`) into a cohort.

    Args:
        config: `pretrain.architecture` names the backbone.
        cohort: to write to.
        file: the weights.
        encoder_id: folder below `encoders/`.
        force: replace another encoder of that name.

    Raises:
        WeightsError: the file holds no such weights.
        StaleOutputError: another encoder has the name, without `force`.
    """
    started = time.monotonic()
    files, spec = encode_published(Path(file), config.pretrain.architecture)
    folder = cohort.encoder(encoder_id)
    inputs = {"weights": str(spec.provenance["sha256"])}
    settings = {"architecture": spec.architecture}
    identity = identity_of("import-encoder", settings, inputs)
    counts = {"width": spec.width, "input_px": spec.input_size_px}
    if require_fresh(cohort.store, folder, identity, force=force) is State.COMPLETE:
        return _result(cohort, folder, counts, computed=0, reused=1, started=started, stage="import-encoder")
    record = Record(
        stage="import-encoder",
        unit=encoder_id,
        identity=identity,
        config=settings,
        inputs=inputs,
        counts=counts,
        seconds=time.monotonic() - started,
        units_computed=1,
    )
    publish(cohort.store, folder, files, record)
    return _result(cohort, folder, counts, computed=1, reused=0, started=started, stage="import-encoder")


def _result(
    cohort: Cohort,
    folder: str,
    counts: dict[str, int],
    *,
    computed: int,
    reused: int,
    started: float,
    stage: str = STAGE,
) -> StageResult:
    return StageResult(
        stage=stage,
        units_computed=computed,
        units_reused=reused,
        counts=counts,
        paths=(cohort.store.describe(folder),),
        seconds=time.monotonic() - started,
    )


def _settings(section: PretrainConfig) -> dict[str, Any]:
    """What determines the encoder: the section without its name."""
    return {name: value for name, value in section.identity().items() if name != "encoder_id"}


def _inputs(section: PretrainConfig, cohort: Cohort, *, force: bool) -> dict[str, str]:
    """Cells of each pretraining patient and the encoder to start from, by their identity.

    Patients that joined after an encoder was finished do not make it stale: its own patients are what is compared.
    """
    patients = cohort.patients_by_role("pretrain")
    if not patients:
        raise MissingInputError(
            f"no patient of {cohort.store.uri} has the role pretrain: run `ctc-ray split {cohort.store.uri}` first"
        )
    own = _trained_on(section, cohort)
    if own:
        moved = sorted(set(own) - set(patients))
        if moved and not force:
            raise RoleLeakError(
                f"encoder {section.encoder_id!r} was trained on {', '.join(moved)}, who no longer have the role pretrain: "
                "their cells would be judged by an encoder that knows them. Train a new one with --force, or give it another "
                "pretrain.encoder_id"
            )
        patients = patients if moved else own
    inputs = {f"cells/{p}": cohort.require(cohort.cells(p), "segment").identity for p in patients}
    if section.init == "default":
        _, description = read_folder(DEFAULT_FOLDER)
        inputs["init"] = decode_spec(description, str(DEFAULT_FOLDER)).fingerprint
    return inputs


def _trained_on(section: PretrainConfig, cohort: Cohort) -> list[str]:
    """Patients of the encoder that is there; none where it was imported or is not there."""
    record = read_record(cohort.store, cohort.encoder(section.encoder_id))
    if record is None or record.stage != STAGE:
        return []
    return sorted(name.removeprefix("cells/") for name in record.inputs if name.startswith("cells/"))


def _shards(cohort: Cohort, patients: list[str]) -> dict[str, int]:
    """Shards of the patients' cells and their rows."""
    shards = [shard for patient in patients for shard in cohort.shards(cohort.cells(patient))]
    return {shard: cohort.store.num_rows(shard) for shard in shards}


def _plan(
    section: PretrainConfig, cohort: Cohort, folder: str, identity: str, shards: dict[str, int], progress: Progress
) -> RunPlan:
    """The plan of a run: read where the run began before, else measured and recorded."""
    run_folder = f"{folder}/_train/{identity}"
    path = f"{run_folder}/{_PLAN_FILE}"
    if cohort.store.exists(path):
        known = cohort.store.read_json(path)
        try:
            return RunPlan(cohort.store, run_folder, section=section, shards=shards, **known)
        except TypeError as error:
            raise SchemaError(
                f"{cohort.store.describe(path)} is no plan of a run ({error}): delete it and run again"
            ) from error
    counts, dtype = measure_intensities(section, cohort.store, shards, progress)
    if section.preset == "paper":
        rule = IntensityRule("reference")
    else:
        low, high = section.intensity_percentiles
        rule = constants_from_histogram(
            counts, low_percentile=low, high_percentile=high, compression=section.intensity_compression
        )
    plan = RunPlan(
        store=cohort.store,
        folder=run_folder,
        identity=identity,
        section=section,
        shards=shards,
        rule=rule.to_json(),
        channels=len(counts),
        full_scale=stored_full_scale(dtype, section.full_scale),
        precision=worker_precision(section.precision, use_gpu=section.use_gpu),
        data=placement(section, sum(shards.values()), len(counts), dtype),
    )
    cohort.store.write_json(path, plan_to_json(plan))
    return plan


def placement(
    section: PretrainConfig, num_crops: int, channels: int, dtype: np.dtype[Any]
) -> Literal["resident", "streaming"]:
    """Whether the workers hold their crops or stream them; `auto` holds what fits (see `pretrain.resident_gb`).

    Args:
        section: of the run.
        num_crops: crops of all workers.
        channels: channels C of a crop.
        dtype: of the counts; 16-bit counts are held in 32 bits.
    """
    if section.data != "auto":
        return section.data
    count_bytes = 1 if np.dtype(dtype) == np.uint8 else 4
    share_gb = num_crops / section.num_workers * channels * CROP_SIZE_PX**2 * count_bytes / 1e9
    return "resident" if share_gb <= section.resident_gb else "streaming"


def _publish(
    plan: RunPlan, inputs: dict[str, str], steps: int, steps_before: int, started: float, progress: Progress
) -> dict[str, int]:
    """Publish the encoder of a finished run and remove the run's state; returns the record's counts."""
    store, section = plan.store, plan.section
    folder = plan.folder.split("/_train/", maxsplit=1)[0]
    files, metrics = _published_files(plan, list(inputs))
    counts = {
        "steps": steps,
        "cells": sum(plan.shards.values()),
        "patients": sum(name.startswith("cells/") for name in inputs),
        "collapsed_steps": metrics.filter(pl.col("collapse") != "").height,
    }
    if counts["collapsed_steps"]:
        progress.say(
            f"  WARNING: encoder {section.encoder_id}: {counts['collapsed_steps']} of the {metrics.height} measured steps show a "
            f"collapse (column `collapse` of {store.describe(folder)}/metrics.parquet): do not trust its embeddings"
        )
    record = Record(
        stage=STAGE,
        unit=section.encoder_id,
        identity=plan.identity,
        config=_settings(section),
        inputs=inputs,
        counts=counts,
        seconds=time.monotonic() - started,
        units_computed=steps - steps_before,
        units_reused=steps_before,
    )
    _write_events(store, folder, metrics)
    publish(store, folder, files, record)
    store.delete_folder(f"{folder}/_train")
    return counts


def _published_files(plan: RunPlan, inputs: list[str]) -> tuple[dict[str, Any], pl.DataFrame]:
    """Encoder files and metrics from the last checkpoint: the teacher's backbone is the encoder."""
    found = plan.checkpoints().latest()
    settings = settings_of(plan.section, channels=plan.channels, precision=plan.precision)
    if found is None or found.step < settings.steps:
        at = found.step if found else 0
        raise ResourceError(
            f"training ended at step {at} of {settings.steps} without an error: run again to continue from there"
        )
    metrics = pl.DataFrame(found.details["metrics"], infer_schema_length=None)
    prefix = "teacher.backbone."
    state = {k.removeprefix(prefix): v for k, v in found.tensors.items() if k.startswith(prefix)}
    input_px = settings.input_px if settings.preset == "paper" else settings.geometry.global_px
    backbone = build_backbone(settings.architecture, channels=plan.channels, input_size_px=input_px)
    load_strictly(backbone, state, "the last checkpoint")
    spec = EncoderSpec(
        architecture=settings.architecture,
        channels=plan.channels,
        input_size_px=input_px,
        width=embedding_width(backbone),
        intensity=IntensityRule.from_json(plan.rule),
        provenance={
            "made_by": "ctc-ray pretrain",
            "preset": settings.preset,
            "init": plan.section.init,
            "steps": found.step,
            "workers": sorted(metrics["workers"].unique().to_list()),
            "inputs": inputs,
            "precision": plan.precision,
            "full_scale": plan.full_scale,
            "versions": library_versions(),
            "run": digest_of(plan_to_json(plan)),
        },
    )
    files, _ = encode_encoder(backbone, spec)
    return {**files, "metrics.parquet": metrics.to_arrow()}, metrics


def _write_events(store: Store, folder: str, metrics: pl.DataFrame) -> None:
    """One event file of the whole run, in place of those of another; outside the record, so that it may be deleted."""
    events = f"{folder}/{TENSORBOARD}"
    store.delete_folder(events)
    rows = metrics.to_dicts()
    store.write_bytes(f"{events}/{event_file_name(rows[-1]['step'])}", encode_events(rows))
