"""One full demo a session; the tests read it, copy it, or kill runs beside it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # `runner` stands beside the tests

from runner import Demo, ctc_ray


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """The demo as shipped, run once as a user runs it; CTC_RAY_TEST_DEMO names a finished one to save time while developing."""
    if kept := os.environ.get("CTC_RAY_TEST_DEMO"):
        return Demo(Path(kept), ctc_ray("demo", kept))
    out = tmp_path_factory.mktemp("demo run") / "demo"  # a path with a space, as users have
    run = ctc_ray("demo", str(out))
    assert run.code == 0, f"the demo ended with {run.code}:\n{run.out[-2000:]}\n{run.err[-4000:]}"
    return Demo(out, run)
