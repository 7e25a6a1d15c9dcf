"""Plan a large cohort: time, shards, memory, bandwidth and cost, from rates that other benchmarks measured.

python -m benchmarks.scaling --crops 100000000 --cores 512
python -m benchmarks.scaling --crops 100000000 --gpus 8 --price gpu-hour=1.0 --price gb-month=0.02

Rates are read from `benchmarks/results/*.json`, and the table names the command that measured each. A rate that nobody has measured is
said to be missing, and its stage is left out of the sum; `--rate embed.gpu=20000` states one, which is then marked `given`. Prices are
yours to state; without them no cost is printed. `benchmarks/results/embed.json` is read where it holds
`{"rates": [{"device": "cpu", "crops_per_second": 1.0, "devices": 1}]}`: crops a second of the whole pipeline on so many cores or GPUs.
`benchmarks/results/scheduler.json` says how many units a second one driver hands out.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctc_ray.config import load_config
from ctc_ray.errors import ConfigError

RESULTS = Path(__file__).parent / "results"
CONFIGS = Path(__file__).parents[1] / "jobs" / "configs"
CROP_BYTES = 3 * 48 * 48
"""Three channels of 48 x 48 px in one byte: what a reader hands on, and an upper bound of what lies on disk."""
BLOCK_BYTES = 32 * 2**20
"""Largest block of a plan, as `ctc_ray.cluster.connect` sets it."""
BLOCKS_AN_ACTOR = 2
"""Blocks under way to one actor: Ray Data's default of tasks in flight an actor."""
PRICES = ("gpu-hour", "core-hour", "gb-month")


@dataclass(frozen=True)
class Rate:
    """Work a second of one core or one GPU."""

    name: str
    """`stage.device`."""
    unit: str
    value: float | None
    """None: nobody has measured it here."""
    source: str
    """Command that measures it, or `given`."""


@dataclass(frozen=True)
class Step:
    """One stage of the plan."""

    stage: str
    device: str
    devices: int
    hours: float
    cost: float | None


def _segment(found: Any) -> float | None:
    rows = [r for r in found["rows"] if r["image"] == "phantom, 84 objects" and r["way"] == "bf16, background skipped"]
    return rows[0]["objects"] / rows[0]["end_to_end_s"] / found["threads"] if rows else None


def _pretrain(found: Any) -> float | None:
    return found["step"]["crops_per_second"]["full step, marker"] / found["step"]["threads"]


def _embed(device: str) -> Callable[[Any], float | None]:
    def pick(found: Any) -> float | None:
        rates = [r["crops_per_second"] / r["devices"] for r in found.get("rates", []) if r["device"] == device]
        return max(rates, default=None)

    return pick


SOURCES: tuple[tuple[str, str, str, str, Callable[[Any], float | None]], ...] = (
    ("segment.cpu", "cells/s a core", "segment.json", "python -m benchmarks.segment", _segment),
    ("embed.cpu", "crops/s a core", "embed.json", "python -m benchmarks.embed", _embed("cpu")),
    ("embed.gpu", "crops/s a GPU", "embed.json", "python -m benchmarks.embed", _embed("gpu")),
    ("pretrain.cpu", "crops/s a core", "pretrain.json", "python -m benchmarks.pretrain", _pretrain),
)
"""Name, unit, file, command, and where in the file the rate stands."""


def read_rates(folder: Path, given: Mapping[str, float]) -> dict[str, Rate]:
    """Rates that were measured, and those that the caller states instead.

    Args:
        folder: holds the JSON results.
        given: name -> rate; wins over what was measured.
    """
    names = [name for name, *_ in SOURCES]
    for name in given:
        if name not in names:
            raise ConfigError(f"--rate {name}: one of {', '.join(names)}")
    rates = {}
    for name, unit, file, command, pick in SOURCES:
        path = folder / file
        if name in given:
            rates[name] = Rate(name, unit, given[name], "given")
        else:
            value = pick(json.loads(path.read_text())) if path.is_file() else None
            rates[name] = Rate(name, unit, value, command)
    return rates


def plan_steps(
    rates: Mapping[str, Rate],
    *,
    crops: int,
    cores: int,
    gpus: int,
    losses_an_hour: float,
    replacement_s: float,
    prices: Mapping[str, float],
) -> list[Step]:
    """Hours and cost of segmenting and embedding; stages without a rate are left out.

    Args:
        rates: from `read_rates`.
        crops: cells of the cohort.
        cores: processors at work.
        gpus: GPUs at work; embedding takes them where there are any.
        losses_an_hour: how often a device is taken away, a device and hour.
        replacement_s: until another stands in its place. The unit under way, repeated, is counted with it by the caller.
        prices: `core-hour` and `gpu-hour`.
    """
    steps = []
    for stage, device, devices in (("segment", "cpu", cores), ("embed", "gpu" if gpus else "cpu", gpus or cores)):
        value = rates[f"{stage}.{device}"].value
        if value is None or devices == 0:
            continue
        working = 1.0 - losses_an_hour * replacement_s / 3600.0
        if working <= 0:
            raise ConfigError("machines are lost faster than they are replaced: nothing would ever end")
        hours = crops / (value * devices * working) / 3600.0
        price = prices.get("gpu-hour" if device == "gpu" else "core-hour")
        steps.append(Step(stage, device, devices, hours, None if price is None else hours * devices * price))
    return steps


