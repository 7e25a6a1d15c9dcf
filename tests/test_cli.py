import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from ctc_ray import cli, command_options
from ctc_ray.cli import main
from ctc_ray.cluster import examine
from ctc_ray.cohort import Cohort
from ctc_ray.config import RunConfig
from ctc_ray.errors import CartridgeError, ConfigError
from ctc_ray.records import PlanRow, StageResult, State
from ctc_ray.submit import entrypoint_of

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(list(words))
        captured = capsys.readouterr()
        code = end.value.code
        return (code if isinstance(code, int) else 0), captured.out, captured.err

    return call


@pytest.fixture
def cohort(tmp_path: Path) -> str:
    Cohort.open(str(tmp_path / "c"), create=True).add_patients({"007": "a", "12": "b", "Müller 3": "c"})
    return str(tmp_path / "c")


def test_cli_help_lists_every_stage(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for stage in (
        "segment",
        "split",
        "pretrain",
        "embed",
        "map",
        "train",
        "index",
        "simulate",
        "detect",
        "compare",
        "report",
    ):
        assert f" {stage} " in out


def test_cli_unknown_command_is_a_usage_error(run: Run) -> None:
    assert run("embedd", "x")[0] == 2


def test_cli_missing_cohort_is_one_message_without_traceback(run: Run, tmp_path: Path) -> None:
    code, _, err = run("split", str(tmp_path / "none"))
    assert code == 1
    assert "holds no cohort" in err
    assert "Traceback" not in err


def test_cli_unknown_config_key_ends_with_code_2_and_the_nearest_key(run: Run, cohort: str) -> None:
    code, _, err = run("split", cohort, "--set", "split.trian=3")
    assert code == 2
    assert "did you mean 'train'" in err


def test_cli_debug_shows_where_an_unexpected_error_came_from(
    run: Run, cohort: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> StageResult:
        raise ZeroDivisionError("inside")

    monkeypatch.setattr("ctc_ray.split.split_patients", broken)
    code, _, err = run("split", cohort)
    assert code == 1
    assert "unexpected ZeroDivisionError: inside" in err
    assert "Traceback" not in err
    assert "Traceback" in run("--debug", "split", cohort)[2]


def test_cli_set_aside_units_end_with_code_3(run: Run, cohort: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctc_ray.split.split_patients", lambda *_: StageResult("split", 2, 1, set_aside=1))
    code, out, _ = run("split", cohort)
    assert code == command_options.EXIT_SET_ASIDE == 3
    assert "1 set aside" in out


def test_cli_dry_run_prints_units_with_state_and_reason_and_runs_nothing(
    run: Run, cohort: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def must_not_run(*_: object) -> StageResult:
        raise AssertionError("a dry run ran the stage")

    monkeypatch.setattr("ctc_ray.split.split_patients", must_not_run)
    monkeypatch.setattr("ctc_ray.split.plan_split", lambda *_: [PlanRow("Müller 3", State.STALE, "other settings")])
    code, out, _ = run("split", cohort, "--dry-run")
    assert code == 0
    assert "Müller 3" in out
    assert "stale" in out
    assert "other settings" in out


def test_cli_error_of_a_worker_is_shown_as_its_own_message() -> None:
    class RayWrapperError(Exception):
        cause = CartridgeError("page 3 is missing")

    assert str(cli._root_cause(RayWrapperError("a long remote traceback"))) == "page 3 is missing"


def test_cli_root_cause_keeps_our_message_over_the_library_error_below() -> None:
    error = ConfigError("ours")
    error.__cause__ = ValueError("low")
    assert str(cli._root_cause(error)) == "ours"


def test_cli_simulate_needs_a_cohort_or_a_release(run: Run) -> None:
    code, _, err = run("simulate")
    assert code == 2
    assert "--release" in err


def test_cli_simulate_takes_several_faults_and_refuses_them_in_faithful_mode(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, ...]] = []

    def plan(config: RunConfig, *_: object, **__: object) -> list[PlanRow]:
        seen.append(config.hil.faults)
        return []

    monkeypatch.setattr("ctc_ray.hil.stage.plan_simulate", plan)
    words = ("simulate", "--release", str(tmp_path), "--out", str(tmp_path / "out"), "--dry-run")
    assert run(*words, "--fault", "rounding", "--fault", "monte-carlo")[0] == 0
    assert seen == [("monte-carlo", "rounding")]
    code, _, err = run(*words, "--fault", "rounding", "--mode", "faithful")
    assert code == 2
    assert "faithful mode has every fault" in err
    code, _, err = run(*words, "--fault", "roundings")
    assert code == 2
    assert "short-cluster" in err  # the known ones


def test_cli_patients_may_be_repeated_or_separated_by_commas() -> None:
    assert command_options.parse_patients(["007,12", "Müller 3"]) == ["007", "12", "Müller 3"]
    assert command_options.parse_patients([]) is None


def test_submit_unknown_stage_is_refused(run: Run) -> None:
    code, _, err = run("submit", "embd", "c", "--address", "http://127.0.0.1:1")
    assert code == 2
    assert "unknown stage" in err


def test_submit_entrypoint_keeps_odd_arguments_whole() -> None:
    words = shlex.split(entrypoint_of("embed", ["./c", "--patients", "Müller 3", "--set", "embed.encoder=it's"]))
    assert words == [
        "python",
        "-m",
        "ctc_ray.cli",
        "embed",
        "./c",
        "--patients",
        "Müller 3",
        "--set",
        "embed.encoder=it's",
    ]


def test_doctor_reports_an_unwritable_cohort(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    finding = examine(str(tmp_path / "file" / "cohort"))[-1]
    assert not finding.ok
    assert finding.remedy


def test_doctor_of_a_good_machine_leaves_nothing_behind(tmp_path: Path) -> None:
    finding = examine(str(tmp_path))[-1]
    assert finding.ok
    assert list(tmp_path.iterdir()) == []
