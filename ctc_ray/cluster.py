"""Connect to Ray, and look at what a machine or cluster offers before a run relies on it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from ctc_ray.config import RayConfig
from ctc_ray.errors import ResourceError
from ctc_ray.node_report import MIN_MEMORY_GIB, Finding, NodeReport, compare, look_at_machine, memory_bytes
from ctc_ray.records import library_versions
from ctc_ray.storage import Store

_MIN_LOGICAL_CPUS = 4
"""A Data reader, two actor pools and a training process must fit at once: with fewer, Ray waits for ever without a word."""
_NODE_TIMEOUT_S = 180
"""A machine's first task waits for a worker process and, where it has GPUs, for torch to start twice."""
_QUIET = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # Ray's C++ core prints hints for its developers among our lines; its log files keep them
}
_started_here = False


@contextlib.contextmanager
def connect(address: str | None = None, config: RayConfig | None = None) -> Iterator[None]:
    """Connect to Ray while the block runs; a cluster that is already connected is used and left as it is.

    Args:
        address: `auto`, `ray://host:10001` or a GCS address; None starts a cluster on this machine, unless `RAY_ADDRESS` is set
            (as it is inside a Ray job).
        config: size of a local cluster.

    Raises:
        ResourceError: the cluster cannot be reached.
    """
    global _started_here
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield
        return
    settings = config or RayConfig()
    target = address or os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {
        "logging_level": logging.WARNING,
        "log_to_driver": bool(os.environ.get("CTC_RAY_WORKER_LOGS")),
    }
    try:
        if target:
            ray.init(address=target, **quiet)
        else:
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a private cluster on loopback needs no token file
            cpus = settings.num_cpus or max(os.cpu_count() or 1, _MIN_LOGICAL_CPUS)
            store_bytes = settings.object_store_mb * 2**20
            with _hidden_native_stderr():
                # "local": never join a cluster that happens to run on this machine; --address does that.
                ray.init("local", num_cpus=cpus, include_dashboard=False, object_store_memory=store_bytes, **quiet)
            _started_here = True
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = f"the Ray cluster at {target}" if target else "a Ray cluster on this machine"
        raise ResourceError(
            f"cannot connect to {where}: {error}. Check the address, or run `ctc-ray doctor`"
        ) from error
    _bound_data_blocks()
    try:
        yield
    finally:
        _started_here = False
        ray.shutdown()


def started_here() -> bool:
    """Whether `connect` started the cluster in use on this machine: it has all the machines that it will ever have."""
    return _started_here


@contextlib.contextmanager
def _hidden_native_stderr() -> Iterator[None]:
    """Hide what Ray's C++ core prints while it starts: its errors come as exceptions, its log files keep the rest."""
    sys.stderr.flush()
    saved, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(sink)


def _bound_data_blocks() -> None:
    """Set Ray Data up for pixel columns: small blocks, so that nothing spills, and a stalled plan that fails in minutes."""
    import ray
    from ray.util.debug import log_once

    log_once("ray_data_progress_manager_disabled")  # says once that bars are off: they are, ours stand in their place
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = 32 * 2**20
    context.max_consecutive_actor_init_deaths = 3  # a machine may be lost while an actor loads its model there
    context.enable_progress_bars = False
    context.execution_options.verbose_progress = False
    if hasattr(context, "execution_no_progress_timeout_s"):
        context.execution_no_progress_timeout_s = 600
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def worker_identity() -> tuple[str, int]:
    """Node id (short) and process id of the worker that calls; "local" outside Ray."""
    import ray

    if not ray.is_initialized():
        return "local", os.getpid()
    return str(ray.get_runtime_context().get_node_id())[:12], os.getpid()


@dataclass(frozen=True)
class Wanted:
    """Processors that a cluster should have before it is looked at."""

    cpus: int = 0
    gpus: int = 0
    timeout_s: float = 600.0


def examine(cohort_uri: str | None = None, address: str | None = None, wanted: Wanted | None = None) -> list[Finding]:
    """Look at versions, processors, memory, shared memory and write access, here and on every machine of a cluster.

    Args:
        cohort_uri: cohort whose write access is tried with small files that are deleted again.
        address: Ray cluster to look at too; None takes `RAY_ADDRESS` (set inside a Ray job), and else looks at this machine alone.
        wanted: processors to wait for, where the cluster starts machines on demand.

    Raises:
        ResourceError: the cluster cannot be reached.
    """
    versions = library_versions()
    findings = [Finding(name, value, ok=True) for name, value in versions.items()]
    missing = [name for name in ("ray", "torch", "stardist", "pyarrow") if name not in versions]
    findings += [Finding(name, "missing", ok=False, remedy="pip install ctc-ray") for name in missing]
    memory_gib = memory_bytes() / 2**30
    remedy = "the demo needs 8 GiB; close other programs or use a larger machine"
    findings.append(Finding("processors", str(os.cpu_count()), ok=True))
    findings.append(Finding("memory", f"{memory_gib:.1f} GiB", ok=memory_gib >= MIN_MEMORY_GIB, remedy=remedy))
    findings.append(_shared_memory())
    findings.append(_gpus())
    if cohort_uri is not None:
        findings.append(_write_access(cohort_uri))
    target = address or os.environ.get("RAY_ADDRESS")
    if target:
        store = Store(cohort_uri) if cohort_uri is not None and findings[-1].ok else None
        with connect(target):
            if wanted is not None:
                findings.append(bring_up(wanted))
            findings += _cluster_resources()
            findings += compare(_look_at_nodes(store), versions)
    return findings


