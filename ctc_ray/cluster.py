"""Connect to Ray, and look at what a machine or cluster offers before a run relies on it."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import psutil

from ctc_ray.config import RayConfig
from ctc_ray.errors import ResourceError
from ctc_ray.records import library_versions
from ctc_ray.storage import Store

_MIN_LOGICAL_CPUS = 4
"""A Data reader, two actor pools and a training process must fit at once: with fewer, Ray waits for ever without a word."""
_QUIET = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # Ray's C++ core prints hints for its developers among our lines; its log files keep them
}


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
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = f"the Ray cluster at {target}" if target else "a Ray cluster on this machine"
        raise ResourceError(
            f"cannot connect to {where}: {error}. Check the address, or run `ctc-ray doctor`"
        ) from error
    _bound_data_blocks()
    try:
        yield
    finally:
        ray.shutdown()


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
class Finding:
    """One line of `ctc-ray doctor`."""

    what: str
    value: str
    ok: bool
    remedy: str = ""


def examine(cohort_uri: str | None = None, address: str | None = None) -> list[Finding]:
    """Look at versions, processors, memory, shared memory and write access; nothing is changed.

    Args:
        cohort_uri: cohort whose write access is tried with a small file that is deleted again.
        address: Ray cluster to look at too; None looks at this machine alone.

    Raises:
        ResourceError: the cluster cannot be reached.
    """
    versions = library_versions()
    findings = [Finding(name, value, ok=True) for name, value in versions.items()]
    missing = [name for name in ("ray", "torch", "stardist", "pyarrow") if name not in versions]
    findings += [Finding(name, "missing", ok=False, remedy="pip install ctc-ray") for name in missing]
    memory_gib = psutil.virtual_memory().total / 2**30
    remedy = "the demo needs 8 GiB; close other programs or use a larger machine"
    findings.append(Finding("processors", str(os.cpu_count()), ok=True))
    findings.append(Finding("memory", f"{memory_gib:.1f} GiB", ok=memory_gib >= 6, remedy=remedy))
    findings.append(_shared_memory())
    findings.append(_gpus())
    if cohort_uri is not None:
        findings.append(_write_access(cohort_uri))
    if address is not None:
        findings += _cluster_resources(address)
    return findings


def _cluster_resources(address: str) -> list[Finding]:
    import ray

    with connect(address):
        nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    cpus = resources.get("CPU", 0.0)
    remedy = "stages hold a reader beside their pools: add a worker with processors"
    return [
        Finding("cluster nodes", str(len(nodes)), ok=bool(nodes)),
        Finding("cluster CPUs", f"{cpus:g}", ok=cpus >= _MIN_LOGICAL_CPUS, remedy=remedy),
        Finding("cluster GPUs", f"{resources.get('GPU', 0.0):g}", ok=True),
    ]


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
