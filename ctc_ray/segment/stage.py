"""The stage `segment`: cartridge fields to cells, as one Ray Data plan over all patients."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import ray

from ctc_ray.cluster import connect, worker_identity
from ctc_ray.cohort import Cohort
from ctc_ray.config import RunConfig, SegmentConfig
from ctc_ray.errors import CtcRayError, ResourceError, TooManyFailuresError
from ctc_ray.progress import Progress, Task
from ctc_ray.records import FailureRow, PlanRow, StageResult, State, WorkerTally, read_record, write_failures
from ctc_ray.segment.cells_step import CellCutter
from ctc_ray.segment.field_image import pixel_type
from ctc_ray.segment.finish import finish_patient
from ctc_ray.segment.model import resolve_precision
from ctc_ray.segment.network_step import CandidateFinder
from ctc_ray.segment.plan import (
    STAGE,
    PatientPlan,
    Settings,
    plan_patients,
    record_precision,
    recorded_precision,
    refuse_stale,
    resolve_settings,
)
from ctc_ray.segment.read_step import TASK_SCHEMA, FieldTask, read_fields
from ctc_ray.storage import Store

MAX_BLOCKS = 4000
"""Blocks of the plan; up to this number of fields each is read, segmented and written on its own."""


@dataclass
class _Tally:
    """What came back for one patient so far."""

    left: int
    failures: list[FailureRow] = field(default_factory=list)
    workers: WorkerTally = field(default_factory=WorkerTally)
    seconds: float = 0.0


def plan_segment(
    config: RunConfig,
    cohort: Cohort,
    *,
    cartridges: str,
    patients: Sequence[str] | None = None,
    retry_failed: bool = False,
) -> list[PlanRow]:
    """Say what `run_segment` would do for each patient; nothing is written and Ray is not started.

    Raises:
        ConfigError: a named patient has no folder, or the configuration is not usable.
        CartridgeError: no patient has any image.
        WeightsError: the weights cannot be read.
    """
    precision = recorded_precision(cohort, config.segment.precision) or resolve_precision("auto")
    settings = resolve_settings(config.segment, precision)
    plans, empty = plan_patients(
        config.segment, settings, cohort, Store(cartridges), patients=patients, retry_failed=retry_failed
    )
    rows = [PlanRow(plan.patient, State.ABSENT if plan.kept else plan.state, _why(plan)) for plan in plans]
    return rows + [PlanRow(patient, State.ABSENT, failure.message) for patient, failure in empty.items()]


def _why(plan: PatientPlan) -> str:
    if not plan.is_open:
        return plan.why
    return f"{plan.why}; {len(plan.todo)} fields to segment, {len(plan.reused)} finished already"


def run_segment(
    config: RunConfig,
    cohort: Cohort,
    *,
    cartridges: str,
    patients: Sequence[str] | None = None,
    force: bool = False,
    retry_failed: bool = False,
    progress: Progress,
) -> StageResult:
    """Segment the fields of every patient folder below `cartridges` into cells.

    Finished patients are skipped, interrupted ones go on from their finished fields, fields that cannot be read are listed
    in `failures/segment/<patient>.parquet`.

    Args:
        config: all settings; `segment` and `ray` are used.
        cohort: where cells go.
        cartridges: path or URI of the folder that holds one folder a patient.
        patients: which; None for all.
        force: segment stale patients anew; their old cells stay until the new ones are complete.
        retry_failed: try set-aside fields of finished patients again and keep their other cells.
        progress: where to report.

    Raises:
        ConfigError: a named patient has no folder, or the configuration is not usable.
        CartridgeError: no patient has any image.
        WeightsError: the weights cannot be read.
        StaleOutputError: a patient's cells were made otherwise and neither `force` nor `retry_failed` covers it.
        ResourceError: the cluster has too few processors for the plan.
        TooManyFailuresError: more than `segment.max_failure_fraction` of the fields failed; all others are saved.
    """
    with contextlib.ExitStack() as connection:
        return _run(
            config.segment,
            cohort,
            Store(cartridges),
            patients,
            force=force,
            retry_failed=retry_failed,
            progress=progress,
            connected=lambda: connection.enter_context(connect(None, config.ray)),
        )


def _run(
    section: SegmentConfig,
    cohort: Cohort,
    images: Store,
    patients: Sequence[str] | None,
    *,
    force: bool,
    retry_failed: bool,
    progress: Progress,
    connected: Callable[[], None],
) -> StageResult:
    started = time.monotonic()
    precision = recorded_precision(cohort, section.precision)
    if precision is None:
        connected()
        precision = _precision_of_workers(section)
    settings = resolve_settings(section, precision)
    plans, empty = plan_patients(section, settings, cohort, images, patients=patients, retry_failed=retry_failed)
    refuse_stale(cohort, plans, force=force)
    if section.precision == "auto":
        record_precision(cohort, precision)
    cohort.add_patients({plan.patient: plan.cartridge.folder for plan in plans})
    for patient, failure in empty.items():
        write_failures(cohort.store, STAGE, patient, [failure])
    open_plans = [plan for plan in plans if plan.is_open]
    _clear_leftovers(cohort, [plan for plan in plans if not plan.is_open])
    if open_plans:
        connected()
        _segment(section, settings, cohort, images, open_plans, progress)
    return _result(section, cohort, plans, open_plans, empty, time.monotonic() - started)


def _precision_of_workers(section: SegmentConfig) -> str:
    """What `auto` means on a worker that would run the network."""
    resolve = ray.remote(_resolve_on_worker).options(num_cpus=1, num_gpus=1 if section.use_gpu else 0)
    return str(ray.get(resolve.remote()))


def _resolve_on_worker() -> str:
    import torch

    return resolve_precision("auto", torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _segment(
    section: SegmentConfig,
    settings: Settings,
    cohort: Cohort,
    images: Store,
    plans: Sequence[PatientPlan],
    progress: Progress,
) -> None:
    """Stream all open fields through the plan and finish each patient as soon as its last field is there."""
    _check_resources(section)
    by_name = {plan.patient: plan for plan in plans}
    tallies = {plan.patient: _Tally(len(plan.todo), list(plan.cartridge.set_aside)) for plan in plans}
    as_remote: Any = ray.remote  # its types know functions without arguments only
    finish = as_remote(finish_patient).options(num_cpus=0.5, max_retries=2)
    finishing: dict[Any, str] = {}

    def begin_finish(patient: str) -> None:
        plan, tally = by_name[patient], tallies[patient]
        reference = finish.remote(
            plan, settings, cohort, images, failures=tally.failures, workers=tally.workers.rows(), seconds=tally.seconds
        )
        finishing[reference] = patient

    with progress.task("segment", total=sum(len(plan.todo) for plan in plans)) as task, _own_errors():
        for patient, tally in tallies.items():
            if tally.left == 0:
                begin_finish(patient)
        for status in _statuses(section, settings, cohort, images, plans):
            if _count(status, tallies[status["patient"]], task):
                begin_finish(status["patient"])
            _collect(finishing, timeout=0)
        while finishing:
            _collect(finishing, timeout=None)


def _statuses(
    section: SegmentConfig, settings: Settings, cohort: Cohort, images: Store, plans: Sequence[PatientPlan]
) -> Iterator[dict[str, Any]]:
    """Run the plan; yields one row a field as they finish, in no particular order."""
    tasks = [
        FieldTask(file, plan.parts_folder, dtype, plan.channel_map, plan.fingerprint).to_json()
        for plan in plans
        if plan.todo
        for dtype in (pixel_type(images, plan.cartridge.fields, settings.contrast),)
        for file in plan.todo
    ]
    if not tasks:
        return
    source: Any = ray.data.from_arrow(pa.table({"task": tasks}, schema=TASK_SCHEMA))
    fields = source.repartition(min(len(tasks), MAX_BLOCKS)).map_batches(
        read_fields,
        batch_size=1,
        batch_format="pyarrow",
        fn_kwargs={"cartridges": images, "settings": settings},
        num_cpus=0.5,
    )
    candidates = fields.map_batches(
        CandidateFinder,
        batch_size=1,
        batch_format="pyarrow",
        fn_constructor_kwargs={"settings": settings, "num_threads": section.num_network_threads},
        compute=ray.data.ActorPoolStrategy(size=section.num_network_actors),
        num_cpus=section.num_network_threads,
        num_gpus=1 if section.use_gpu else None,
    )
    statuses = candidates.map_batches(
        CellCutter,
        batch_size=1,
        batch_format="pyarrow",
        fn_constructor_kwargs={"settings": settings, "cohort": cohort.store, "identify": worker_identity},
        compute=ray.data.ActorPoolStrategy(size=section.num_instance_actors),
        num_cpus=1,
    )
    for batch in statuses.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from batch.to_pylist()


def _count(status: dict[str, Any], tally: _Tally, task: Task) -> bool:
    """Note one finished field; True where it was the patient's last."""
    tally.left -= 1
    tally.seconds += status["seconds"]
    if status["kind"] is None:
        tally.workers.add(status["node"], status["pid"])
    else:
        tally.failures.append(FailureRow(status["path"], status["kind"], status["message"]))
    task.advance(note=f"{status['patient']} field {status['field']}: {status['cells']} cells")
    return tally.left == 0