def bring_up(wanted: Wanted) -> Finding:
    """Ask an autoscaling cluster for processors, and wait until they are there.

    The request is withdrawn at the end: what came up stays until the cluster's idle timeout, in which a stage can take it.

    Args:
        wanted: how much, and for how long to wait.
    """
    import ray
    from ray.autoscaler.sdk import request_resources

    request_resources(num_cpus=wanted.cpus, bundles=[{"GPU": 1}] * wanted.gpus)
    deadline = time.monotonic() + wanted.timeout_s
    try:
        while True:
            there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
            enough = there.get("CPU", 0.0) >= wanted.cpus and there.get("GPU", 0.0) >= wanted.gpus
            if enough or time.monotonic() >= deadline:
                break
            time.sleep(min(2.0, wanted.timeout_s))
    finally:
        request_resources(num_cpus=0, bundles=[])
    return Finding(
        "asked for",
        f"{wanted.cpus} CPUs and {wanted.gpus} GPUs; {there.get('CPU', 0.0):g} and {there.get('GPU', 0.0):g} are there",
        ok=enough,
        remedy="look at `ray status` on the head: a limit of the cluster's file, a quota, or no spot machines",
    )


def _cluster_resources() -> list[Finding]:
    import ray

    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    cpus = resources.get("CPU", 0.0)
    remedy = (
        "stages hold a reader beside their pools: add a worker with processors; where workers start on demand, "
        "ask for them: doctor --cpus N --gpus N"
    )
    return [
        Finding("cluster nodes", str(len(_alive_nodes())), ok=True),
        Finding("cluster CPUs", f"{cpus:g}", ok=cpus >= _MIN_LOGICAL_CPUS, remedy=remedy),
        Finding("cluster GPUs", f"{resources.get('GPU', 0.0):g}", ok=True),
    ]


def _alive_nodes() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def _look_at_nodes(store: Store | None) -> list[NodeReport]:
    """Run one small task on every machine; a machine that cannot run it is reported, not raised."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    folder = f"_doctor-{uuid.uuid4().hex[:12]}"
    if store is not None:
        store.write_bytes(f"{folder}/driver", b"written by ctc-ray doctor")
    look = ray.remote(num_cpus=0, max_retries=0)(look_at_machine)
    tasks: dict[Any, dict[str, Any]] = {}
    for node in _alive_nodes():
        pinned = look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        has_gpu = node["Resources"].get("GPU", 0.0) > 0
        tasks[pinned.remote(node["NodeID"], has_gpu, store, folder)] = node
    try:
        ready, _ = ray.wait(list(tasks), num_returns=len(tasks), timeout=_NODE_TIMEOUT_S)
        seen = set() if store is None else set(store.list_files(folder))
        reports = [_report(node, task if task in ready else None, store, folder, seen) for task, node in tasks.items()]
    finally:
        if store is not None:
            store.delete_folder(folder)
    return sorted(reports, key=lambda report: report.node)


def _report(node: dict[str, Any], task: Any, store: Store | None, folder: str, seen: set[str]) -> NodeReport:
    """Report of one machine from its finished task; `task` None where it did not finish in time."""
    import ray

    resources = node["Resources"]
    report = NodeReport(
        node=f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})",
        cpus=resources.get("CPU", 0.0),
        gpus=resources.get("GPU", 0.0),
        object_store_bytes=int(resources.get("object_store_memory", 0)),
    )
    if task is None:
        return dataclasses.replace(report, error=f"no answer within {_NODE_TIMEOUT_S} s")
    try:
        found: dict[str, Any] = ray.get(task)
    except ray.exceptions.RayError as error:
        return dataclasses.replace(report, error=str(error).strip().splitlines()[-1])
    if store is not None and not found["cohort_problem"] and f"{folder}/{node['NodeID']}" not in seen:
        found["cohort_problem"] = "what is written there does not arrive here: not one shared folder"
    known = {field.name for field in dataclasses.fields(NodeReport)}  # another version there may say more
    return dataclasses.replace(report, **{name: value for name, value in found.items() if name in known})


def _shared_memory() -> Finding:
    path = "/dev/shm"
    if not os.path.isdir(path):
        return Finding("shared memory", "no /dev/shm", ok=True)
    free_gib = shutil.disk_usage(path).free / 2**30
    return Finding(
        "shared memory",
        f"{free_gib:.1f} GiB free",
        ok=free_gib >= 0.5,
        remedy="start the container with --shm-size=2g or more",
    )


def _gpus() -> Finding:
    if find_spec("torch") is None:
        return Finding("GPU", "unknown: torch is missing", ok=False, remedy="pip install ctc-ray")
    import torch

    if not torch.cuda.is_available():
        return Finding("GPU", "none (all stages run on processors)", ok=True)
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return Finding("GPU", names, ok=True)


def _write_access(cohort_uri: str) -> Finding:
    store = Store(cohort_uri)
    try:
        store.write_bytes("_doctor", b"written by ctc-ray doctor")
        store.delete("_doctor")
    except OSError as error:
        return Finding(
            "write access",
            str(error),
            ok=False,
            remedy="give this user write permission, or choose another cohort path",
        )
    return Finding("write access", f"{cohort_uri} is writable", ok=True)
