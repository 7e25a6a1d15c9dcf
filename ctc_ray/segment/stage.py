"""The stage `segment`: cartridge fields to cells, as one Ray Data plan over all patients."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from ctc_ray.actor_pools import fitted_pools
from ctc_ray.cluster import connect, worker_identity
from ctc_ray.cohort import Cohort
from ctc_ray.config import RunConfig, SegmentConfig
from ctc_ray.errors import CtcRayError, TooManyFailuresError
from ctc_ray.progress import Progress, Task
from ctc_ray.records import FailureRow, PlanRow, StageResult, State, WorkerTally, read_record, write_failures
from ctc_ray.segment.cells_step import CellCutter
from ctc_ray.segment.finish import finish_patient
from ctc_ray.segment.model import resolve_precision
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
from ctc_ray.segment.stream import field_tasks, instance_pool, network_device, network_pool, stream_candidates
from ctc_ray.storage import Store


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
    started, section, images = time.monotonic(), config.segment, Store(cartridges)
    with contextlib.ExitStack() as connection:

        def connected() -> None:
            connection.enter_context(connect(None, config.ray))

        run = look_at_patients(
            section, cohort, images, patients, force=force, retry_failed=retry_failed, connected=connected
        )
        pools: list[Any] = []
        if run.open_plans:
            connected()
            pools = fitted_pools(STAGE, [network_pool(section), instance_pool(section)], progress)
        begin(section, cohort, run)
        if run.open_plans:
            _segment(section, cohort, images, run, pools, progress)
    return segment_result(section, cohort, run, time.monotonic() - started)


@dataclass(frozen=True)
class SegmentRun:
    """What a run has to do, found without writing anything.

    Attributes:
        precision: that the network computes in.
        settings: the resolved configuration.
        plans: one a patient.
        empty: patients without a usable image, with the reason.
    """

    precision: str
    settings: Settings
    plans: tuple[PatientPlan, ...]
    empty: Mapping[str, FailureRow]

    @property
    def open_plans(self) -> list[PatientPlan]:
        """Those of patients for whom something is to be done."""
        return [plan for plan in self.plans if plan.is_open]


def look_at_patients(
    section: SegmentConfig,
    cohort: Cohort,
    images: Store,
    patients: Sequence[str] | None,
    *,
    force: bool,
    retry_failed: bool,
    connected: Callable[[], None],
) -> SegmentRun:
    """Plan a run; nothing is written.

    Args:
        section: of the stage.
        cohort: where cells go.
        images: the cartridges.
        patients: which; None for all.
        force: whether stale cells may be replaced.
        retry_failed: whether set-aside fields are tried again.
        connected: connects to Ray, where a worker has to be asked what `auto` means.

    Raises:
        StaleOutputError: a patient's cells were made otherwise, and neither `force` nor `retry_failed` covers it.
    """
    precision = recorded_precision(cohort, section.precision)
    if precision is None:
        connected()
        precision = _precision_of_workers(section)
    settings = resolve_settings(section, precision)
    plans, empty = plan_patients(section, settings, cohort, images, patients=patients, retry_failed=retry_failed)
    refuse_stale(cohort, plans, force=force)
    return SegmentRun(precision, settings, tuple(plans), empty)


def begin(section: SegmentConfig, cohort: Cohort, run: SegmentRun) -> None:
    """Write what is known before the first field: precision, patients, folders without images; and clear leftovers."""
    if section.precision == "auto":
        record_precision(cohort, run.precision)
    cohort.add_patients({plan.patient: plan.cartridge.folder for plan in run.plans})
    for patient, failure in run.empty.items():
        write_failures(cohort.store, STAGE, patient, [failure])
    for plan in run.plans:
        if not plan.is_open:  # parts that an interruption left between the record and the end
            cohort.store.delete_folder(f"{cohort.cells(plan.patient)}/_parts")


def _precision_of_workers(section: SegmentConfig) -> str:
    """What `auto` means on a worker that would run the network."""
    gpus = section.gpus_per_actor if section.use_gpu else 0
    as_remote: Any = ray.remote  # its types know functions without arguments only
    resolve = as_remote(_resolve_on_worker).options(num_cpus=1, num_gpus=gpus)
    return str(ray.get(resolve.remote(network_device(section))))


def _resolve_on_worker(device: str) -> str:
    import torch

    return resolve_precision("auto", torch.device(device))


def _segment(
    section: SegmentConfig, cohort: Cohort, images: Store, run: SegmentRun, pools: Sequence[Any], progress: Progress
) -> None:
    """Stream all open fields through the plan and finish each patient as soon as its last field is there."""
    plans = run.open_plans
    by_name = {plan.patient: plan for plan in plans}
    tallies = {plan.patient: _Tally(len(plan.todo), list(plan.cartridge.set_aside)) for plan in plans}
    finishing = TasksUnderWay(finish_patient)

    def begin_finish(patient: str) -> None:
        tally = tallies[patient]
        finishing.start(
            by_name[patient],
            run.settings,
            cohort,
            images,
            failures=tally.failures,
            workers=tally.workers.rows(),
            seconds=tally.seconds,
        )

    with progress.task("segment", total=sum(len(plan.todo) for plan in plans)) as task, own_errors():
        for patient, tally in tallies.items():
            if tally.left == 0:
                begin_finish(patient)
        for status in _statuses(section, cohort, images, run, pools):
            if _count(status, tallies[status["patient"]], task):
                begin_finish(status["patient"])
            finishing.collect()
        finishing.collect_all()


def _statuses(
    section: SegmentConfig, cohort: Cohort, images: Store, run: SegmentRun, pools: Sequence[Any]
) -> Iterator[dict[str, Any]]:
    """Run the plan; yields one row a field as they finish, in no particular order."""
    tasks = [task for plan in run.open_plans for task in field_tasks(plan, images, run.settings)]
    if not tasks:
        return
    statuses = stream_candidates(section, run.settings, images, tasks, pools[0]).map_batches(
        CellCutter,
        batch_size=1,
        batch_format="pyarrow",
        fn_constructor_kwargs={"settings": run.settings, "cohort": cohort.store, "identify": worker_identity},
        compute=pools[1],
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


class TasksUnderWay:
    """Finishing tasks of patients, started beside a running plan; their errors surface when they are collected."""

    def __init__(self, function: Callable[..., Any]) -> None:
        as_remote: Any = ray.remote  # its types know functions without arguments only
        self._task = as_remote(function).options(num_cpus=0.5, max_retries=2)
        self._under_way: list[Any] = []

    def start(self, *arguments: Any, **options: Any) -> None:
        """Start a task."""
        self._under_way.append(self._task.remote(*arguments, **options))

    def collect(self, timeout_s: float | None = 0) -> list[Any]:
        """Results of the tasks that are done; at least one is waited for where `timeout_s` is None."""
        if not self._under_way:
            return []
        done, self._under_way = ray.wait(self._under_way, num_returns=1, timeout=timeout_s)
        return list(ray.get(done))

    def collect_all(self) -> list[Any]:
        """Results of all tasks, waited for."""
        results: list[Any] = []
        while self._under_way:
            results += self.collect(timeout_s=None)
        return results


class own_errors:  # noqa: N801  # used as a statement, like contextlib's
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


def segment_result(section: SegmentConfig, cohort: Cohort, run: SegmentRun, seconds: float) -> StageResult:
    """Counts of a run that ended, from the records.

    Raises:
        TooManyFailuresError: more fields failed than `segment.max_failure_fraction` allows.
    """
    plans, open_plans, empty = run.plans, run.open_plans, run.empty
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
