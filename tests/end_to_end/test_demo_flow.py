"""What the demo leaves behind: every path and column of the contract, and results that hold."""

from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from runner import Demo, ctc_ray, record

from ctc_ray import schema

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]
MIN_CTC_RECALL = 0.97
MATCH_RADIUS_PX = 8.0


def _patients(demo: Demo) -> pl.DataFrame:
    return pl.read_parquet(demo.cohort / "patients.parquet")


def _cells(demo: Demo, patient: str) -> pa.Table:
    return pa.concat_tables(
        [pq.ParquetFile(p).read() for p in sorted((demo.cohort / "cells" / patient).glob("part-*.parquet"))]
    )


def test_demo_takes_at_most_eight_minutes_and_names_the_report(demo: Demo) -> None:
    assert demo.run.seconds <= 8 * 60
    report = Path(demo.run.out.strip().splitlines()[-1])
    assert report == demo.cohort / "reports" / "report" / "report.html"
    assert report.stat().st_size > 100_000


def test_demo_gives_every_patient_one_known_role(demo: Demo) -> None:
    patients = _patients(demo)
    assert patients.columns == ["patient", "role", "cartridge"]
    assert patients["patient"].n_unique() == patients.height == 9
    assert set(patients["role"]) == set(schema.ROLES)


def test_demo_cells_hold_the_contract_columns_and_unique_ids(demo: Demo) -> None:
    ids: list[str] = []
    for patient in _patients(demo)["patient"]:
        cells = _cells(demo, patient)
        assert set(schema.cells_schema().names) <= set(cells.column_names)
        assert schema.unpack_pixels(cells["pixels"], cells.schema.field("pixels")).shape == (cells.num_rows, 3, 48, 48)
        assert not (demo.cohort / "cells" / patient / "_parts").exists()
        duplicates = pl.read_parquet(demo.cohort / "duplicates" / f"{patient}.parquet")
        assert set(duplicates["cell_id"]) == set(cells["cell_id"].to_pylist())
        ids += cells["cell_id"].to_pylist()
    assert len(set(ids)) == len(ids) > 2000


def test_demo_embeddings_mirror_the_cells(demo: Demo) -> None:
    for patient in _patients(demo)["patient"]:
        folder = demo.cohort / "embeddings" / "dino" / patient
        names = sorted(path.name for path in (demo.cohort / "cells" / patient).glob("part-*.parquet"))
        assert sorted(path.name for path in folder.glob("part-*.parquet")) == names
        table = pa.concat_tables([pq.ParquetFile(folder / name).read() for name in names])
        assert table["cell_id"].to_pylist() == _cells(demo, patient)["cell_id"].to_pylist()
        vectors = np.stack(table["embedding"].to_numpy())
        assert np.isfinite(vectors).all()
        assert vectors.std(axis=0).min() > 0


def test_demo_writes_the_other_contract_tables(demo: Demo) -> None:
    root = demo.cohort
    latent = pa.concat_tables([pq.ParquetFile(p).read() for p in root.glob("latent/dino/map/cells/*/part-*.parquet")])
    assert {"cell_id", "umap_x", "umap_y", "cluster"} <= set(latent.column_names)
    assert len(set(latent["cell_id"].to_pylist())) == latent.num_rows
    labels = pa.concat_tables([pq.ParquetFile(p).read() for p in root.glob("labels/*.parquet")])
    assert labels.schema.names == schema.LABELS_SCHEMA.names
    results = pl.read_parquet(root / "simulations" / "paper" / "results.parquet")
    assert results.columns == schema.RESULTS_SCHEMA.names
    assert set(results["strategy"]) == {"random", "cluster-f1", "margin", "uncertainty-ensemble"}
    assert set(results["seed"]) == {164, 29, 7, 190, 71}
    assert set(results["loop"]) == {0, 1, 2, 3, 4}
    assert (root / "classifiers" / "svm" / "model.skops").exists()
    assert (root / "encoders" / "dino" / "encoder.safetensors").exists()
    assert list((root / "index" / "dino").glob("*.faiss"))
    assert not list(root.rglob("*.pkl"))


def test_demo_stages_ran_in_worker_processes(demo: Demo) -> None:
    for folder in ("cells/P01", "embeddings/dino/P01"):
        workers = record(demo.cohort / folder)["workers"]
        assert sum(row["units"] for row in workers) > 0
        assert all(row["node"] != "local" for row in workers)


def test_demo_segmentation_finds_the_ctcs_of_the_truth_table(demo: Demo) -> None:
    truth = pl.read_parquet(demo.cartridges / "truth.parquet").filter(pl.col("kind").str.starts_with("ctc"))
    found = total = 0
    for (patient, field), rows in truth.group_by(["patient", "field"]):
        cells = _cells(demo, str(patient)).select(["field", "row", "col"]).to_pandas()
        here = cells[cells["field"] == field][["row", "col"]].to_numpy()
        wanted = rows.select("row", "col").to_numpy()
        distance = np.linalg.norm(wanted[:, None] - here[None], axis=2).min(axis=1)
        found += int((distance <= MATCH_RADIUS_PX).sum())
        total += len(wanted)
    assert total > 200
    assert found / total >= MIN_CTC_RECALL, f"CTC recall {found}/{total} = {found / total:.4f}"


def test_demo_classifier_beats_raw_pixels_on_test_patients(demo: Demo) -> None:
    scores = {}
    for name in ("svm", "raw_pixels"):
        metrics = pl.read_parquet(demo.cohort / "classifiers" / name / "metrics.parquet")
        scores[name] = metrics.filter((pl.col("split") == "test") & pl.col("cluster").is_null())["f1"].item()
    assert scores["svm"] > scores["raw_pixels"], scores


def test_demo_second_run_skips_every_finished_stage(demo: Demo) -> None:
    records = {path: path.read_bytes() for path in demo.cohort.rglob("_record.json") if "reports" not in path.parts}
    again = ctc_ray("demo", str(demo.out))
    assert again.code == 0, again.err[-3000:]
    assert again.seconds < 60
    computed = [line for line in again.err.splitlines() if line.startswith("[") and " computed, " in line]
    assert len(computed) == 15
    assert all(": 0 computed, " in line for line in computed), "\n".join(computed)
    assert {path: path.read_bytes() for path in records} == records


def test_similar_lists_neighbours_without_the_cell_itself(demo: Demo) -> None:
    import json

    cell = _cells(demo, "P01")["cell_id"][0].as_py()
    run = ctc_ray("similar", str(demo.cohort), cell, "-k", "5", "--json")
    assert run.code == 0, run.err
    rows = json.loads(run.out)
    assert len(rows) == 5
    assert cell not in {row["cell_id"] for row in rows}
    assert [row["similarity"] for row in rows] == sorted((row["similarity"] for row in rows), reverse=True)
