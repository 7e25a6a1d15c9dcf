"""Write a small cohort whose cells and embeddings come from a seeded mixture, for tests of the rooms behind embed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from ctc_ray.cohort import Cohort
from ctc_ray.latent.cluster import Clusters
from ctc_ray.latent.embeddings import iterate_shards, read_selected
from ctc_ray.latent.model import LatentMap
from ctc_ray.latent.reduce import PrincipalComponents, UmapPlane
from ctc_ray.records import Record, identity_of, publish
from ctc_ray.schema import (
    DUPLICATES_SCHEMA,
    STATISTICS,
    TRUTH_SCHEMA,
    cell_id,
    cells_schema,
    embeddings_schema,
    pack_pixels,
)

WIDTH = 12
ENCODER = "dino"
ROLES = {"007": "train", "12": "train", "Müller 3": "validation", "P4": "test", "P5": "final", "P6": "pretrain"}
KINDS = ("ctc", "leukocyte", "point_event", "smear")
_SHARES = (0.25, 0.4, 0.2, 0.15)
_CENTRES = np.random.default_rng(5).normal(0, 4, (len(KINDS), WIDTH))


@dataclass(frozen=True)
class MixtureCohort:
    """A cohort on disk and what it was made from."""

    cohort: Cohort
    truth_path: Path
    kinds: dict[str, str]
    """cell_id -> kind."""


def build_cohort(
    path: Path, *, roles: dict[str, str] | None = None, num_cells: int = 150, seed: int = 3, spread: float = 1.6
) -> MixtureCohort:
    """Write patients, cells, duplicates, embeddings and truth; returns them."""
    roles = ROLES if roles is None else roles
    cohort = Cohort.open(str(path / "cohort"), create=True)
    cohort.add_patients(dict.fromkeys(roles, "cartridge"))
    given = pl.col("patient").replace_strict(roles, default=None, return_dtype=pl.String)
    cohort.write_patients(cohort.patients().with_columns(role=pl.coalesce("role", given)))
    kinds: dict[str, str] = {}
    truth = []
    for name in roles:
        found, rows = write_patient(cohort, name, num_cells=num_cells, seed=seed, spread=spread)
        kinds.update(found)
        truth += rows
    truth_path = path / "truth.parquet"
    Cohort.open(str(path), create=True).store.write_table(
        "truth.parquet", pa.Table.from_pylist(truth, schema=TRUTH_SCHEMA)
    )
    return MixtureCohort(cohort, truth_path, kinds)


def write_patient(
    cohort: Cohort, patient: str, *, num_cells: int, seed: int, spread: float, version: str = "1"
) -> tuple[dict[str, str], list[dict[str, object]]]:
    """Write one patient in two shards; the last two cells are one physical cell seen in two fields."""
    rng = np.random.default_rng([seed, *patient.encode()])
    kind_codes = rng.choice(len(KINDS), num_cells, p=_SHARES)
    kind_codes[-2:] = 0
    fields = rng.integers(1, 4, num_cells)
    fields[-2:] = (1, 2)
    grid = np.stack(np.unravel_index(rng.permutation(40 * 50)[:num_cells], (40, 50)), axis=1)
    points = (30 + 25 * grid).astype(np.int16)
    ids = [cell_id(patient, int(f), int(p[0]), int(p[1]), version) for f, p in zip(fields, points, strict=True)]
    vectors = (_CENTRES[kind_codes] + rng.normal(0, spread, (num_cells, WIDTH))).astype(np.float32)
    vectors[-1] = vectors[-2] + 1e-3
    crops = _crops(kind_codes, rng)
    half = num_cells // 2
    slices = {"part-000.parquet": slice(0, half), "part-001.parquet": slice(half, num_cells)}
    cells = {name: _cells(patient, ids[s], fields[s], points[s], crops[s], rng) for name, s in slices.items()}
    identity = identity_of("segment", {"version": version, "seed": seed, "num": num_cells}, {})
    publish(cohort.store, cohort.cells(patient), cells, Record("segment", patient, identity, {}, {}))
    physical = [*ids[:-1], ids[-2]]
    cohort.store.write_table(
        cohort.duplicates_path(patient),
        pa.table({"cell_id": ids, "physical_id": physical}, schema=DUPLICATES_SCHEMA),
    )
    write_embeddings(cohort, patient, {name: (ids[s], vectors[s]) for name, s in slices.items()}, identity)
    truth: list[dict[str, object]] = [
        {
            "patient": patient,
            "field": int(fields[i]),
            "row": float(points[i, 0]) + 1.0,
            "col": float(points[i, 1]) - 1.0,
            "kind": KINDS[kind_codes[i]],
            "diameter_um": 10.0,
            "physical_id": physical[i],
        }
        for i in range(num_cells)
    ]
    return {name: KINDS[code] for name, code in zip(ids, kind_codes, strict=True)}, truth


def write_embeddings(
    cohort: Cohort, patient: str, shards: dict[str, tuple[list[str], npt.NDArray[np.float32]]], source: str
) -> None:
    """Publish the embeddings of one patient."""
    tables = {
        name: pa.table(
            {
                "cell_id": ids,
                "patient": [patient] * len(ids),
                "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1]),
            },
            schema=embeddings_schema(vectors.shape[1]),
        )
        for name, (ids, vectors) in shards.items()
    }
    identity = identity_of("embed", {"encoder": ENCODER}, {"cells": source})
    record = Record("embed", patient, identity, {}, {"cells": source})
    publish(cohort.store, cohort.embeddings(ENCODER, patient), tables, record)


def write_map(cohort: Cohort, kinds: dict[str, str], *, version: str = "1") -> None:
    """Publish a latent map without UMAP: PCA of all embeddings, its first two scores as places, kinds as clusters.

    The last kind is background, so that tests meet cluster -1.
    """
    folder = cohort.latent(ENCODER, "map")
    patients = cohort.patient_ids()
    ids, vectors = read_selected(cohort, ENCODER, patients, kinds.keys())
    pca = PrincipalComponents.fit(vectors, 6)
    scores = pca.transform(vectors)
    codes = np.array([KINDS.index(kinds[name]) for name in ids])
    labels = np.where(codes == len(KINDS) - 1, -1, codes).astype(np.int16)
    names = np.array(ids)
    made = LatentMap(
        pca=pca,
        plane=UmapPlane(scores, scores[:, :2].copy(), 1.0, 1.0, 5),
        clusters=Clusters(scores[:, :2].copy(), labels, 5, 5),
        plane_ids=names,
        cluster_ids=names,
        summary={"num_clusters": len(KINDS) - 1, "version": version},
    )
    publish(cohort.store, folder, made.files(), Record("map", "map", version, {}, {}))
    for patient in patients:
        tables = {
            name: made.table(shard_ids, patient, shard)
            for name, shard_ids, shard in iterate_shards(cohort, ENCODER, patient)
        }
        identity = identity_of("map-cells", {}, {"map": made.digest(), "version": version})
        publish(
            cohort.store, cohort.latent_cells(ENCODER, "map", patient), tables, Record("map", patient, identity, {}, {})
        )


def _crops(kind_codes: npt.NDArray[np.int64], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Crops (N, 3, 48, 48) whose channel brightness hints at the kind."""
    level = np.array([[120, 150, 20], [120, 60, 110], [10, 140, 20], [90, 90, 90]])[kind_codes]
    noise = rng.normal(0, 35, (len(kind_codes), 3, 48, 48)) + rng.normal(0, 30, (len(kind_codes), 3, 1, 1))
    return np.clip(level[:, :, None, None] + noise, 0, 255).astype(np.uint8)


