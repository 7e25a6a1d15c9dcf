"""Compare two maps of one cohort, shard by shard, and keep what a figure of both needs."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pyarrow as pa

from ctc_ray.cohort import Cohort
from ctc_ray.config import MapConfig
from ctc_ray.errors import ConfigError, SchemaError
from ctc_ray.labels.labeller import unit_hash
from ctc_ray.labels.patients import process_identity, run_over
from ctc_ray.latent.agreement import TRUST_CELLS, SharedCells, match_clusters, summarise_agreement, trustworthiness
from ctc_ray.latent.embeddings import Float32, vectors_of
from ctc_ray.progress import Progress
from ctc_ray.records import Record, State, identity_of, publish, read_record, state_of
from ctc_ray.storage import Store

STAGE = "map-agreement"
AGREEMENT_FILE = "agreement.json"
SHARED_FILE = "shared_cells.parquet"
CELLS_FILE = "cells.parquet"
_CELLS_SCHEMA = pa.schema(
    [
        ("cell_id", pa.string()),
        ("patient", pa.string()),
        *(
            (name + end, kind)
            for end in ("", "_other")
            for name, kind in (("umap_x", pa.float32()), ("umap_y", pa.float32()))
        ),
        ("cluster", pa.int16()),
        ("cluster_other", pa.int16()),
    ]
)
_READ = ["cell_id", "umap_x", "umap_y", "cluster"]


def agreement_folder(cohort: Cohort, encoder: str, name: str, other: str) -> str:
    """Folder of the agreement of map `name` with map `other`."""
    return f"{cohort.latent(encoder, name)}/agreement/{other}"


def compare_with_other(config: MapConfig, cohort: Cohort, *, progress: Progress | None = None) -> str | None:
    """Write how well this map agrees with `map.compare_with`, on the patients that lie on both.

    Args:
        config: section `map`.
        cohort: with both maps, cells placed.
        progress: where progress goes.

    Returns:
        The folder with `agreement.json`, `shared_cells.parquet` (cluster, cluster_other, num_cells, matched) and
        `cells.parquet` (a seeded sample with places and clusters on both); None where no other map is named. What is there already and was
        made from the same maps and patients is left alone.

    Raises:
        ConfigError: the other map is this one.
        MissingInputError: the other map is not there.
        SchemaError: no patient lies on both, or their shards do not fit each other.
    """
    other = config.compare_with
    if other is None:
        return None
    if other == config.name:
        raise ConfigError(f"map.compare_with = {other!r} is the map itself: name another one")
    names = (config.name, other)
    for name in names:
        cohort.require(cohort.latent(config.encoder, name), "map")
    inputs: dict[str, str] = {}
    for patient in cohort.patient_ids():
        placed = [read_record(cohort.store, cohort.latent_cells(config.encoder, name, patient)) for name in names]
        if all(placed):
            inputs |= {f"{name}/{patient}": r.identity for name, r in zip(names, placed, strict=True) if r is not None}
    if not inputs:
        raise SchemaError(
            f"no patient of {cohort.store.uri} lies on the maps {config.name!r} and {other!r}: run `ctc-ray map` for both"
        )
    folder = agreement_folder(cohort, config.encoder, *names)
    identity = identity_of(STAGE, {"seed": config.umap_seed}, inputs)
    if state_of(cohort.store, folder, identity) is not State.COMPLETE:
        call = (cohort.store, config, inputs, identity)
        list(run_over(compare_and_publish, [call], description="compare maps", progress=progress))
    return folder


def compare_and_publish(store: Store, config: MapConfig, inputs: dict[str, str], identity: str) -> int:
    """Count, sample and write; one shard of each map is held at a time. Runs on a worker; returns the number of cells."""
    started = time.monotonic()
    cohort, other = Cohort(store), str(config.compare_with)
    shared, sample, scores = _read_both(
        cohort, config, sorted(name.split("/", 1)[1] for name in inputs if name.startswith(f"{config.name}/"))
    )
    summary: dict[str, Any] = {"map": config.name, "other": other, **summarise_agreement(shared)}
    for end, key in (("", "trustworthiness"), ("_other", "trustworthiness_other")):
        places = np.stack([sample[f"umap_x{end}"].to_numpy(), sample[f"umap_y{end}"].to_numpy()], axis=1)
        summary[key] = trustworthiness(scores[end], places)
    summary["trustworthiness_cells"] = sample.num_rows
    node, pid = process_identity()
    record = Record(
        stage=STAGE,
        unit=f"{config.name}/{other}",
        identity=identity,
        config={"seed": config.umap_seed},
        inputs=inputs,
        counts={"cells": shared.num_cells},
        seconds=time.monotonic() - started,
        units_computed=1,
        workers=[{"node": node, "pid": pid, "units": 1}],
    )
    files: dict[str, bytes | pa.Buffer | pa.Table] = {
        AGREEMENT_FILE: json.dumps(summary, indent=1, sort_keys=True).encode() + b"\n",
        SHARED_FILE: shared_table(shared),
        CELLS_FILE: sample,
    }
    publish(store, agreement_folder(cohort, config.encoder, config.name, other), files, record)
    return shared.num_cells


def shared_table(shared: SharedCells) -> pa.Table:
    """Rows cluster, cluster_other, num_cells, matched; sorted."""
    matched = match_clusters(shared)
    rows = sorted(shared.counts.items())
    return pa.table(
        {
            "cluster": pa.array([first for (first, _), _ in rows], pa.int16()),
            "cluster_other": pa.array([second for (_, second), _ in rows], pa.int16()),
            "num_cells": pa.array([number for _, number in rows], pa.int64()),
            "matched": [matched.get(first) == second for (first, second), _ in rows],
        }
    )


def _read_both(
    cohort: Cohort, config: MapConfig, patients: list[str]
) -> tuple[SharedCells, pa.Table, dict[str, Float32]]:
    """Shared cells of all patients; a sample, and its PCA scores on both maps ("" and "_other")."""
    total = sum(
        cohort.store.num_rows(path)
        for p in patients
        for path in cohort.shards(cohort.latent_cells(config.encoder, config.name, p))
    )
    share = min(1.0, TRUST_CELLS / max(total, 1))
    shared, parts = SharedCells(), [_CELLS_SCHEMA.empty_table()]
    scores: dict[str, list[Float32]] = {"": [], "_other": []}
    for patient in patients:
        folders = [
            cohort.latent_cells(config.encoder, name, patient) for name in (config.name, str(config.compare_with))
        ]
        paths = [cohort.shards(folder) for folder in folders]
        if [path.rsplit("/", 1)[-1] for path in paths[0]] != [path.rsplit("/", 1)[-1] for path in paths[1]]:
            raise SchemaError(
                f"patient {patient} has other shards in {folders[0]} than in {folders[1]}: run `ctc-ray map` with --force for both"
            )
        for one, two in zip(*paths, strict=True):
            first, second = cohort.store.read_table(one, _READ), cohort.store.read_table(two, _READ)
            if not first["cell_id"].equals(second["cell_id"]):
                raise SchemaError(
                    f"{cohort.store.describe(one)} and {two} hold different cells: run `ctc-ray map` with --force for both"
                )
            shared.add(first["cluster"].to_numpy(), second["cluster"].to_numpy())
            ids = first["cell_id"].to_pylist()
            rows = np.flatnonzero([unit_hash(config.umap_seed, "agreement", name) < share for name in ids])
            if len(rows):
                parts.append(_sampled(first.take(rows), second.take(rows), patient))
                for end, path in (("", one), ("_other", two)):
                    table = cohort.store.read_table(path, ["pca"]).take(rows)
                    scores[end].append(vectors_of(table, cohort.store.describe(path), "pca"))
    found = {end: np.concatenate(some) if some else np.empty((0, 1), np.float32) for end, some in scores.items()}
    return shared, pa.concat_tables(parts), found


def _sampled(first: pa.Table, second: pa.Table, patient: str) -> pa.Table:
    columns = {name: first[name] for name in _READ} | {f"{name}_other": second[name] for name in _READ[1:]}
    columns["patient"] = pa.array([patient] * first.num_rows, pa.string())
    return pa.table([columns[name] for name in _CELLS_SCHEMA.names], schema=_CELLS_SCHEMA)
