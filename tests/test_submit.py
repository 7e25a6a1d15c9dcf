import asyncio
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from ctc_ray.cluster import Wanted, bring_up, examine
from ctc_ray.errors import ConfigError, ResourceError
from ctc_ray.submit import check_files_reach_the_cluster, follow, runtime_env_of

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


def _write(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


def test_without_options_nothing_goes_along() -> None:
    assert runtime_env_of() == {}


def test_variables_of_the_command_win_over_the_file_and_become_text(tmp_path: Path) -> None:
    file = _write(tmp_path / "env.yaml", {"env_vars": {"A": "file", "N": 1, "T": True}, "pip": ["x==1"]})
    found = runtime_env_of(file, ["A=command=1", "SECRET"], environment={"SECRET": "of the shell"})
    assert found["env_vars"] == {"A": "command=1", "N": "1", "T": "true", "SECRET": "of the shell"}
    assert found["pip"] == ["x==1"]
    assert "excludes" not in found


def test_a_variable_without_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="TOKEN is not set"):
        runtime_env_of(env=["TOKEN"], environment={})
    with pytest.raises(ConfigError, match="NAME=VALUE"):
        runtime_env_of(env=["=1"])


def test_an_unknown_key_is_refused_with_the_nearest_known_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'env_vars'"):
        runtime_env_of(_write(tmp_path / "env.yaml", {"env_var": {"A": "1"}}))
    with pytest.raises(ConfigError, match="cannot read"):
        runtime_env_of(tmp_path / "none.yaml")


def test_a_working_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a folder"):
        runtime_env_of(working_dir=str(tmp_path / "none"))
    assert "excludes" not in runtime_env_of(working_dir="s3://bucket/code.zip")


def _packaged(folder: Path, target: Path) -> set[str]:
    """Names that Ray itself puts into the package of a working directory."""
    from ray._private.runtime_env.packaging import create_package

    environment = runtime_env_of(working_dir=str(folder))
    create_package(str(folder), target, include_gitignore=False, excludes=environment["excludes"])
    with zipfile.ZipFile(target) as package:
        return {name for name in package.namelist() if not name.endswith("/")}


def test_the_package_holds_code_and_weights_and_leaves_data_behind(tmp_path: Path) -> None:
    kept = ["ctc_ray/a.py", "ctc_ray/weights/w.safetensors", "jobs/configs/cluster.yaml", "ctc_ray/build/b.py"]
    left = [
        ".git/objects/pack/big",
        ".venv/lib/big.so",
        ".venv-parity/big.so",
        "demo/cohort/cells/P01/part-000.parquet",
        "cohort/x.json",
        "data/P1/field.tif",
        "crops.npz",
        "ctc_ray/__pycache__/a.pyc",
        ".mypy_cache/big.db",
        "build/big",
        "ctc_ray.egg-info/SOURCES.txt",
    ]
    folder = tmp_path / "work"
    for name in [*kept, *left]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    assert _packaged(folder, tmp_path / "p.zip") == set(kept)


def test_the_package_of_this_repository_is_small_and_runs(tmp_path: Path) -> None:
    names = _packaged(ROOT, tmp_path / "p.zip")
    assert {"ctc_ray/cli.py", "jobs/embed.py", "jobs/configs/cluster.yaml", "pyproject.toml"} <= names
    assert not any(name.startswith((".git/", "tests/", ".venv")) for name in names)
    assert (tmp_path / "p.zip").stat().st_size < 64 * 2**20


