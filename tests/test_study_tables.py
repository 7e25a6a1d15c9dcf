"""The tables in docs/hil_study.md are those that `benchmarks.hil_study show` prints from the committed results."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from ctc_ray.config import HilConfig
from ctc_ray.hil.strategies import RECOMMENDED, STRATEGIES

_ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(_ROOT))  # the benchmarks are scripts beside the package
judgement, tables_of = (importlib.import_module(f"benchmarks.hil_study_{name}") for name in ("judgement", "tables"))
_STUDY = json.loads((_ROOT / "benchmarks" / "results" / "hil_study.json").read_text())


def test_document_holds_every_table_of_the_committed_results() -> None:
    document = (_ROOT / "docs" / "hil_study.md").read_text()
    tables = "\n".join(tables_of.markdown(_STUDY)).strip()
    assert tables.count("\n| ") > 6 * len(STRATEGIES)
    assert tables in document


def test_recommended_strategy_is_the_one_that_the_rule_chose_and_is_simulated_by_default() -> None:
    assert (
        judgement.recommend(_STUDY["choose"]["data"])["recommended"] == _STUDY["choose"]["recommended"] == RECOMMENDED
    )
    assert RECOMMENDED in HilConfig().strategies
