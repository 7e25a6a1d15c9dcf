"""Run a stage as a Ray job: the same command, on the cluster that owns the dashboard."""

from __future__ import annotations

import asyncio
import difflib
import os
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import yaml

from ctc_ray.errors import ConfigError, ResourceError

PACKAGE_EXCLUDES = (
    ".git/",
    ".venv*/",
    "venv/",
    "__pycache__/",
    ".*_cache/",
    ".hypothesis/",
    "*.egg-info/",
    "/build/",
    "/dist/",
    "/demo/",
    "/cohort/",
    "/out/",
    "/tests/",
    "/benchmarks/results/",
    "*.parquet",
    "*.tif",
    "*.tiff",
    "*.npz",
    "*.npy",
    "*.faiss",
    "*.log",
)
"""What a submitted working directory leaves behind, as in a .gitignore file: environments, caches, outputs and data. Weights that the
package ships are safetensors and go along."""
_SET_ASIDE = 3
"""Exit code of a stage that finished with some units in `failures/`."""
_INTERRUPTED = 130
"""Exit code of a command that the user interrupted, as shells give it."""
_LOST_CONNECTIONS = 20
"""Failed looks at a job, two seconds apart, after which its dashboard counts as gone."""


class JobClient(Protocol):
    """The part of Ray's `JobSubmissionClient` that following a job needs."""

    def tail_job_logs(self, job_id: str) -> Any:
        """Async iterator over the job's output, from its first line."""

    def get_job_info(self, job_id: str) -> Any:
        """The job's `status`, `message` and `driver_exit_code`."""


def entrypoint_of(stage: str, arguments: Sequence[str]) -> str:
    """Shell command that the job runs on the head node.

    Args:
        stage: sub-command of `ctc-ray`.
        arguments: its arguments.

    Returns:
        A quoted command line; ids with spaces or quotes survive it.
    """
    return shlex.join(["python", "-m", "ctc_ray.cli", stage, *arguments])


