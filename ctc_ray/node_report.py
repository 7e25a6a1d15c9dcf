"""What one machine of a cluster says about itself, and what does not fit together: the part of `ctc-ray doctor` without Ray."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from ctc_ray.errors import CtcRayError
from ctc_ray.records import library_versions
from ctc_ray.storage import Store

MIN_MEMORY_GIB = 6.0
"""Memory below which a stage with two actors and a reader is known to be killed."""
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_SHARED_MEMORY = "/dev/shm"
_GPU_NAMES = "import torch\nfor i in range(torch.cuda.device_count()): print(torch.cuda.get_device_name(i))"
_NAMED_NODES = 4
"""Machines named in one line of a problem; the rest are counted."""


@dataclass(frozen=True)
class Finding:
    """One line of `ctc-ray doctor`."""

    what: str
    value: str
    ok: bool
    remedy: str = ""


@dataclass(frozen=True)
class NodeReport:
    """What is known of one machine of the cluster."""

    node: str
    """Address and short id."""
    cpus: float = 0.0
    """CPUs that Ray schedules there."""
    gpus: float = 0.0
    """GPUs that Ray schedules there."""
    object_store_bytes: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    """Distribution -> version; also `python`."""
    memory_bytes: int = 0
    """Memory that a process may use there: of the container, where it is limited."""
    shared_memory_bytes: int | None = None
    """Size of /dev/shm; None where the system has none."""
    gpu_names: Sequence[str] = ()
    """Devices that torch can use there."""
    cohort_problem: str = ""
    """Why the cohort cannot be read and written from there; empty where it can, or where nobody asked."""
    error: str = ""
    """Why nothing is known of the machine; empty where it answered."""


def look_at_machine(node_id: str, has_gpu: bool, store: Store | None, folder: str) -> dict[str, Any]:
    """Look at the machine this runs on.

    Args:
        node_id: name of the file that is written below `folder`.
        has_gpu: whether torch is asked for its devices (in a process of its own: Ray hides them from a task that asked for none).
        store: cohort; None leaves it alone.
        folder: folder of the cohort in which the driver wrote a file `driver`.

    Returns:
        Fields of `NodeReport`, as plain values: a machine with another version of ctc_ray may answer too.
    """
    shared = shutil.disk_usage(_SHARED_MEMORY).total if os.path.isdir(_SHARED_MEMORY) else None
    return {
        "versions": library_versions(),
        "memory_bytes": memory_bytes(),
        "shared_memory_bytes": shared,
        "gpu_names": gpu_names() if has_gpu else [],
        "cohort_problem": "" if store is None else cohort_problem(store, folder, node_id),
    }


def memory_bytes(limits: Iterable[str] = _CGROUP_LIMITS) -> int:
    """Memory that processes here may use: the machine's, or the container's limit where that is less.

    Args:
        limits: files in which the kernel states the limit in bytes, or `max`.
    """
    found = [psutil.virtual_memory().total]
    for path in limits:
        try:
            text = Path(path).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():
            found.append(int(text))
    return min(found)


def gpu_names(timeout_s: float = 90.0) -> list[str]:
    """Names of the GPUs that torch can use on this machine, whatever this process may see of them.

    Args:
        timeout_s: seconds after which a hanging driver counts as no GPU.
    """
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _GPU_NAMES],
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return []
    return done.stdout.split("\n")[:-1] if done.returncode == 0 else []


def cohort_problem(store: Store, folder: str, name: str) -> str:
    """Read the driver's file and write one beside it.

    Args:
        store: cohort.
        folder: folder below it that holds the file `driver`.
        name: file to write.

    Returns:
        What went wrong; empty where both worked.
    """
    try:
        store.read_bytes(f"{folder}/driver")
    except (OSError, CtcRayError) as error:
        return f"a file that the driver wrote cannot be read: {error}"
    try:
        store.write_bytes(f"{folder}/{name}", b"written by ctc-ray doctor")
    except (OSError, CtcRayError) as error:
        return str(error)
    return ""


def compare(reports: Sequence[NodeReport], here: Mapping[str, str]) -> list[Finding]:
    """Say of every machine what it has, and what is wrong with it; like problems share a line.

    Args:
        reports: one a machine.
        here: versions of this process, from which those of the machines must not differ.

    Returns:
        A line a machine, then a line a problem.
    """
    findings = [Finding(f"node {report.node}", _describe(report), ok=not report.error) for report in reports]
    problems: dict[tuple[str, str, str], list[str]] = {}
    for report in reports:
        for problem in _problems(report, here):
            problems.setdefault(problem, []).append(report.node)
    for (what, value, remedy), nodes in problems.items():
        findings.append(Finding(what, f"{value}: {_named(nodes)}", ok=False, remedy=remedy))
    return findings


def _problems(report: NodeReport, here: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """What, value and remedy of all that is wrong with a machine."""
    if report.error:
        remedy = "install the same ctc_ray there (image or setup commands), and look at that machine's Ray logs"
        return [("ctc_ray on the node", report.error, remedy)]
    found = []
    for name, wanted in here.items():
        version = report.versions.get(name, "missing")
        if _release(name, version) != _release(name, wanted):
            remedy = f"give every machine {name} {_release(name, wanted)}: one image, or one setup command"
            found.append((name, f"{version}, here {wanted}", remedy))
    memory_gib = report.memory_bytes / 2**30
    if report.cpus > 0 and memory_gib < MIN_MEMORY_GIB:
        remedy = f"at least {MIN_MEMORY_GIB:g} GiB: a larger machine, or a higher memory limit of the container"
        found.append(("memory", f"{memory_gib:.1f} GiB", remedy))
    shared = report.shared_memory_bytes
    if shared is not None and shared < report.object_store_bytes:
        value = f"{shared / 2**30:.1f} GiB for an object store of {report.object_store_bytes / 2**30:.1f} GiB"
        remedy = "docker --shm-size, or an emptyDir of medium Memory on /dev/shm: else objects lie on disk"
        found.append(("shared memory", value, remedy))
    if report.gpus > len(report.gpu_names):
        value = f"Ray counts {report.gpus:g}, torch can use {len(report.gpu_names)}"
        remedy = "a GPU image whose CUDA fits the machine's driver; on Kubernetes, the device plugin"
        found.append(("GPU", value, remedy))
    if report.cohort_problem:
        remedy = "a URI that every machine reaches (s3://, or a folder mounted everywhere), and its credentials there"
        found.append(("cohort", report.cohort_problem, remedy))
    return found


def _release(name: str, version: str) -> str:
    """Part of a version that has to agree: Python without its patch, a wheel without its local build (`+cu128`)."""
    if name == "python":
        return ".".join(version.split(".")[:2])
    return version.partition("+")[0]


def _describe(report: NodeReport) -> str:
    if report.error:
        return "did not answer"
    shared = report.shared_memory_bytes
    parts = [
        f"{report.cpus:g} CPU",
        f"{report.gpus:g} GPU" + (f" ({', '.join(report.gpu_names)})" if report.gpu_names else ""),
        f"{report.memory_bytes / 2**30:.1f} GiB",
        "no /dev/shm" if shared is None else f"/dev/shm {shared / 2**30:.1f} GiB",
        f"object store {report.object_store_bytes / 2**30:.1f} GiB",
    ]
    parts += [f"{name} {report.versions.get(name, 'missing')}" for name in ("ctc-ray", "ray", "torch", "python")]
    return ", ".join(parts)


def _named(nodes: Sequence[str]) -> str:
    named = ", ".join(nodes[:_NAMED_NODES])
    return named + (f" and {len(nodes) - _NAMED_NODES} more" if len(nodes) > _NAMED_NODES else "")
