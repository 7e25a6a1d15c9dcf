"""The tables in docs/hil_study.md are those that `benchmarks.hil_study show` prints from the committed results."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.hil_study_judgement import recommend
from benchmarks.hil_study_tables import markdown
from ctc_ray.config import HilConfig
from ctc_ray.hil.strategies import RECOMMENDED, STRATEGIES

_ROOT = Path(__file__).parents[1]
_STUDY = json.loads((_ROOT / "benchmarks" / "results" / "hil_study.json").read_text())


def test_document_holds_every_table_of_the_committed_results() -> None:
    document = (_ROOT / "docs" / "hil_study.md").read_text()
    tables = "\n".join(markdown(_STUDY)).strip()
    assert tables.count("\n| ") > 6 * len(STRATEGIES)
    assert tables in document


def test_recommended_strategy_is_the_one_that_the_rule_chose_and_is_simulated_by_default() -> None:
    assert recommend(_STUDY["choose"]["data"])["recommended"] == _STUDY["choose"]["recommended"] == RECOMMENDED
    assert RECOMMENDED in HilConfig().strategies
