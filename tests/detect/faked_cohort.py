"""A small cohort that holds what segment, embed, map and the expert leave, drawn in seconds without running them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from ctc_ray.classify import Classifier
from ctc_ray.classify.metrics import metrics_rows, metrics_table
from ctc_ray.cohort import Cohort
from ctc_ray.latent.reduce import PrincipalComponents
from ctc_ray.phantom import draw_crops
from ctc_ray.phantom.kinds import CTC_KINDS, PROFILES
from ctc_ray.records import Record, publish
from ctc_ray.schema import (
    DUPLICATES_SCHEMA,
    LABELS_SCHEMA,
    STATISTICS,
    TRUTH_SCHEMA,
    cell_id,
    cells_schema,
    embeddings_schema,
    latent_schema,
    pack_pixels,
)

ENCODER, MAP, WIDTH, PCA_DIM = "dino", "map", 16, 8
ROLES = {"007": "train", "12": "validation", "31": "test", "Müller 3": "final", '<b>x & "co"': "final"}
GRID = (2, 2)
FIELD_SHAPE = (1036, 1384)


@dataclass(frozen=True)
class Patient:
    """What is known of a faked patient, beside the files."""

    cells: pl.DataFrame
    kinds: list[str]


def fake_cohort(root: Path, *, num_cells: int = 60, seed: int = 5) -> tuple[Cohort, dict[str, Patient]]:
    """Write cells, duplicates, embeddings, latent map and labels of every patient of ROLES."""
    cohort = Cohort.open(str(root), create=True)
    cohort.add_patients({name: f"cartridges/{name}" for name in ROLES})
    cohort.write_patients(
        cohort.patients().with_columns(role=pl.col("patient").replace_strict(ROLES, return_dtype=pl.String))
    )
    patients = {name: fake_patient(cohort, name, num_cells, seed + i) for i, name in enumerate(ROLES)}
    record = Record(
        "map", MAP, "map-identity", {"name": MAP, "encoder": ENCODER}, {}, counts={"clusters": 3}, seconds=1.5
    )
    publish(cohort.store, cohort.latent(ENCODER, MAP), {}, record)
    write_labels(cohort, {name: patients[name] for name, role in ROLES.items() if role != "final"})
    return cohort, patients


def fake_patient(cohort: Cohort, name: str, num_cells: int, seed: int) -> Patient:
    """Write one patient's cells (phantom crops), duplicates, embeddings and place on the map."""
    rng = np.random.default_rng(seed)
    crops, kinds = draw_crops(num_cells, seed=seed, profile=PROFILES["demo"])
    rows = rng.uniform(30, FIELD_SHAPE[0] - 30, num_cells).astype(np.float32)
    cols = rng.uniform(30, FIELD_SHAPE[1] - 30, num_cells).astype(np.float32)
    fields = rng.integers(1, GRID[0] * GRID[1] + 1, num_cells)
    ids = [cell_id(name, int(f), int(r), int(c), "fake") for f, r, c in zip(fields, rows, cols, strict=True)]
    diameter_px = rng.uniform(14, 22, num_cells)
    values: dict[str, Any] = {
        "cell_id": ids,
        "patient": [name] * num_cells,
        "field": fields.astype(np.int16),
        "row": rows,
        "col": cols,
        "global_row": rows,
        "global_col": cols,
        "y0": (rows - 24).astype(np.int16),
        "x0": (cols - 24).astype(np.int16),
        "prob": np.full(num_cells, 0.9, np.float32),
        "diameter_um": (diameter_px * 0.64).astype(np.float32),
        "at_edge": np.zeros(num_cells, bool),
        "point_row": rows.astype(np.int16),
        "point_col": cols.astype(np.int16),
        "area_px": (np.pi * diameter_px**2 / 4).astype(np.int32),
        "eccentricity": np.zeros(num_cells, np.float32),
    }
    values |= {name: np.zeros(num_cells, np.float32) for name in STATISTICS}
    schema = cells_schema()
    table = pa.table({**values, "pixels": pack_pixels(crops)}).select(schema.names).cast(schema)
    record = Record(
        "segment", name, f"cells-{name}-{seed}", {}, {}, counts={"cells": num_cells}, seconds=2.0, units_computed=4
    )
    publish(cohort.store, cohort.cells(name), {"part-000.parquet": table}, record)
    physical = [ids[0], ids[0], *ids[2:]]  # the first two are one physical cell
    duplicates = pa.table({"cell_id": ids, "physical_id": physical}).cast(DUPLICATES_SCHEMA)
    cohort.store.write_table(cohort.duplicates_path(name), duplicates)
    is_ctc = np.isin(kinds, [str(kind) for kind in CTC_KINDS])
    _write_vectors(cohort, name, ids, is_ctc, rng)
    return Patient(pl.DataFrame(pl.from_arrow(table.drop_columns("pixels"))), [str(kind) for kind in kinds])


