import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ctc_ray.config import load_config
from ctc_ray.errors import ConfigError


def _load() -> ModuleType:
    """The script, which stands outside of the package."""
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "scaling.py"
    spec = importlib.util.spec_from_file_location("scaling_benchmark", path)
    if spec is None or spec.loader is None:
        raise ImportError(str(path))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


scaling = _load()
RESULTS, Rate = scaling.RESULTS, scaling.Rate
make_plan, plan_steps, read_rates, sizes = scaling.make_plan, scaling.plan_steps, scaling.read_rates, scaling.sizes


def _plan(folder: Path, **given: Any) -> dict[str, Any]:
    options = {"crops": 1_000_000, "cores": 10, "gpus": 0, "width": 128, "rate": [], "price": [], "results": folder}
    return make_plan(argparse.Namespace(**{**options, "losses_an_hour": 0.0, "replacement_s": 300.0, **given}))


def _rates(**values: float) -> dict[str, Any]:
    names = ("segment.cpu", "embed.cpu", "embed.gpu")
    return {name: Rate(name, "", values.get(name.replace(".", "_")), "") for name in names}


def test_shipped_results_give_the_rates_that_were_measured_and_name_their_command() -> None:
    rates = read_rates(RESULTS, {})
    found = json.loads((RESULTS / "segment.json").read_text())
    row = next(r for r in found["rows"] if "84" in r["image"] and r["way"] == "bf16, background skipped")
    assert rates["segment.cpu"].value == pytest.approx(row["objects"] / row["end_to_end_s"] / found["threads"])
    assert rates["segment.cpu"].source == "python -m benchmarks.segment"


def test_a_rate_nobody_measured_is_missing_and_its_stage_left_out(tmp_path: Path) -> None:
    plan = _plan(tmp_path)
    assert all(rate["value"] is None for rate in plan["rates"])
    assert plan["steps"] == []
    assert "read while embedding, MB/s" not in plan["sizes"]


def test_a_stated_rate_is_marked_and_wins(tmp_path: Path) -> None:
    (tmp_path / "embed.json").write_text(
        json.dumps({"rates": [{"device": "cpu", "crops_per_second": 8.0, "devices": 2}]})
    )
    assert read_rates(tmp_path, {})["embed.cpu"].value == 4.0
    stated = read_rates(tmp_path, {"embed.cpu": 9.0})["embed.cpu"]
    assert (stated.value, stated.source) == (9.0, "given")
    with pytest.raises(ConfigError, match=r"one of segment\.cpu"):
        read_rates(tmp_path, {"embed.tpu": 1.0})


def test_hours_and_cost_are_crops_over_devices_at_work() -> None:
    arguments = {"crops": 36_000_000, "losses_an_hour": 0.0, "replacement_s": 300.0}
    rates = _rates(segment_cpu=100.0, embed_cpu=10.0, embed_gpu=1000.0)
    steps = plan_steps(rates, cores=100, gpus=0, prices={"core-hour": 0.5}, **arguments)
    assert [(s.stage, s.device, s.devices, s.hours, s.cost) for s in steps] == [
        ("segment", "cpu", 100, 1.0, 50.0),
        ("embed", "cpu", 100, 10.0, 500.0),
    ]
    on_gpus = plan_steps(rates, cores=100, gpus=2, prices={}, **arguments)[1]
    assert (on_gpus.device, on_gpus.hours, on_gpus.cost) == ("gpu", 5.0, None)


def test_lost_machines_take_their_share_and_no_more_than_all() -> None:
    rates, common = _rates(segment_cpu=100.0), {"crops": 36_000_000, "cores": 100, "gpus": 0, "prices": {}}
    assert plan_steps(rates, losses_an_hour=6.0, replacement_s=300.0, **common)[0].hours == pytest.approx(2.0)
    with pytest.raises(ConfigError, match="nothing would ever end"):
        plan_steps(rates, losses_an_hour=12.0, replacement_s=300.0, **common)


def test_sizes_follow_from_the_crop_and_the_vector() -> None:
    found = sizes(1_000_001, 128, 20_000, 4, 1000.0)
    assert found["crops, GB"] == pytest.approx(1_000_001 * 6912 / 1e9)
    assert found["units of embedding"] == 51
    assert found["read while embedding, MB/s"] == pytest.approx(6.912)


def test_prices_are_checked_and_storage_is_counted_where_one_is_given(tmp_path: Path) -> None:
    plan = _plan(tmp_path, price=["gb-month=0.5"])
    stored = plan["sizes"]["crops, GB"] + plan["sizes"]["embeddings, GB"]
    assert plan["sizes"]["storage a month, cost"] == pytest.approx(stored / 2)
    for wrong in ("gb-mont=1", "gpu-hour", "gpu-hour=-1", "gpu-hour=x"):
        with pytest.raises(ConfigError):
            _plan(tmp_path, price=[wrong])


def test_driver_feeds_as_many_actors_as_units_end_while_one_is_under_way(tmp_path: Path) -> None:
    rate = Rate("embed.cpu", "", 500.0, "given")
    assert scaling.fed_actors(tmp_path, 2000, rate) == {}
    (tmp_path / "scheduler.json").write_text(json.dumps({"units_per_s": 60.0}))
    found = scaling.fed_actors(tmp_path, 2000, rate)
    assert found["seconds of a unit on one actor"] == 4.0
    assert found["actors that one driver keeps at work"] == 240
    assert scaling.fed_actors(tmp_path, 2000, Rate("embed.cpu", "", None, "")) == {}
    unit_cells = load_config(scaling.CONFIGS / "cluster.yaml").embed.unit_cells
    planned = _plan(tmp_path, rate=["embed.cpu=500"])["sizes"]["actors that one driver keeps at work"]
    assert planned == 60.0 * unit_cells / 500.0