@pytest.mark.parametrize("words", [["c", "--config", "my.yaml"], ["c", "--config=my.yaml"]])
def test_a_configuration_that_would_stay_here_is_refused(words: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not reach the cluster"):
        check_files_reach_the_cluster(words, {})
    with pytest.raises(ConfigError, match="does not reach the cluster"):
        check_files_reach_the_cluster(words, {"working_dir": str(tmp_path)})
    (tmp_path / "my.yaml").write_text("{}")
    check_files_reach_the_cluster(words, {"working_dir": str(tmp_path)})
    check_files_reach_the_cluster(["c", "--config", "/on/the/cluster.yaml"], {})


@dataclass
class _Status:
    name: str

    def is_terminal(self) -> bool:
        return self.name in ("SUCCEEDED", "FAILED", "STOPPED")

    def __eq__(self, other: object) -> bool:
        return self.name == other

    def __str__(self) -> str:
        return self.name


@dataclass
class _Info:
    status: _Status
    driver_exit_code: int | None = None
    message: str = ""


@dataclass
class _Client:
    """A dashboard whose connection breaks: `parts` holds what each connection gives, None for a break."""

    connections: list[list[str | None]]
    ends: list[_Info] = field(default_factory=list)

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        for part in self.connections.pop(0) if self.connections else []:
            await asyncio.sleep(0)
            if part is None:
                raise RuntimeError("connection closed")
            yield part

    def get_job_info(self, job_id: str) -> _Info:
        if not self.ends:
            raise ConnectionError("nobody there")
        return self.ends.pop(0)


RUNNING = _Info(_Status("RUNNING"))


def test_a_broken_connection_shows_every_line_once(capsys: pytest.CaptureFixture[str]) -> None:
    client = _Client([["one\n", "two\n", None], ["one\ntw", "o\nthree\n"]], [RUNNING, _Info(_Status("SUCCEEDED"), 0)])
    assert follow(client, "job", pause_s=0) == 0
    assert capsys.readouterr().out.startswith("one\ntwo\nthree\n")


@pytest.mark.parametrize(
    ("status", "code", "expected"), [("FAILED", 3, 3), ("FAILED", 2, 2), ("FAILED", None, 1), ("STOPPED", None, 1)]
)
def test_following_returns_the_exit_code_of_the_stage(status: str, code: int | None, expected: int) -> None:
    assert follow(_Client([["log"]], [_Info(_Status(status), code)]), "job", pause_s=0) == expected


def test_a_dashboard_that_stays_away_is_an_error_that_names_the_job() -> None:
    with pytest.raises(ResourceError, match="job-1"):
        follow(_Client([]), "job-1", pause_s=0)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_doctor_looks_at_the_nodes_and_leaves_the_cohort_as_it_was(tmp_path: Path) -> None:
    findings = examine(str(tmp_path), "auto")
    nodes = [finding for finding in findings if finding.what.startswith("node ")]
    assert len(nodes) == 1
    assert "4 CPU" in nodes[0].value
    assert all(finding.ok for finding in findings), findings
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_asking_a_cluster_for_what_it_has_succeeds_and_for_more_times_out() -> None:
    assert bring_up(Wanted(cpus=4, timeout_s=0)).ok
    asked = bring_up(Wanted(cpus=4, gpus=3, timeout_s=0))
    assert not asked.ok
    assert "3 GPUs" in asked.value


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _ray_start(options: list[str], folder: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "RAY_AUTH_MODE": "disabled"}
    # Another cluster on this machine may hold the default ports of the agent that starts jobs.
    options += [f"--dashboard-agent-listen-port={_free_port()}", f"--dashboard-agent-grpc-port={_free_port()}"]
    return subprocess.Popen(
        [str(BIN / "ray"), "start", "--block", "--disable-usage-stats", "--object-store-memory=80000000", *options],
        env=environment,
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@pytest.fixture
def two_nodes(tmp_path: Path) -> Iterator[str]:
    """Dashboard of a head without processors and one worker, as cluster.yaml makes them."""
    port, gcs = _free_port(), _free_port()
    dashboard = ["--dashboard-host=127.0.0.1", f"--dashboard-port={port}"]
    head = _ray_start(["--head", "--num-cpus=0", f"--port={gcs}", *dashboard], tmp_path)
    processes = [head]
    try:
        deadline = time.monotonic() + 120
        while True:
            assert head.poll() is None, "ray start --head ended"
            assert time.monotonic() < deadline, "the dashboard never answered"
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/version", timeout=2):
                    break
            except OSError:
                time.sleep(0.5)
        processes.append(_ray_start([f"--address=127.0.0.1:{gcs}", "--num-cpus=4"], tmp_path))
        yield f"http://127.0.0.1:{port}"
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait(timeout=60)


def _submit(*words: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "ctc_ray.cli", "submit", *words],
        cwd=ROOT,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_stages_run_as_jobs_with_their_exit_codes_logs_and_environment(two_nodes: str, tmp_path: Path) -> None:
    code, log = _submit("doctor", str(tmp_path), "--cpus", "4", "--timeout", "120", "--address", two_nodes)
    # RAY_ADDRESS is set inside a job, so that the doctor looks at the cluster without being told.
    assert code == 0, log
    assert "cluster nodes" in log
    assert len(re.findall(r"ok +node [0-9.]+ \(", log)) == 2, log
    assert re.search(r"asked for +4 CPUs and 0 GPUs; 4 and 0 are there", log), log
    small = ["--patients", "1", "--fields", "1", "--config", "jobs/configs/demo.yaml"]
    code, log = _submit("phantom", str(tmp_path / "c"), *small, "--working-dir", str(ROOT), "--address", two_nodes)
    assert code == 0, log
    assert "1 computed" in log
    assert list((tmp_path / "c").rglob("*.tif"))
    code, log = _submit("split", str(tmp_path / "none"), "--address", two_nodes, "--env", "OMP_NUM_THREADS=1")
    assert code == 1, log
    assert "holds no cohort" in log
    code, log = _submit("split", str(tmp_path), "--set", "split.nothing=1", "--address", two_nodes)
    assert code == 2, log
