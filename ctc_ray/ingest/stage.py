"""The stage `ingest`: cartridge fields to cells and their embeddings, as one Ray Data plan over all patients."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from ctc_ray.actor_pools import Pool, fitted_pools
from ctc_ray.cluster import connect, worker_identity
from ctc_ray.cohort import Cohort
from ctc_ray.config import EmbedConfig, RunConfig
from ctc_ray.embed.stage import (
    added_shards,
    embed_identity,
    encoder_spec,
    fix_precision,
    has_encoder,
    recorded_precision,
    run_embed,
)
from ctc_ray.errors import MissingInputError
from ctc_ray.ingest.cells_step import CellSender
from ctc_ray.ingest.embed_step import FieldEmbedder
from ctc_ray.ingest.finish import WorkDone, finish_ingested, join_vectors
from ctc_ray.ingest.plan import STAGE, Encoder, IngestPlan, note_extensions, plan_vectors, refuse_stale_vectors
from ctc_ray.ingest.statistics import STATISTICS_SCHEMA, Busy, BusyTimes, statistics_path
from ctc_ray.progress import Progress, Task
from ctc_ray.records import FailureRow, PlanRow, StageResult, State, WorkerTally, read_record
from ctc_ray.segment.model import resolve_precision
from ctc_ray.segment.plan import plan_patients, resolve_settings
from ctc_ray.segment.plan import recorded_precision as segment_precision
from ctc_ray.segment.stage import SegmentRun, TasksUnderWay, begin, look_at_patients, own_errors, segment_result
from ctc_ray.segment.stream import instance_pool, network_pool, stream_candidates
from ctc_ray.storage import Store

FIELDS_A_BATCH = 4
"""Fields that are embedded together: a few hundred crops, enough to fill a forward pass; what a killed embedding actor repeats."""


@dataclass
class _Tally:
    """What came back for one patient so far."""

    left: set[int]
    failures: list[FailureRow]
    rows: list[dict[str, Any]] = field(default_factory=list)
    cutters: WorkerTally = field(default_factory=WorkerTally)
    embedders: WorkerTally = field(default_factory=WorkerTally)
    seconds: float = 0.0
    embed_seconds: float = 0.0
    embedded: int = 0


@dataclass(frozen=True)
class _Run:
    """What all steps of a run share."""

    config: RunConfig
    cohort: Cohort
    images: Store
    segment: SegmentRun
    precision: str
    """That the encoder computes in."""
    plans: tuple[IngestPlan, ...]

    @property
    def open_plans(self) -> list[IngestPlan]:
        """Those of patients whose cells are not finished."""
        return [plan for plan in self.plans if plan.cells.is_open]


def plan_ingest(
    config: RunConfig,
    cohort: Cohort,
    *,
    cartridges: str,
    patients: Sequence[str] | None = None,
    retry_failed: bool = False,
) -> list[PlanRow]:
    """Say what `run_ingest` would do for each patient; nothing is written and Ray is not started.

    Raises:
        ConfigError: a named patient has no folder, or the configuration is not usable.
        CartridgeError: no patient has any image.
        MissingInputError: the encoder is not there.
        WeightsError: weights cannot be read.
    """
    _require_encoder(cohort, config.embed)
    settings = resolve_settings(
        config.segment, segment_precision(cohort, config.segment.precision) or resolve_precision("auto")
    )
    plans, empty = plan_patients(
        config.segment, settings, cohort, Store(cartridges), patients=patients, retry_failed=retry_failed
    )
    precision = recorded_precision(config.embed, cohort)
    encoder = _encoder(config.embed, cohort, precision or "fp32")  # no embeddings yet: any precision finds none
    rows = [_row(cohort, plan_vectors(config.embed, cohort, plan, encoder)) for plan in plans]
    return rows + [PlanRow(patient, State.ABSENT, failure.message) for patient, failure in empty.items()]


def _row(cohort: Cohort, plan: IngestPlan) -> PlanRow:
    cells, vectors = plan.cells, plan.vectors
    if cells.is_open:
        todo = f"{len(cells.todo)} fields to segment and embed"
        todo += f", {len(plan.unembedded)} to embed" if plan.unembedded else ""
        state = State.ABSENT if cells.kept else cells.state
        return PlanRow(plan.patient, state, f"{cells.why}; {todo}, {len(vectors.fields)} finished already")
    if vectors.state is State.COMPLETE:
        if not added_shards(cohort, plan.patient, vectors.output):
            return PlanRow(plan.patient, State.COMPLETE, "same fields, weights, encoder and settings")
        return PlanRow(plan.patient, State.ABSENT, "cells are there, some were added since they were embedded")
    if vectors.state is State.STALE and vectors.extends is None:
        return PlanRow(plan.patient, State.STALE, "cells are there, embedded otherwise: --force replaces their vectors")
    return PlanRow(plan.patient, State.ABSENT, "cells are there, not embedded yet")


def run_ingest(
    config: RunConfig,
    cohort: Cohort,
    *,
    cartridges: str,
    patients: Sequence[str] | None = None,
    force: bool = False,
    retry_failed: bool = False,
    progress: Progress,
) -> StageResult:
    """Segment and embed every patient folder below `cartridges`, in one plan; the result is that of `segment`, then `embed`.

    Finished patients are skipped, interrupted ones go on from their finished fields, whichever of the three stages
    was interrupted. Fields that cannot be read are listed in `failures/segment/<patient>.parquet`.

    Args:
        config: all settings; `segment`, `embed` and `ray` are used.
        cohort: where cells and embeddings go, with the encoder.
        cartridges: path or URI of the folder that holds one folder a patient.
        patients: which; None for all.
        force: make stale cells and embeddings anew; the old ones stay until the new ones are complete.
        retry_failed: try set-aside fields of finished patients again, and keep their other cells and vectors.
        progress: where to report.

    Raises:
        ConfigError: a named patient has no folder, or the configuration is not usable.
        CartridgeError: no patient has any image.
        MissingInputError: the encoder is not there.
        WeightsError: weights cannot be read.
        StaleOutputError: a patient's cells or embeddings were made otherwise and neither `force` nor `retry_failed` covers it.
        ResourceError: the cluster has too few processors for the plan.
        SchemaError: cells cannot be embedded, for example counts above full scale; everything else is complete.
        TooManyFailuresError: more than `segment.max_failure_fraction` of the fields failed; all others are saved.
    """
    started = time.monotonic()
    _require_encoder(cohort, config.embed)
    with connect(None, config.ray):
        run = _look(config, cohort, Store(cartridges), patients, force=force, retry_failed=retry_failed)
        pools = fitted_pools(STAGE, _pools(config), progress) if run.open_plans else []
        begin(config.segment, cohort, run.segment)
        note_extensions(cohort, run.plans)
        busy, unfinished = _ingest(run, pools, progress)
        embedded_after = 0
        if unfinished:
            rest = run_embed(config, cohort, patients=unfinished, force=force, progress=progress)
            embedded_after = rest.counts.get("cells", 0)
    return _result(run, busy, embedded_after, time.monotonic() - started)


def _require_encoder(cohort: Cohort, section: EmbedConfig) -> None:
    if not has_encoder(cohort, section.encoder):
        raise MissingInputError(
            f"encoder {section.encoder} is not in {cohort.store.uri} yet: segment and pretrain first, import one with "
            "`ctc-ray import-encoder`, or take the shipped one with --set embed.encoder=default"
        )


def _encoder(section: EmbedConfig, cohort: Cohort, precision: str) -> Encoder:
    spec = encoder_spec(cohort, section.encoder)
    _, settings, inputs = embed_identity(section, "", spec, precision)
    return Encoder(section.encoder, inputs["encoder"], spec.width, settings)


def _look(
    config: RunConfig, cohort: Cohort, images: Store, patients: Sequence[str] | None, *, force: bool, retry_failed: bool
) -> _Run:
    """Plan cells and vectors; but for the precision of the embeddings nothing is written."""
    segment = look_at_patients(
        config.segment, cohort, images, patients, force=force, retry_failed=retry_failed, connected=lambda: None
    )
    precision = recorded_precision(config.embed, cohort) or fix_precision(config.embed, cohort)
    encoder = _encoder(config.embed, cohort, precision)
    plans = tuple(plan_vectors(config.embed, cohort, plan, encoder) for plan in segment.plans)
    refuse_stale_vectors(cohort, plans, force=force)
    return _Run(config, cohort, images, segment, precision, plans)


def _pools(config: RunConfig) -> list[Pool]:
    section = config.embed
    embedding = Pool(
        "embedding actor",
        "embed.num_actors",
        section.num_actors,
        cpus=section.num_threads,
        gpus=section.gpus_per_actor if section.use_gpu else 0,
    )
    return [network_pool(config.segment), instance_pool(config.segment), embedding]


def _ingest(run: _Run, pools: Sequence[Any], progress: Progress) -> tuple[Busy, list[str]]:
    """Stream all open fields through the plan, finish each patient as soon as its last field is there.

    Returns:
        How long the pools worked, and the patients that the embed stage has to complete.
    """
    open_plans = {plan.patient: plan for plan in run.open_plans}
    tallies = {name: _tally(plan) for name, plan in open_plans.items()}
    finishing, joining, times = TasksUnderWay(finish_ingested), TasksUnderWay(join_vectors), BusyTimes()
    unfinished: list[str | None] = []

    def begin_finish(patient: str) -> None:
        plan, tally = open_plans[patient], tallies.pop(patient)
        _write_statistics(run.cohort, patient, tally)
        finishing.start(
            plan.cells,
            plan.vectors,
            run.segment.settings,
            run.cohort,
            run.images,
            failures=tally.failures,
            segmented=WorkDone(tally.cutters.rows(), tally.seconds),
            embedded=WorkDone(tally.embedders.rows(), tally.embed_seconds, tally.embedded),
        )

    with progress.task(STAGE, total=sum(plan.num_fields for plan in open_plans.values())) as task, own_errors():
        unfinished += _join_closed(run, joining)
        for patient in [name for name, tally in tallies.items() if not tally.left]:
            begin_finish(patient)
        for row in _rows(run, pools):
            times.add(row)
            if row["patient"] in tallies and _count(row, tallies[row["patient"]], task):
                begin_finish(row["patient"])
            unfinished += finishing.collect()
        unfinished += finishing.collect_all() + joining.collect_all()
    return times.busy(), sorted(patient for patient in unfinished if patient is not None)


def _tally(plan: IngestPlan) -> _Tally:
    fields = (*plan.cells.todo, *plan.unembedded)
    return _Tally({file.field for file in fields}, list(plan.cells.cartridge.set_aside))


def _join_closed(run: _Run, joining: TasksUnderWay) -> list[str]:
    """Start joining where cells are finished and vectors lie in parts; returns the patients of whom there are none."""
    due = []
    for plan in run.plans:
        vectors = plan.vectors
        if plan.cells.is_open:
            continue
        if vectors.state is State.COMPLETE:
            if added_shards(run.cohort, plan.patient, vectors.output):
                due.append(plan.patient)
            else:
                run.cohort.store.delete_folder(f"{vectors.output}/_parts")  # left by a kill after the record
        elif vectors.fields or vectors.extends:
            joining.start(run.cohort, vectors, WorkDone())
        else:
            due.append(plan.patient)
    return due


def _rows(run: _Run, pools: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Run the plan; yields one row of `DONE_SCHEMA` a field, in no particular order."""
    section, embed, settings = run.config.segment, run.config.embed, run.segment.settings
    tasks = [task for plan in run.open_plans for task in plan.tasks(run.images, settings)]
    if not tasks:
        return
    cut = stream_candidates(section, settings, run.images, tasks, pools[0]).map_batches(
        CellSender,
        batch_size=1,
        batch_format="pyarrow",
        fn_constructor_kwargs={"settings": settings, "identify": worker_identity},
        compute=pools[1],
        num_cpus=1,
    )
    done = cut.map_batches(
        FieldEmbedder,
        batch_size=FIELDS_A_BATCH,
        batch_format="pyarrow",
        fn_constructor_args=(run.cohort, embed, run.precision, worker_identity),
        compute=pools[2],
        num_cpus=embed.num_threads,
        num_gpus=embed.gpus_per_actor if embed.use_gpu else None,
    )
    for batch in done.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from batch.to_pylist()