def _write_vectors(cohort: Cohort, name: str, ids: list[str], is_ctc: Any, rng: np.random.Generator) -> None:
    """Embeddings whose first value separates CTCs from others, not quite; clusters by their second value."""
    n = len(ids)
    vectors = rng.normal(0, 1, (n, WIDTH)).astype(np.float32)
    vectors[:, 0] += np.where(is_ctc, 1.3, -1.3)
    flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), WIDTH)
    table = pa.table({"cell_id": ids, "patient": [name] * n, "embedding": flat}).cast(embeddings_schema(WIDTH))
    order = rng.permutation(n)  # no reader may rely on row order
    record = Record(
        "embed", name, f"embed-{name}", {"encoder": ENCODER}, {}, counts={"cells": n}, seconds=1.0, units_computed=1
    )
    publish(cohort.store, cohort.embeddings(ENCODER, name), {"part-000.parquet": table.take(pa.array(order))}, record)
    scores = pa.FixedSizeListArray.from_arrays(pa.array(vectors[:, :PCA_DIM].ravel()), PCA_DIM)
    latent = pa.table(
        {
            "cell_id": ids,
            "patient": [name] * n,
            "pca": scores,
            "umap_x": vectors[:, 0] * 2,
            "umap_y": vectors[:, 1],
            "cluster": np.clip(np.round(vectors[:, 1]), -1, 2).astype(np.int16),
        }
    ).cast(latent_schema(PCA_DIM))
    record = Record("map", name, f"latent-{name}", {}, {}, counts={"cells": n}, seconds=0.5, units_computed=1)
    publish(cohort.store, cohort.latent_cells(ENCODER, MAP, name), {"part-000.parquet": latent}, record)


def write_labels(cohort: Cohort, patients: dict[str, Patient], batch: str = "simulated") -> None:
    """Label every cell by its kind."""
    rows = []
    for name, patient in patients.items():
        for row, kind in zip(patient.cells.iter_rows(named=True), patient.kinds, strict=True):
            rows.append(
                {
                    "event_id": f"{batch}-{row['cell_id']}",
                    "cell_id": row["cell_id"],
                    "patient": name,
                    "field": row["field"],
                    "row": row["row"],
                    "col": row["col"],
                    "crop_sha": "0",
                    "label": "ctc" if kind in set(map(str, CTC_KINDS)) else "non_ctc",
                    "reader": "simulated",
                    "source": "test",
                    "at": datetime(2026, 1, 1, tzinfo=UTC),
                    "seconds": 3.0,
                    "strategy": "initial",
                    "undoes": None,
                }
            )
    cohort.store.write_table(f"labels/{batch}.parquet", pa.Table.from_pylist(rows, schema=LABELS_SCHEMA))


