"""Tidy frames of a report: each table and figure is drawn from one of these, and each is saved beside the page.

A frame is None where its stage has not run; nothing here reads pixels.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import polars as pl

from ctc_ray.cohort import Cohort
from ctc_ray.config import RunConfig
from ctc_ray.detect.stage import detected_patients, patient_folder, table_frame
from ctc_ray.hil.stage import EFFORT, RESULTS
from ctc_ray.records import Record, read_failures, read_record
from ctc_ray.report.simulation_frames import SimulationFrames, simulation_frames

RAW_PIXELS = "raw_pixels"
"""Folder of the baseline classifier below `classifiers/`."""
PATIENTS_FRAME: dict[str, Any] = {
    "patient": pl.String,
    "role": pl.String,
    "num_cells": pl.Int64,
    "num_candidates": pl.Int64,
}
FLOW_FRAME: dict[str, Any] = {
    "stage": pl.String,
    "outputs": pl.Int64,
    "units_computed": pl.Int64,
    "units_reused": pl.Int64,
    "seconds": pl.Float64,
    "workers": pl.Int64,
    "set_aside": pl.Int64,
    "finished_at": pl.String,
}


def patients_frame(cohort: Cohort, config: RunConfig) -> pl.DataFrame:
    """One row a patient: role, cells (null before segmentation), candidates (null where not searched)."""
    rows = []
    for patient, role in cohort.patients().select("patient", "role").iter_rows():
        cells = read_record(cohort.store, cohort.cells(patient))
        found = read_record(cohort.store, patient_folder(cohort, config.detect.name, patient))
        rows.append(
            {
                "patient": patient,
                "role": role,
                "num_cells": _num_rows(cohort, cohort.cells(patient)) if cells else None,
                "num_candidates": found.counts.get("candidates") if found else None,
            }
        )
    return pl.DataFrame(rows, schema=PATIENTS_FRAME)


def _num_rows(cohort: Cohort, folder: str) -> int:
    return sum(cohort.store.num_rows(path) for path in cohort.shards(folder))


def stage_folders(cohort: Cohort, config: RunConfig) -> dict[str, list[str]]:
    """Folders whose records tell what each stage did, in the order of the flow."""
    patients, encoder = cohort.patient_ids(), config.map.encoder
    latent = [cohort.latent_cells(encoder, config.map.name, p) for p in patients]
    return {
        "segment": [cohort.cells(p) for p in patients],
        "pretrain": [cohort.encoder(config.pretrain.encoder_id)],
        "embed": [cohort.embeddings(config.embed.encoder, p) for p in patients],
        "map": [cohort.latent(encoder, config.map.name), *latent],
        "train": [cohort.classifier(config.train.name)],
        "train (raw pixels)": [cohort.classifier(RAW_PIXELS)],
        "simulate": [cohort.simulation(config.hil.name)],
        "index": [cohort.index(config.index.encoder)],
        "detect": [patient_folder(cohort, config.detect.name, p) for p in patients],
        "compare": [cohort.detection(config.compare.name)],
    }


def read_records(cohort: Cohort, config: RunConfig) -> dict[str, list[Record]]:
    """Records of each stage that has left any."""
    found = {
        stage: [record for folder in folders if (record := read_record(cohort.store, folder)) is not None]
        for stage, folders in stage_folders(cohort, config).items()
    }
    return {stage: records for stage, records in found.items() if records}


def flow_frame(cohort: Cohort, config: RunConfig) -> pl.DataFrame:
    """One row a stage: outputs (records), units computed and reused, seconds of all its units, worker processes, failures."""
    records = read_records(cohort, config)
    rows = []
    for stage in stage_folders(cohort, config):
        done = records.get(stage, [])
        workers = {(row.get("node"), row.get("pid")) for record in done for row in record.workers}
        rows.append(
            {
                "stage": stage,
                "outputs": len(done),
                "units_computed": sum(record.units_computed for record in done),
                "units_reused": sum(record.units_reused for record in done),
                "seconds": float(sum(record.seconds for record in done)),
                "workers": len(workers),
                "set_aside": read_failures(cohort.store, stage).height,
                "finished_at": max((record.created_at for record in done), default=None),
            }
        )
    return pl.DataFrame(rows, schema=FLOW_FRAME)


def failures_frame(cohort: Cohort) -> pl.DataFrame:
    """All units that were set aside: stage, unit, source, kind, message."""
    stages = cohort.store.list_folders("failures")
    frames = [read_failures(cohort.store, stage) for stage in stages]
    return pl.concat([read_failures(cohort.store, "none"), *frames])


def read_output(cohort: Cohort, folder: str, name: str) -> pl.DataFrame | None:
    """A table that the record of a folder lists; None where that stage has not run."""
    record = read_record(cohort.store, folder)
    if record is None or name not in record.files:
        return None
    return table_frame(cohort.store.read_table(f"{folder}/{name}"))


def metrics_frame(cohort: Cohort, config: RunConfig) -> pl.DataFrame | None:
    """Metrics of the classifier and of the raw-pixel baseline: column `features` (encoder, raw pixels) and METRICS_SCHEMA."""
    sources = {"encoder": config.train.name, "raw pixels": RAW_PIXELS}
    frames = [
        frame.with_columns(features=pl.lit(label))
        for label, name in sources.items()
        if (frame := read_output(cohort, cohort.classifier(name), "metrics.parquet")) is not None
    ]
    return pl.concat(frames) if frames else None


def cluster_frame(sizes: pl.DataFrame | None, metrics: pl.DataFrame | None) -> pl.DataFrame | None:
    """One row a cluster: all its cells, labelled test cells, and the test F1 of encoder and raw pixels.

    Args:
        sizes: cluster, num_cells of the whole cohort.
        metrics: `metrics_frame`.

    Returns:
        Columns cluster (null: all cells, -1: background), num_cells, num_labelled, num_ctc, f1, recall, precision, reason,
        raw_pixels_f1; None without a map or metrics.
    """
    if metrics is None or sizes is None:
        return None
    test = metrics.filter(pl.col("split") == "test")
    encoder = test.filter(pl.col("features") == "encoder").select(
        pl.col("cluster").cast(pl.Int16),
        pl.col("num_cells").alias("num_labelled"),
        "num_ctc",
        "f1",
        "recall",
        "precision",
        "reason",
    )
    raw = test.filter(pl.col("features") == "raw pixels").select(
        pl.col("cluster").cast(pl.Int16), pl.col("f1").alias("raw_pixels_f1")
    )
    total = pl.DataFrame({"cluster": [None], "num_cells": [sizes["num_cells"].sum()]}, schema=sizes.schema)
    return (
        pl.concat([total, sizes])
        .join(encoder, on="cluster", how="left", nulls_equal=True)
        .join(raw, on="cluster", how="left", nulls_equal=True)
        .sort("cluster", nulls_last=False)
    )


def simulation_of(cohort: Cohort, config: RunConfig) -> SimulationFrames | None:
    """What the simulation of the cohort says."""
    folder = cohort.simulation(config.hil.name)
    results = read_output(cohort, folder, RESULTS)
    return None if results is None else simulation_frames(results, read_output(cohort, folder, EFFORT))


def candidates_frame(cohort: Cohort, config: RunConfig) -> pl.DataFrame | None:
    """All candidates of the detection run with what is known of each: is_ctc, judged_by, found_by; highest probability first."""
    patients = detected_patients(cohort, config.detect.name)
    if not patients:
        return None
    paths = [f"{patient_folder(cohort, config.detect.name, p)}/candidates.parquet" for p in patients]
    found = pl.concat([table_frame(cohort.store.read_table(path)) for path in paths])
    folder = cohort.detection(config.detect.name)
    judged = read_output(cohort, folder, "judgements.parquet")
    matches = read_output(cohort, folder, "matches.parquet")
    known = (
        _empty("is_ctc", pl.Boolean, "judged_by") if judged is None else judged.select("cell_id", "is_ctc", "judged_by")
    )
    if matches is None:
        finders = _empty("event_is_ctc", pl.Boolean, "found_by")
    else:
        own = matches.filter(pl.col("cell_id").is_not_null())
        finders = own.group_by("cell_id").agg(pl.col("event_is_ctc").any(), pl.col("found_by").first())
    return (
        found.join(known, on="cell_id", how="left")
        .join(finders, on="cell_id", how="left")
        .sort(["probability", "cell_id"], descending=[True, False])
    )


def _empty(flag: str, kind: Any, text: str) -> pl.DataFrame:
    return pl.DataFrame(schema={"cell_id": pl.String, flag: kind, text: pl.String})


def missed_events_frame(cohort: Cohort, config: RunConfig) -> pl.DataFrame | None:
    """CellSearch's CTCs that no candidate matches, or only one that is no CTC, with the cell segmented there."""
    folder = cohort.detection(config.compare.name)
    events = read_output(cohort, folder, "events.parquet")
    matches = read_output(cohort, folder, "matches.parquet")
    if events is None or matches is None:
        return None
    judged = read_output(cohort, folder, "judgements.parquet")
    refuted = [] if judged is None else judged.filter(~pl.col("is_ctc"))["cell_id"].to_list()
    shared = matches.filter((pl.col("found_by") == "both") & ~pl.col("cell_id").is_in(refuted))
    return events.filter("is_ctc").join(shared, on=["patient", "event_id"], how="anti").sort("patient", "event_id")


def inputs_of(records: dict[str, list[Record]], extra: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Name -> identity of everything that a report shows; `created_at` counts, since the flow shows times."""
    inputs = {
        f"{stage}/{record.unit}": f"{record.identity}@{record.created_at}"
        for stage, done in records.items()
        for record in done
    }
    return inputs | dict(extra)