def sizes(crops: int, width: int, unit_cells: int, cores: int, embed_per_s: float | None) -> dict[str, float]:
    """Bytes, counts and bandwidths of a cohort.

    Args:
        crops: cells.
        width: numbers of a vector.
        unit_cells: cells of a unit of work, which becomes one file of vectors.
        cores: processors at work; as many actors at most pass fields to each other through the object store.
        embed_per_s: crops a second of all embedding actors; None leaves the bandwidths out.
    """
    found = {
        "crops, GB": crops * CROP_BYTES / 1e9,
        "embeddings, GB": crops * width * 4 / 1e9,
        "flat index in memory, GB": crops * width * 4 / 1e9,
        "units of embedding": math.ceil(crops / unit_cells),
        "crops of a unit, MB (an actor holds one)": unit_cells * CROP_BYTES / 1e6,
        "object store of all machines, GB at most": cores * BLOCKS_AN_ACTOR * BLOCK_BYTES / 1e9,
    }
    if embed_per_s is not None:
        found["read while embedding, MB/s"] = embed_per_s * CROP_BYTES / 1e6
        found["written while embedding, MB/s"] = embed_per_s * width * 4 / 1e6
    return found


def fed_actors(folder: Path, unit_cells: int, embed: Rate) -> dict[str, float]:
    """How many embedding actors one driver keeps at work, by what Ray's loop was measured to take a unit.

    Args:
        folder: holds `scheduler.json`; without it, or without a rate, nothing is said.
        unit_cells: cells of a unit.
        embed: crops a second of one actor.
    """
    path = folder / "scheduler.json"
    if embed.value is None or not path.is_file():
        return {}
    units_per_s = float(json.loads(path.read_text())["units_per_s"])
    seconds = unit_cells / embed.value
    return {
        "units a second through one driver": units_per_s,
        "seconds of a unit on one actor": seconds,
        "actors that one driver keeps at work": math.floor(units_per_s * seconds),
    }


def _pairs(texts: Sequence[str], option: str) -> dict[str, float]:
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        try:
            found[name] = float(value)
        except ValueError as error:
            raise ConfigError(f"{option} {text!r}: write NAME=NUMBER") from error
        if not equals or found[name] < 0:
            raise ConfigError(f"{option} {text!r}: write NAME=NUMBER, not below zero")
    return found


def make_plan(options: argparse.Namespace) -> dict[str, Any]:
    """All of the plan as plain values."""
    prices = _pairs(options.price, "--price")
    if unknown := set(prices) - set(PRICES):
        raise ConfigError(f"--price {', '.join(sorted(unknown))}: one of {', '.join(PRICES)}")
    rates = read_rates(options.results, _pairs(options.rate, "--rate"))
    config = load_config(CONFIGS / ("cluster_gpu.yaml" if options.gpus else "cluster.yaml"))
    steps = plan_steps(
        rates,
        crops=options.crops,
        cores=options.cores,
        gpus=options.gpus,
        losses_an_hour=options.losses_an_hour,
        replacement_s=options.replacement_s,
        prices=prices,
    )
    embed = next((step for step in steps if step.stage == "embed"), None)
    per_s = None if embed is None else options.crops / embed.hours / 3600.0
    found = sizes(options.crops, options.width, config.embed.unit_cells, options.cores, per_s)
    device = "gpu" if options.gpus else "cpu"
    found |= fed_actors(options.results, config.embed.unit_cells, rates[f"embed.{device}"])
    if "gb-month" in prices:
        found["storage a month, cost"] = (found["crops, GB"] + found["embeddings, GB"]) * prices["gb-month"]
    return {
        "rates": [vars(rate) for rate in rates.values()],
        "steps": [vars(step) for step in steps],
        "sizes": found,
    }


def show(plan: Mapping[str, Any]) -> None:
    """Print the plan as three tables."""
    print(f"{'rate':14}{'value':>10}  {'unit':16}measured by")
    for rate in plan["rates"]:
        value = "missing" if rate["value"] is None else f"{rate['value']:,.1f}"
        print(f"{rate['name']:14}{value:>10}  {rate['unit']:16}{rate['source']}")
    print(f"\n{'stage':14}{'devices':>10}{'hours':>12}{'cost':>12}")
    for step in plan["steps"]:
        cost = "-" if step["cost"] is None else f"{step['cost']:,.0f}"
        print(f"{step['stage']:14}{step['devices']:>6} {step['device']:3}{step['hours']:>12,.1f}{cost:>12}")
    print()
    for name, value in plan["sizes"].items():
        print(f"{name:42}{value:>12,.0f}" if value >= 100 else f"{name:42}{value:>12,.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crops", type=int, default=100_000_000)
    parser.add_argument("--cores", type=int, default=512)
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--width", type=int, default=128, help="numbers of a vector")
    parser.add_argument("--rate", action="append", default=[], metavar="STAGE.DEVICE=VALUE")
    parser.add_argument("--price", action="append", default=[], metavar="NAME=VALUE", help=", ".join(PRICES))
    parser.add_argument("--losses-an-hour", type=float, default=0.0, help="a device")
    parser.add_argument("--replacement-s", type=float, default=300.0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    try:
        plan = make_plan(options)
    except ConfigError as error:
        parser.error(str(error))
    if options.json:
        print(json.dumps(plan, indent=1))
    else:
        show(plan)


if __name__ == "__main__":
    main()