def write_cellsearch(root: Path, patients: dict[str, Patient], *, with_truth: bool = True) -> Path:
    """Write `<root>/<patient>/<patient>.xml` with an event around every second CTC and every third other cell."""
    truth = []
    for name, patient in patients.items():
        records = []
        seen = {"ctc": 0, "other": 0}
        for row, kind in zip(patient.cells.iter_rows(named=True), patient.kinds, strict=True):
            is_ctc = kind in set(map(str, CTC_KINDS))
            group = "ctc" if is_ctc else "other"
            seen[group] += 1
            if seen[group] % (2 if is_ctc else 3) == 0:
                records.append(event_xml(len(records) + 1, row["field"], row["row"], row["col"], 12, is_ctc=is_ctc))
            truth.append(
                {
                    "patient": name,
                    "field": row["field"],
                    "row": row["row"] + 1.0,
                    "col": row["col"] - 1.0,
                    "kind": kind,
                    "diameter_um": row["diameter_um"],
                    "physical_id": row["cell_id"],
                }
            )
        (root / name).mkdir(parents=True)
        (root / name / f"{name}.xml").write_text(archive_xml("".join(records)), encoding="utf-8")
    if with_truth:
        cellsearch = Cohort.open(str(root), create=True).store
        cellsearch.write_table("truth.parquet", pa.Table.from_pylist(truth, schema=TRUTH_SCHEMA))
    return root


def event_xml(number: int, field: int, row: float, col: float, half_px: int, *, is_ctc: bool) -> str:
    """One record: a square around a centre in px of the field, written in px of the cartridge, far corner first."""
    grid_row, step = divmod(field - 1, GRID[1])
    grid_col = step if grid_row % 2 == 0 else GRID[1] - 1 - step
    y, x = round(row) + grid_row * FIELD_SHAPE[0], round(col) + grid_col * FIELD_SHAPE[1]
    location = f"({x + half_px},{y + half_px}),({x - half_px},{y - half_px})"
    assigned = "true" if is_ctc else "false"
    return (
        f"<record><rid>{number}</rid><framenum>{field}</framenum><location>{location}</location>"
        f"<assigned>{assigned}</assigned></record>"
    )


def archive_xml(records: str) -> str:
    """An archive of a 2x2 grid with the given event records."""
    return (
        f"<archive><runs><record><numrows>{GRID[0]}</numrows><numcols>{GRID[1]}</numcols>"
        f"<camxsize>{FIELD_SHAPE[1]}</camxsize><camysize>{FIELD_SHAPE[0]}</camysize></record></runs>"
        f"<events>{records}</events></archive>"
    )


def train_faked(cohort: Cohort, patients: dict[str, Patient]) -> None:
    """Fit a classifier on the faked training patient, and write metrics of the test patient for it and for the baseline."""
    kinds = set(map(str, CTC_KINDS))
    vectors: dict[str, Any] = {}
    truth: dict[str, Any] = {}
    clusters: dict[str, Any] = {}
    for name in ("007", "31"):
        table = cohort.store.read_table(f"{cohort.embeddings('dino', name)}/part-000.parquet")
        place = {cell: row for row, cell in enumerate(table["cell_id"].to_pylist())}
        order = [place[cell] for cell in patients[name].cells["cell_id"]]
        matrix = np.stack([np.asarray(value, np.float32) for value in table["embedding"].to_pylist()])
        vectors[name] = matrix[order]
        truth[name] = np.isin(patients[name].kinds, list(kinds)).astype(np.int64)
        latent = cohort.store.read_table(f"{cohort.latent_cells('dino', 'map', name)}/part-000.parquet")
        clusters[name] = latent["cluster"].to_numpy()
    pca = PrincipalComponents.fit(vectors["007"], 8)
    model = Classifier.fit(pca, pca.transform(vectors["007"]), truth["007"])
    for folder, predicted in (("svm", model.predict(vectors["31"])), ("raw_pixels", np.roll(truth["31"], 2))):
        rows = metrics_rows("test", truth["31"], np.asarray(predicted), clusters["31"], all_clusters=range(-1, 3))
        files = {"metrics.parquet": metrics_table(rows)}
        record = Record(
            "train", folder, f"{folder}-1", {"encoder": "dino", "map": "map"}, {}, seconds=3.0, units_computed=1
        )
        publish(cohort.store, cohort.classifier(folder), {**files, "model.skops": model.to_bytes()}, record)


class FirstValueClassifier:
    """Probability by the first value of the embedding: a fixed stand-in for a trained classifier."""

    def probability(self, embeddings: Any) -> Any:
        """Logistic of the first value."""
        return (1 / (1 + np.exp(-2 * embeddings[:, 0].astype(np.float64)))).astype(np.float32)