def _count(row: dict[str, Any], tally: _Tally, task: Task) -> bool:
    """Note one finished field; True where it was the patient's last."""
    if row["field"] not in tally.left:
        return False  # a field counts once, whatever was repeated behind a lost machine
    tally.left.remove(row["field"])
    tally.seconds += row["seconds"]
    tally.rows.append({name: row[name] for name in STATISTICS_SCHEMA.names})
    if row["kind"] is not None:
        tally.failures.append(FailureRow(row["path"], row["kind"], row["message"]))
    elif not row["has_cells"]:
        tally.cutters.add(row["node"], row["pid"])
    if row["embed_node"] is not None and row["embed_error"] is None:
        tally.embedders.add(row["embed_node"], row["embed_pid"])
        tally.embed_seconds += row["embed_end"] - row["embed_start"]
        tally.embedded += 1
    task.advance(note=f"{row['patient']} field {row['field']}: {row['cells']} cells")
    return not tally.left


def _write_statistics(cohort: Cohort, patient: str, tally: _Tally) -> None:
    if tally.rows:
        rows = sorted(tally.rows, key=lambda row: int(row["field"]))
        cohort.store.write_table(statistics_path(patient), pa.Table.from_pylist(rows, schema=STATISTICS_SCHEMA))


def _result(run: _Run, busy: Busy, embedded_after: int, seconds: float) -> StageResult:
    """Counts from the records, in fields; raises where too many of them failed."""
    found = segment_result(run.config.segment, run.cohort, run.segment, seconds)
    records = [read_record(run.cohort.store, plan.vectors.output) for plan in run.plans]
    counts = {
        **found.counts,
        "embedded": sum(record.counts.get("cells", 0) for record in records if record),
        "embedded_at_the_end": embedded_after,
    }
    paths = [
        run.cohort.store.describe(path)
        for plan in run.plans
        for path in (run.cohort.cells(plan.patient), plan.vectors.output)
    ]
    return StageResult(
        stage=STAGE,
        units_computed=found.units_computed,
        units_reused=found.units_reused,
        set_aside=found.set_aside,
        counts=counts,
        paths=tuple(paths),
        seconds=seconds,
        notes=(busy.sentence(),) if busy.either else (),
        failures_of="segment",
    )