def runtime_env_of(
    file: Path | None = None,
    env: Iterable[str] = (),
    working_dir: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Ray runtime environment of a job.

    Args:
        file: YAML or JSON with Ray's own keys (`working_dir`, `pip`, `image_uri`, `env_vars`, ...); None for an empty one.
        env: `NAME=VALUE`, or `NAME` alone, whose value is this process's; they win over the file.
        working_dir: folder to send along, or a URI; it wins over the file.
        environment: where values of bare names come from; None takes this process's environment.

    Returns:
        What `JobSubmissionClient.submit_job` takes. A local `working_dir` also leaves out `PACKAGE_EXCLUDES`.

    Raises:
        ConfigError: the file cannot be read, a key is unknown to Ray, or a variable has no value.
    """
    values = {} if file is None else _read_runtime_env(file)
    variables = values.get("env_vars") or {}
    if not isinstance(variables, dict):
        raise ConfigError(f"{file}: env_vars must map names to values, not {variables!r}")
    # Ray takes text alone; YAML reads 1 as a number.
    variables = {str(name): value if isinstance(value, str) else yaml_text(value) for name, value in variables.items()}
    variables |= dict(_variable(text, os.environ if environment is None else environment) for text in env)
    if variables:
        values["env_vars"] = variables
    if working_dir is not None:
        values["working_dir"] = working_dir
    folder = values.get("working_dir")
    if isinstance(folder, str) and "://" not in folder and not folder.endswith(".zip"):
        if not Path(folder).is_dir():
            raise ConfigError(
                f"working directory {folder!r} is not a folder of this machine; give a folder, or a URI of a zip"
            )
        values["excludes"] = [*PACKAGE_EXCLUDES, *(values.get("excludes") or [])]
    return values


def yaml_text(value: object) -> str:
    """A value as YAML writes it: `true`, `1`, `0.5`."""
    return yaml.safe_dump(value, default_flow_style=True).splitlines()[0]


def _read_runtime_env(file: Path) -> dict[str, Any]:
    from ray.runtime_env import RuntimeEnv

    try:
        loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the runtime environment {file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not YAML: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{file} must hold keys such as env_vars and pip, not a {type(loaded).__name__}")
    known = sorted(name for name in RuntimeEnv.known_fields if not name.startswith("_"))
    for name in loaded:
        if name not in known:  # Ray itself would go on without it
            close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"Ray knows {', '.join(known)}"
            raise ConfigError(f"{file}: unknown key {name!r} of a runtime environment: {hint}")
    return dict(loaded)


def _variable(text: str, environment: Mapping[str, str]) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name:
        raise ConfigError(f"--env {text!r}: write NAME=VALUE, or NAME to take this machine's value")
    if equals:
        return name, value
    if name not in environment:
        raise ConfigError(f"--env {name}: {name} is not set on this machine; set it, or write {name}=VALUE")
    return name, environment[name]


def check_files_reach_the_cluster(arguments: Sequence[str], runtime_env: Mapping[str, Any]) -> None:
    """Refuse a relative `--config` that would stay on this machine.

    Args:
        arguments: of the stage.
        runtime_env: of the job.

    Raises:
        ConfigError: a relative configuration is named, and no working directory that holds it goes along.
    """
    for place, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if name != "--config" or (not equals and place + 1 == len(arguments)):
            continue
        config = Path(value if equals else arguments[place + 1])
        if config.is_absolute():
            continue  # a path of the cluster's machines
        folder = runtime_env.get("working_dir")
        if folder is None or ("://" not in folder and Path(folder).is_dir() and not (Path(folder) / config).is_file()):
            raise ConfigError(
                f"--config {config} does not reach the cluster: send a folder that holds it with --working-dir, name a path "
                "on the cluster's machines, or use --set"
            )


def submit_stage(
    stage: str, arguments: Sequence[str], *, address: str, wait: bool, runtime_env: Mapping[str, Any] | None = None
) -> int:
    """Submit one stage, and follow its log.

    Args:
        stage: sub-command of `ctc-ray`.
        arguments: its arguments; paths must be reachable from the cluster.
        address: dashboard, http://head:8265.
        wait: whether to follow the job until it ends.
        runtime_env: from `runtime_env_of`; None sends nothing along.

    Returns:
        0 when the job was submitted; with `wait`, the stage's own exit code (3: done, with some units set aside), or 1 where it
        was stopped or lost.

    Raises:
        ResourceError: the dashboard cannot be reached, or refuses the job.
    """
    from ray.job_submission import JobSubmissionClient

    try:
        client = JobSubmissionClient(address)
        job_id = client.submit_job(entrypoint=entrypoint_of(stage, arguments), runtime_env=dict(runtime_env or {}))
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ResourceError(
            f"cannot submit to {address}: {error}. Is the dashboard reachable, and ray[default] installed there?"
        ) from error
    _say(f"submitted {job_id}: {stage}")
    if not wait:
        return 0
    try:
        return follow(client, job_id)
    except KeyboardInterrupt:
        _say(
            f"\n{job_id} goes on. Its log: ray job logs --follow --address {address} {job_id}; "
            f"to end it: ray job stop --address {address} {job_id}"
        )
        return _INTERRUPTED


def follow(client: JobClient, job_id: str, *, pause_s: float = 2.0) -> int:
    """Print a job's log until it ends, through lost connections.

    Args:
        client: of the dashboard.
        job_id: what `submit_job` gave.
        pause_s: between looks at a job whose log has ended or broken off.

    Returns:
        Exit code of the job's command; 1 where it has none.

    Raises:
        ResourceError: the dashboard stays out of reach.
    """
    import aiohttp

    printed = 0

    async def print_log() -> None:
        nonlocal printed
        received = 0
        async for text in client.tail_job_logs(job_id):  # every connection starts at the first line
            fresh = text[max(0, printed - received) :]
            received += len(text)
            if fresh:
                printed = received
                sys.stdout.write(fresh)
                sys.stdout.flush()

    lost = 0
    while True:
        problem: Exception | None = None
        info = None
        try:
            asyncio.run(print_log())
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            problem = error
        try:
            info = client.get_job_info(job_id)
        except (RuntimeError, OSError) as error:
            problem = error
        if info is not None and info.status.is_terminal():
            return _ended(job_id, info)
        lost = lost + 1 if problem is not None else 0
        if lost >= _LOST_CONNECTIONS:
            raise ResourceError(
                f"lost the dashboard while {job_id} ran ({problem}); the job may go on: ray job status {job_id}"
            ) from problem
        time.sleep(pause_s)


def _ended(job_id: str, info: Any) -> int:
    """Say how a job ended; its exit code."""
    code = info.driver_exit_code
    if info.status == "SUCCEEDED":
        _say(f"{job_id}: {info.status}")
        return 0
    if code == _SET_ASIDE:
        _say(f"{job_id}: done, with some units set aside (exit code 3; Ray calls it {info.status})")
        return _SET_ASIDE
    _say(f"{job_id}: {info.status}" + (f": {info.message}" if info.message else ""))
    return code if isinstance(code, int) and code > 0 else 1


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - the output of the command
