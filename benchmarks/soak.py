"""Kill a stage at random moments, again and again, and compare what it leaves with an uninterrupted run.

    python -m benchmarks.soak --stage embed --kills 20
    python -m benchmarks.soak --stage ingest --kills 20 --seed 1

A small phantom cohort goes through the command line on three Ray nodes emulated on this machine. A round begins with nothing done.
The command runs, and at a random share of its work, or while it starts, SIGKILL takes one of

* `actor`: one process of an actor pool;
* `node`: a raylet that is not the driver's, with all of its workers;
* `driver`: the command and every process of its cluster.

The command is started again until it ends by itself; then ids, their order, vectors (float32, within 1e-5), cells and records are
compared with those of the uninterrupted run, and the next round begins. A run that neither ends nor moves within `--timeout-s` is a
hang and counts as a failure, as does a run that fails without having lost anything. Seconds lost are those of a run beyond its share
of the uninterrupted one, shared among its kills; a run that nothing was killed in counts for the last kill before it. Ends with
exit code 1 after any difference, hang or failure. Writes `benchmarks/results/soak.json`, by stage.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.killed_runs import Job, Kill, Run, Watch, run_once
from benchmarks.segment_accuracy import hardware
from ctc_ray.cohort import Cohort
from ctc_ray.records import Record, identity_of, library_versions, publish, read_record
from ctc_ray.schema import cell_id, cells_schema, pack_pixels

RESULTS = Path(__file__).parent / "results" / "soak.json"
KINDS = ("actor", "node", "driver")
EARLY_SHARE = 0.15
"""Share of the kills that come while the run still starts."""
LATEST_SHARE = 0.95
"""Files of the last patient come and go too fast to wait for."""
MAX_RUNS_A_ROUND = 25


def plan_kills(rng: np.random.Generator, kinds: Sequence[str], most: int, done: float) -> list[tuple[str, float]]:
    """One to `most` kills of one run, in order; none after the driver's, and one node at most.

    Args:
        rng: of the soak.
        kinds: to choose from.
        most: kills.
        done: share of the files that are there already.
    """
    plan: list[tuple[str, float]] = []
    for share in sorted(rng.uniform(done, LATEST_SHARE, int(rng.integers(1, most + 1)))):
        kind = str(rng.choice(kinds))
        if kind == "node" and any(former == "node" for former, _ in plan):
            continue
        early = not plan and done == 0.0 and rng.random() < EARLY_SHARE
        plan.append((kind, -float(rng.uniform(0.2, 1.0)) if early else float(share)))
        if kind == "driver":
            break
    return plan


# Comparing ----------------------------------------------------------------------------------------------------------


def compare(job: Job, cohort_path: Path, reference_path: Path) -> list[str]:
    """Differences between two finished cohorts, in words; [] where there are none."""
    cohort, reference = Cohort.open(str(cohort_path)), Cohort.open(str(reference_path))
    found = [] if cohort.patient_ids() == reference.patient_ids() else ["other patients"]
    every: list[str] = []
    for patient in reference.patient_ids():
        for output in job.outputs:
            folder = f"{output}/{patient}"
            found += [f"{folder}: {problem}" for problem in differences(cohort, reference, folder)]
        for path in cohort.shards(f"{job.outputs[-1]}/{patient}"):
            every += cohort.store.read_table(path, ["cell_id"])["cell_id"].to_pylist()
    if len(set(every)) != len(every):
        found.append(f"{len(every) - len(set(every))} cells are there twice")
    return found


def differences(cohort: Cohort, reference: Cohort, folder: str) -> list[str]:
    """Differences of one output folder and its record."""
    own, other = read_record(cohort.store, folder), read_record(reference.store, folder)
    if own is None or other is None:
        return ["no record"]
    found = [] if own.identity == other.identity and own.counts == other.counts else ["another identity or count"]
    units = other.units_computed + other.units_reused
    if own.units_computed + own.units_reused != units:
        found.append(f"{own.units_computed} units computed and {own.units_reused} reused of {units}")
    if cohort.shards(folder) != reference.shards(folder):
        return [*found, "other files"]
    if cohort.store.local_path(f"{folder}/_parts").exists():
        found.append("parts are left")
    for path in reference.shards(folder):
        table, expected = cohort.store.read_table(path), reference.store.read_table(path)
        if table["cell_id"].to_pylist() != expected["cell_id"].to_pylist():
            found.append(f"{path}: other cells, or in another order")
        elif "embedding" in table.column_names:
            vectors, true = (t["embedding"].combine_chunks().flatten().to_numpy() for t in (table, expected))
            furthest = float(np.abs(vectors - true).max(initial=0.0))
            if not furthest <= 1e-5:
                found.append(f"{path}: vectors differ by {furthest:.2g}")
        elif not table.equals(expected):
            found.append(f"{path}: other cells' pixels or measures")
    return found


# The soak -----------------------------------------------------------------------------------------------------------


def settle(runs: Sequence[Run], uninterrupted_s: float) -> None:
    """Write outcomes and seconds lost of one round's kills, whose last run ended well or hung."""
    last: Kill | None = None
    for run in runs:
        lost = run.seconds - run.gained * uninterrupted_s
        for kill in run.kills:
            kill.outcome = "hung" if run.hung else "survived" if run.exit_code == 0 else "resumed"
            kill.seconds_lost += lost / len(run.kills)
            last = kill
        if not run.kills and last is not None:
            last.seconds_lost += lost


