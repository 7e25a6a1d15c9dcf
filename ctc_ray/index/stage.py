"""The index stage: one FAISS index over all embedded patients, built shard by shard; new patients are added."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import polars as pl
import pyarrow as pa

from ctc_ray.cohort import Cohort
from ctc_ray.config import IndexConfig, RunConfig
from ctc_ray.errors import MissingInputError, StaleOutputError, TooManyFailuresError
from ctc_ray.index.assemble import (
    LISTS_FILE,
    Material,
    Refusal,
    Shard,
    assemble,
    place,
    refuse_other_widths,
    scratch_folder,
    shards_of,
    spans_of,
    train,
)
from ctc_ray.index.build import (
    CELLS_FILE,
    DESCRIPTION_FILE,
    INDEX_FILE,
    LOOKUP_FILE,
    Kind,
    open_index,
    read_description,
    serialise,
)
from ctc_ray.index.cell_table import encode_lookup
from ctc_ray.index.lists import centroids_of, lists_around
from ctc_ray.labels.patients import process_identity, run_over
from ctc_ray.latent.embeddings import embedded_patients
from ctc_ray.progress import Progress
from ctc_ray.records import (
    RECORD_NAME,
    FailureRow,
    PlanRow,
    Record,
    StageResult,
    State,
    canonical_json,
    damaged_files,
    digest_of,
    identity_of,
    publish,
    read_record,
    write_failures,
)
from ctc_ray.storage import Store, encode_parquet

STAGE = "index"
_GROWTH = 4
"""Lists trained on a cohort this much smaller are trained anew."""


@dataclass(frozen=True)
class IndexPlan:
    """Embedded patients, those already indexed, and where the index stands."""

    embedded: dict[str, str]
    indexed: dict[str, str]
    state: State
    cells: int = 0
    description: dict[str, Any] = field(default_factory=dict)


def run_index(
    config: RunConfig, cohort: Cohort, *, force: bool = False, progress: Progress | None = None
) -> StageResult:
    """Build the index, or add the patients that it lacks.

    Shards are placed by parallel tasks where Ray is connected; parts of a build that was cut short are used again.

    Args:
        config: section `index`.
        cohort: embedded.
        force: build anew where the metric, the kind or the embeddings of an indexed patient changed.
        progress: where progress goes.

    Returns:
        Patients added and patients already there; counts of cells; patients set aside because a shard cannot be read.

    Raises:
        MissingInputError: no patient is embedded.
        StaleOutputError: the index was made with another metric or kind or from other embeddings, and `force` is not set.
        TooManyFailuresError: more patients than `index.max_failure_fraction` allows cannot be indexed.
    """
    started = time.monotonic()
    settings = config.index
    plan = plan_of(settings, cohort)
    folder = cohort.index(settings.encoder)
    if plan.state is State.STALE and not force:
        raise StaleOutputError(
            f"{cohort.store.describe(folder)} was built with another metric or kind, or from other embeddings. "
            "Run again with --force"
        )
    kept = plan.indexed if plan.state is State.COMPLETE else {}
    added = {patient: identity for patient, identity in plan.embedded.items() if patient not in kept}
    failed = 0
    if added:
        build = _prepare(settings, cohort, plan, kept, added)
        failed = _build(settings, cohort, build, progress)
        kept, added = build.kept, build.added
    record = cohort.require(folder, STAGE)
    counts = {"cells": record.counts["cells"]}
    seconds = time.monotonic() - started
    return StageResult(STAGE, len(added) - failed, len(kept), failed, counts, (folder,), seconds)


def plan_index(config: RunConfig, cohort: Cohort) -> list[PlanRow]:
    """Say which patients would be added; raises MissingInputError as `run_index`."""
    plan = plan_of(config.index, cohort)
    rows = []
    for patient in plan.embedded:
        if plan.state is State.STALE:
            rows.append(PlanRow(patient, State.STALE, "indexed with another metric or kind, or from other embeddings"))
        elif plan.state is State.COMPLETE and patient in plan.indexed:
            rows.append(PlanRow(patient, State.COMPLETE, "indexed"))
        else:
            rows.append(PlanRow(patient, State.ABSENT, "not in the index"))
    return rows


def plan_of(config: IndexConfig, cohort: Cohort) -> IndexPlan:
    """Compare the index with the embeddings of now; raises MissingInputError as `run_index`."""
    embedded = embedded_patients(cohort, config.encoder)
    if not embedded:
        raise MissingInputError(
            f"{cohort.store.uri} has no embeddings by encoder {config.encoder!r}: run `ctc-ray embed {cohort.store.uri}` first"
        )
    folder = cohort.index(config.encoder)
    record = read_record(cohort.store, folder)
    if record is None or damaged_files(cohort.store, folder, record):
        return IndexPlan(embedded, {}, State.ABSENT)
    description = read_description(cohort.store, folder)
    same = record.identity == identity_of(STAGE, config.identity(), record.inputs)
    same &= config.kind in ("auto", description["kind"])
    unchanged = all(embedded.get(patient) == identity for patient, identity in record.inputs.items())
    state = State.COMPLETE if same and unchanged else State.STALE
    return IndexPlan(embedded, record.inputs, state, record.counts["cells"], description)


@dataclass(frozen=True)
class Build:
    """What one run does: patients kept and added (patient -> identity), shards to place, and the kind of index."""

    kept: dict[str, str]
    added: dict[str, str]
    shards: list[Shard]
    refused: dict[str, Refusal]
    kind: Kind
    cells: int
    parts: str


def _prepare(
    settings: IndexConfig, cohort: Cohort, plan: IndexPlan, kept: dict[str, str], added: dict[str, str]
) -> Build:
    """Choose the kind by the number of cells; an index of another kind, or of outgrown lists, is built from the start."""
    shards, refused = shards_of(cohort, settings.encoder, added)
    shards, others = refuse_other_widths(shards, _former_width(settings, cohort, plan) if kept else None)
    refused |= others
    cells = (plan.cells if kept else 0) + sum(shard.rows for shard in shards)
    kind = kind_for(settings, cells, plan.description.get("kind") if kept else None)
    outgrown = kind == "ivf" and cells > _GROWTH * plan.description.get("trained_cells", cells)
    if kept and (kind != plan.description["kind"] or outgrown):
        return _prepare(settings, cohort, plan, {}, plan.embedded)
    origin = {"kept": kept, "added": {} if kept and kind == "ivf" else added, "kind": kind}
    parts = f"{cohort.index(settings.encoder)}/_parts/{digest_of({**origin, 'config': settings.identity()})}"
    return Build(kept, added, shards, refused, kind, cells, parts)


def _former_width(settings: IndexConfig, cohort: Cohort, plan: IndexPlan) -> int:
    if "width" in plan.description:
        return int(plan.description["width"])
    return int(open_index(cohort.store, f"{cohort.index(settings.encoder)}/{INDEX_FILE}").d)


def kind_for(settings: IndexConfig, num_cells: int, former: Kind | None = None) -> Kind:
    """Kind of an index over that many cells; a graph that was chosen by measurement stays one."""
    if settings.kind != "auto":
        return settings.kind
    if num_cells <= settings.exact_below:
        return "flat"
    return "hnsw" if former == "hnsw" else "ivf"


def _build(settings: IndexConfig, cohort: Cohort, build: Build, progress: Progress | None) -> int:
    """Train, place, put together; returns the number of patients set aside."""
    store = cohort.store
    if build.kind == "ivf" and not build.kept and build.shards and not store.exists(f"{build.parts}/{LISTS_FILE}"):
        call = (store, settings, build.shards, build.cells, build.parts)
        list(run_over(train, [call], description="train the lists of the index", progress=progress))
    if build.kind == "ivf" and build.kept:
        list(run_over(reuse_lists, [(store, settings, build.parts)], description="open the index", progress=progress))
    waiting = [shard for shard in build.shards if not store.exists(f"{shard.part(build.parts)}.safetensors")]
    calls = [(store, settings, shard, build.parts, build.kind) for shard in waiting]
    refused = dict(build.refused)
    for number, refusal in run_over(place, calls, description="place shards in the index", progress=progress):
        if refusal is not None:
            refused[waiting[number].patient] = refusal
    _set_aside(settings, cohort, build, refused)
    added = {patient: identity for patient, identity in build.added.items() if patient not in refused}
    shards = [shard for shard in build.shards if shard.patient not in refused]
    if added:
        last = (store, settings, build.kept, added, shards, build.kind, build.parts)
        list(run_over(build_and_publish, [last], description="build the index", progress=progress))
    store.delete_folder(f"{cohort.index(settings.encoder)}/_parts")
    return len(refused)


def _set_aside(settings: IndexConfig, cohort: Cohort, build: Build, refused: dict[str, Refusal]) -> None:
    for patient in build.added:
        found = refused.get(patient)
        write_failures(
            cohort.store, STAGE, patient, [FailureRow(found.source, found.kind, found.message)] if found else []
        )
    if refused and len(refused) > settings.max_failure_fraction * len(build.added):
        first = refused[min(refused)]
        raise TooManyFailuresError(
            f"index: {len(refused)} of {len(build.added)} patients failed, more than index.max_failure_fraction = "
            f"{settings.max_failure_fraction:g} allows. The first: {first.message}. All are listed in failures/{STAGE}/"
        )


def reuse_lists(store: Store, config: IndexConfig, parts: str) -> None:
    """Give the lists of the former index to the workers that place new shards. Runs on a worker."""
    former = open_index(store, f"{Cohort(store).index(config.encoder)}/{INDEX_FILE}")
    store.write_bytes(f"{parts}/{LISTS_FILE}", serialise(lists_around(centroids_of(former), config.metric)))


def build_and_publish(
    store: Store,
    config: IndexConfig,
    kept: dict[str, str],
    added: dict[str, str],
    shards: Sequence[Shard],
    kind: Kind,
    parts: str,
) -> int:
    """Put the parts and the former index together, measure and publish. Runs on a worker; returns the cells it holds.

    Raises:
        MissingInputError: the embeddings hold no cells.
    """
    started = time.monotonic()
    folder = Cohort(store).index(config.encoder)
    if not shards and not kept:
        raise MissingInputError(f"{store.uri}: the embeddings by {config.encoder!r} hold no cells: nothing to index")
    former = open_index(store, f"{folder}/{INDEX_FILE}") if kept else None
    description = read_description(store, folder) if kept else None
    material = Material(store, config, parts, shards, former=former, former_description=description)
    cells = material.cells([store.read_table(f"{folder}/{CELLS_FILE}")] if kept else [])
    material = replace(material, spans=spans_of(cells))
    inputs = {**kept, **added}
    node, pid = process_identity()
    with scratch_folder(store, parts) as scratch:
        made = assemble(material, kind, scratch)
        if not kept:
            # Files of the same size replace those of another build: without the record nobody takes a mixture for whole.
            store.delete(f"{folder}/{RECORD_NAME}")
        files: dict[str, bytes | pa.Buffer] = {
            INDEX_FILE: pa.memory_map(str(made.file)).read_buffer(),
            CELLS_FILE: encode_parquet(cells, row_group_size=65_536),
            LOOKUP_FILE: encode_lookup(pl.DataFrame(pl.from_arrow(cells))),
            DESCRIPTION_FILE: canonical_json(made.description).encode(),
        }
        record = Record(
            stage=STAGE,
            unit=config.encoder,
            identity=identity_of(STAGE, config.identity(), inputs),
            config=config.identity(),
            inputs=inputs,
            counts={"cells": int(cells.num_rows), "patients": len(inputs)},
            seconds=time.monotonic() - started,
            units_computed=len(added),
            units_reused=len(kept),
            workers=[{"node": node, "pid": pid, "units": len(added)}],
        )
        publish(store, folder, files, record)
    return int(cells.num_rows)
