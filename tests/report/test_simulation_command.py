"""The command that makes the page of a simulation: what it refuses, where it writes, how it ends."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import polars as pl
import pytest

from ctc_ray.cli import main
from ctc_ray.errors import ConfigError, MissingInputError, SchemaError
from ctc_ray.records import Record, publish, read_record, write_record
from ctc_ray.report.simulation_page import read_simulation, run_simulation_report
from ctc_ray.storage import Store

Write = Callable[..., Any]


def _copied(simulated: Any, tmp_path: Path, change: Callable[[pl.DataFrame], pl.DataFrame], name: str) -> Path:
    """The simulation with one table changed, its record fitting."""
    store = Store(tmp_path)
    record = read_record(Store(simulated.place.parent), simulated.place.name)
    assert record is not None
    tables = {"results.parquet": simulated.results, "effort.parquet": simulated.effort}
    tables[name] = change(tables[name])
    fresh = Record(record.stage, record.unit, record.identity, record.config, record.inputs)
    publish(store, "changed", {key: frame.to_arrow() for key, frame in tables.items()}, fresh)
    return tmp_path / "changed"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("results.parquet", lambda frame: frame.drop("num_train"), "results.parquet: missing columns num_train"),
        ("results.parquet", lambda frame: frame.head(0), "has no rows"),
        ("results.parquet", lambda frame: frame.with_columns(f1=pl.lit("high")), "results.parquet: .*high"),
        ("effort.parquet", lambda frame: frame.drop("minutes"), "effort.parquet: missing columns minutes"),
        (
            "effort.parquet",
            lambda frame: frame.filter(pl.col("loop") != 2),
            "loop 2: results and effort are of different",
        ),
    ],
)
def test_page_of_tables_that_do_not_fit_is_refused(
    simulated: Any, tmp_path: Path, name: str, change: Any, message: str
) -> None:
    with pytest.raises(SchemaError, match=message):
        run_simulation_report(str(_copied(simulated, tmp_path, change, name)))


def test_page_of_a_folder_without_results_is_refused_with_what_to_give(simulated: Any, tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"holds no finished simulation.*simulations/paper.*--release"):
        run_simulation_report(str(tmp_path / "none"))
    other = tmp_path / "other"
    publish(Store(tmp_path), "other", {"a.csv": b"a"}, Record("map", "map", "id", {}, {}))
    with pytest.raises(MissingInputError, match="holds no finished simulation"):
        run_simulation_report(str(other))
    assert not (other / "report.html").exists()


def test_page_of_damaged_results_is_refused(write_simulation: Write, tmp_path: Path) -> None:
    made = write_simulation(tmp_path / "cut", num_seeds=2, strategies=("random", "margin"))
    whole = (made.place / "results.parquet").read_bytes()
    (made.place / "results.parquet").write_bytes(whole[:-100])
    with pytest.raises(MissingInputError, match=r"results\.parquet is gone or not as recorded"):
        read_simulation(str(made.place))


def test_checks_of_a_release_that_lack_a_figure_are_refused(write_simulation: Write, tmp_path: Path) -> None:
    made = write_simulation(tmp_path / "checks", num_seeds=2, strategies=("random", "margin"))
    store, record = Store(tmp_path), read_record(Store(tmp_path), "checks")
    assert record is not None
    record.files["release_checks.json"] = store.write_bytes("checks/release_checks.json", b'{"adjusted_rand": 1}')
    write_record(store, "checks", record)
    with pytest.raises(SchemaError, match=r"release_checks\.json lacks"):
        read_simulation(str(made.place))


@pytest.mark.parametrize(
    ("place", "out", "message"),
    [
        ("/", None, "must name the folder of a simulation"),
        ("s3://bucket", None, "must name the folder of a simulation"),
        ("run", "pages", "must name an HTML file"),
        ("run", "page.csv", "must name an HTML file"),
    ],
)
def test_page_with_a_wrong_place_or_name_is_refused(place: str, out: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_simulation_report(place, out)


@pytest.mark.parametrize(("words", "code"), [(["none"], 1), (["none", "--out", "page.txt"], 2)])
def test_command_ends_with_one_message_and_the_documented_code(
    words: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["simulation-report", *words])
    captured = capsys.readouterr()
    assert end.value.code == code
    assert captured.err.startswith("ctc-ray: ")
    assert "Traceback" not in captured.err


def test_command_writes_the_page_and_prints_its_path(
    simulated: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["simulation-report", str(simulated.place), "--out", str(tmp_path / "page.html")])
    assert end.value.code == 0
    assert str(tmp_path / "page.html") in capsys.readouterr().out.replace("\n", "")
    assert (tmp_path / "page.html").stat().st_size > 10_000


def _s3_server() -> ModuleType:
    """The module `tests/s3_server.py`."""
    name = "s3_server"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def test_page_of_a_simulation_in_object_storage_is_written_there_without_secrets(simulated: Any) -> None:
    pytest.importorskip("moto.server", reason="the S3 server comes with the test extra")
    names = _s3_server()
    with names.serving() as server:
        whole = Store(server.uri("study", credentials=True))
        for name in ("results.parquet", "effort.parquet", "release_checks.json", "_record.json"):
            whole.write_bytes(f"run/{name}", (simulated.place / name).read_bytes())
        result = run_simulation_report(server.uri("study/run", credentials=True))
        page = whole.read_bytes("run/report.html").decode()
        written = server.object_names()
    assert {f"study/run/{name}" for name in ("report.html", "table1.csv", "comparison.csv", "figure3.svg")} <= written
    assert result.paths[0] == "s3://bucket/study/run/report.html"
    assert "s3://bucket/study/run" in page
    assert names.SECRET not in page
