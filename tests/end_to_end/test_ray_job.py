"""A stage as a Ray job, on a cluster that `ray start --head` made."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from runner import Demo, ctc_ray, record

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
BIN = Path(sys.executable).parent


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def dashboard(tmp_path: Path) -> Iterator[str]:
    port = _free_port()
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "RAY_AUTH_MODE": "disabled"}
    options = ["--num-cpus=4", f"--port={_free_port()}", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}"]
    # Another cluster on this machine (the session's own) holds the default ports of the agent that starts jobs.
    options += [f"--dashboard-agent-listen-port={_free_port()}", f"--dashboard-agent-grpc-port={_free_port()}"]
    head = subprocess.Popen(
        [str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats", *options],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_for(f"{url}/api/version", head)
        yield url
    finally:
        head.terminate()
        head.wait(timeout=60)


def _wait_for(url: str, head: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert head.poll() is None, "ray start --head ended"
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"the dashboard at {url} never answered")


def test_embed_runs_as_a_ray_job_and_through_submit(demo: Demo, tmp_path: Path, dashboard: str) -> None:
    cohort = demo.copy(tmp_path / "cohort")
    shutil.rmtree(cohort / "embeddings" / "dino" / "P01")
    entry = [sys.executable, "-m", "jobs.embed", str(cohort), "--patients", "P01"]
    done = subprocess.run(
        [str(BIN / "ray"), "job", "submit", "--address", dashboard, "--", *entry],
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert record(cohort / "embeddings" / "dino" / "P01")["units_computed"] > 0
    shutil.rmtree(cohort / "embeddings" / "dino" / "P02")
    run = ctc_ray("submit", "embed", str(cohort), "--address", dashboard)
    assert run.code == 0, run.out[-3000:] + run.err[-3000:]
    assert record(cohort / "embeddings" / "dino" / "P02")["units_computed"] > 0
    failed = ctc_ray("submit", "embed", str(tmp_path / "none"), "--address", dashboard)
    assert failed.code == 1
    assert "holds no cohort" in failed.out