def soak(job: Job, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Rounds until enough kills were made; returns what is written to the results."""
    rng = np.random.default_rng(options.seed)
    reference, cohort = folder / "reference", folder / "cohort"
    shutil.copytree(job.template, reference)
    watch = Watch(job, reference, 1, 0.0, options.timeout_s, options.log or folder / "log.txt")
    first = run_once(watch, (), rng)
    if first.exit_code != 0:
        raise SystemExit(f"the uninterrupted run ended with {first.exit_code}: see {watch.log}")
    watch.cohort, watch.expected, watch.startup_s = cohort, first.files, first.first_file_s
    kills: list[Kill] = []
    problems: list[str] = []
    rounds = 0
    while len(kills) < options.kills and not any("hung" in problem for problem in problems):
        shutil.rmtree(cohort, ignore_errors=True)
        shutil.copytree(job.template, cohort)
        watch.seen = set()
        rounds += 1
        runs: list[Run] = []
        while not runs or (runs[-1].exit_code != 0 and not runs[-1].hung):
            wanted = min(options.kills_a_run, options.kills - len(kills) - sum(len(run.kills) for run in runs))
            done = min(len(watch.seen) / watch.expected, 0.9)
            plan = plan_kills(rng, options.kinds, wanted, done) if wanted else []
            runs.append(run_once(watch, plan, rng))
            print_run(rounds, runs[-1])
            if runs[-1].exit_code not in (0, None) and not runs[-1].kills:
                problems.append(f"round {rounds}: a run failed ({runs[-1].exit_code}) that nothing was killed in")
            if len(runs) == MAX_RUNS_A_ROUND or problems:
                break
        settle(runs, first.seconds)
        kills += [kill for run in runs for kill in run.kills]
        if runs[-1].hung:
            problems.append(f"round {rounds}: hung after {[kill.kind for kill in runs[-1].kills] or 'no kill'}")
        elif runs[-1].exit_code == 0:
            problems += [f"round {rounds}: {problem}" for problem in compare(job, cohort, reference)]
        else:
            problems.append(f"round {rounds}: not finished after {len(runs)} runs")
    return {
        "uninterrupted_s": first.seconds,
        "rounds": rounds,
        "problems": problems,
        "kills": [vars(kill) for kill in kills],
    }


def print_run(round_number: int, run: Run) -> None:
    """One line a run."""
    kills = ", ".join(f"{kill.kind} at {kill.after_s:.0f} s ({kill.share:.0%})" for kill in run.kills) or "none"
    end = "hung" if run.hung else "killed" if run.exit_code is None else f"exit code {run.exit_code}"
    print(f"round {round_number}: {run.seconds:6.1f} s, did {run.gained:4.0%}, kills: {kills}; {end}", flush=True)


def table(kills: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a kind: kills, how they ended, seconds lost."""
    rows = []
    for kind in KINDS:
        own = [kill for kill in kills if kill["kind"] == kind]
        if own:
            lost = [kill["seconds_lost"] for kill in own]
            ends = {end: sum(kill["outcome"] == end for kill in own) for end in ("survived", "resumed", "hung")}
            times = {"median_s_lost": round(statistics.median(lost), 1), "most_s_lost": round(max(lost), 1)}
            rows.append({"kind": kind, "kills": len(own), **ends, **times})
    return rows


# Cohorts ------------------------------------------------------------------------------------------------------------


def cells_to_embed(folder: Path, patients: int, cells: int) -> Job:
    """Phantom crops as `segment` leaves them, in two shards a patient."""
    from ctc_ray.phantom import draw_crops

    cohort = Cohort.open(str(folder / "template"), create=True)
    names = [f"P{number}" for number in range(patients)]
    cohort.add_patients(dict.fromkeys(names, "made"))
    for number, name in enumerate(names):
        crops, _ = draw_crops(cells, seed=number)
        files = {}
        for shard, part in enumerate(np.array_split(np.arange(cells), 2)):
            files[f"part-{shard:03d}.parquet"] = cells_table(name, crops[part], int(part[0]))
        record = Record("segment", name, identity_of("segment", {"soak": cells}, {"patient": name}), {}, {})
        publish(cohort.store, cohort.cells(name), files, record)
    settings = {"encoder": "default", "precision": "fp32", "unit_cells": 20, "num_actors": 2}
    arguments = [text for key, value in settings.items() for text in ("--set", f"embed.{key}={value}")]
    return Job("embed", folder / "template", tuple(arguments), ("embeddings/default",))


def cells_table(patient: str, crops: np.ndarray[Any, Any], first: int) -> pa.Table:
    """Cells with these crops (N, 3, 48, 48); what embedding does not read is zero."""
    schema = cells_schema(str(crops.dtype), crops.shape[1])
    made: dict[str, Callable[[], Any]] = {
        "cell_id": lambda: pa.array([cell_id(patient, 1, first + i, 0, "soak") for i in range(len(crops))]),
        "patient": lambda: pa.array([patient] * len(crops)),
        "pixels": lambda: pack_pixels(crops),
    }
    zeros = np.zeros(len(crops))
    columns = [made[f.name]() if f.name in made else pa.array(zeros).cast(f.type) for f in schema]
    return pa.table(columns, schema=schema)


def fields_to_ingest(folder: Path, patients: int, fields: int) -> Job:
    """Cartridges of phantom fields."""
    cartridges = str(folder / "cartridges")
    given = ["--patients", str(patients), "--fields", str(fields), "--profile", "demo", "--seed", "1"]
    subprocess.run([sys.executable, "-m", "ctc_ray.cli", "phantom", cartridges, *given], check=True)
    (folder / "template").mkdir()
    settings = ["embed.encoder=default", "embed.precision=fp32", "segment.precision=fp32"]
    arguments = ["--cartridges", cartridges, *(text for setting in settings for text in ("--set", setting))]
    return Job("ingest", folder / "template", tuple(arguments), ("cells", "embeddings/default"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Soak, print, write; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("embed", "ingest"), default="embed")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--kills-a-run", type=int, default=2, help="at most")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patients", type=int, default=4)
    parser.add_argument("--cells", type=int, default=240, help="a patient, for embed")
    parser.add_argument("--fields", type=int, default=8, help="a patient, for ingest")
    parser.add_argument("--timeout-s", type=float, default=600.0, help="without a new file")
    parser.add_argument("--log", type=Path, help="where the command's own words go; a temporary file without it")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.stage == "embed":
            job = cells_to_embed(folder, options.patients, options.cells)
        else:
            job = fields_to_ingest(folder, options.patients, options.fields)
        result = soak(job, options, folder)
    result["table"] = table(result["kills"])
    print(f"{'kind':8}{'kills':>7}{'survived':>10}{'resumed':>9}{'hung':>6}{'median s lost':>15}{'most s lost':>13}")
    for row in result["table"]:
        print("{kind:8}{kills:7}{survived:10}{resumed:9}{hung:6}{median_s_lost:15}{most_s_lost:13}".format(**row))
    print("\n".join(result["problems"]) or f"no difference in {result['rounds']} rounds")
    known = json.loads(options.out.read_text()) if options.out.exists() else {}
    given = ("kills", "kills_a_run", "kinds", "seed", "patients", "cells", "fields")
    settings = {name: getattr(options, name) for name in given}
    about = {"hardware": hardware(), "versions": library_versions(), "settings": settings}
    known[options.stage] = {**result, **about, "load_average": [round(value, 1) for value in os.getloadavg()]}
    options.out.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