def _collect(finishing: dict[Any, str], *, timeout: float | None) -> None:
    """Take the results of finished patients, so that their errors surface at once."""
    if not finishing:
        return
    done, _ = ray.wait(list(finishing), num_returns=1, timeout=timeout)
    for reference in done:
        ray.get(reference)
        del finishing[reference]


class _own_errors:  # noqa: N801  # used as a statement, like contextlib's
    """Give our own error instead of Ray's wrapping, where a worker raised one."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        seen: BaseException | None = error
        while seen is not None:
            cause = getattr(seen, "cause", None)
            for found in (cause, seen):
                if isinstance(found, CtcRayError) and found is not error:
                    raise found from None
            seen = seen.__cause__


def _check_resources(section: SegmentConfig) -> None:
    total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]  # Ray does not type it
    needed = section.num_network_actors * section.num_network_threads + section.num_instance_actors + 1
    if total.get("CPU", 0) < needed:
        raise ResourceError(
            f"segment needs {needed} logical CPUs ({section.num_network_actors} StarDist actors of "
            f"{section.num_network_threads} threads, {section.num_instance_actors} instance actors, 1 to read), the cluster has "
            f"{total.get('CPU', 0):g}: lower segment.num_network_actors or num_instance_actors, or raise ray.num_cpus"
        )
    if section.use_gpu and total.get("GPU", 0) < section.num_network_actors:
        raise ResourceError(
            f"segment.use_gpu needs {section.num_network_actors} GPUs, the cluster has {total.get('GPU', 0):g}"
        )


def _clear_leftovers(cohort: Cohort, plans: Sequence[PatientPlan]) -> None:
    """Delete parts that an interruption left between the record and the end."""
    for plan in plans:
        cohort.store.delete_folder(f"{cohort.cells(plan.patient)}/_parts")


def _result(
    section: SegmentConfig,
    cohort: Cohort,
    plans: Sequence[PatientPlan],
    open_plans: Sequence[PatientPlan],
    empty: dict[str, FailureRow],
    seconds: float,
) -> StageResult:
    records = {plan.patient: read_record(cohort.store, cohort.cells(plan.patient)) for plan in plans}
    totals: defaultdict[str, int] = defaultdict(int)
    for record in records.values():
        for name in ("cells", "physical_cells", "fields", "segmented", "failed", "archive_failures"):
            totals[name] += record.counts.get(name, 0) if record else 0
    computed = sum(record.units_computed for plan in open_plans if (record := records[plan.patient]))
    failed, fields = totals["failed"] + len(empty), max(totals["fields"], totals["failed"]) + len(empty)
    if failed > section.max_failure_fraction * fields:
        raise TooManyFailuresError(
            f"{failed} of {fields} fields could not be segmented, more than segment.max_failure_fraction = "
            f"{section.max_failure_fraction:g} allows. All others are saved; the reasons are in "
            f"{cohort.store.describe(f'failures/{STAGE}')}. Mend the files and run again with --retry-failed"
        )
    return StageResult(
        stage=STAGE,
        units_computed=computed,
        units_reused=totals["segmented"] - computed,
        set_aside=failed + totals["archive_failures"],
        counts={"patients": len(plans), **totals},
        paths=tuple(cohort.cells(plan.patient) for plan in plans),
        seconds=seconds,
    )