def _cells(
    patient: str,
    ids: list[str],
    fields: npt.NDArray[np.int64],
    points: npt.NDArray[np.int16],
    crops: npt.NDArray[np.uint8],
    rng: np.random.Generator,
) -> pa.Table:
    num = len(ids)
    row, col = points[:, 0].astype(np.float32), points[:, 1].astype(np.float32)
    columns: dict[str, object] = {
        "cell_id": ids,
        "patient": [patient] * num,
        "field": fields.astype(np.int16),
        "row": row,
        "col": col,
        "global_row": row,
        "global_col": col,
        "y0": np.maximum(points[:, 0] - 24, 0).astype(np.int16),
        "x0": np.maximum(points[:, 1] - 24, 0).astype(np.int16),
        "prob": rng.uniform(0.5, 1, num).astype(np.float32),
        "diameter_um": np.full(num, 10, np.float32),
        "at_edge": np.zeros(num, bool),
        "point_row": points[:, 0],
        "point_col": points[:, 1],
        "area_px": np.full(num, 200, np.int32),
        "eccentricity": np.zeros(num, np.float32),
        **{name: np.zeros(num, np.float32) for name in STATISTICS},
        "pixels": pack_pixels(crops),
    }
    schema = cells_schema()
    return pa.table([pa.array(columns[n]) if n != "pixels" else columns[n] for n in schema.names], schema=schema)
