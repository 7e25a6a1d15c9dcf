"""Stage `report`: gather frames, survey the cells once on the workers, write one page and its frames."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import polars as pl

from ctc_ray.cluster import connect
from ctc_ray.cohort import Cohort
from ctc_ray.config import RunConfig
from ctc_ray.detect.fan_out import fan_out
from ctc_ray.labels.consensus import labels_digest, read_labels
from ctc_ray.progress import Progress
from ctc_ray.records import (
    PlanRow,
    Record,
    StageResult,
    State,
    digest_of,
    identity_of,
    library_versions,
    publish,
    read_record,
    state_of,
)
from ctc_ray.report import frames
from ctc_ray.report.agreement import agreement_identity, read_agreement
from ctc_ray.report.data import ReportData
from ctc_ray.report.figures import real_field_png
from ctc_ray.report.galleries import MAX_COMPARED_CELLS, model_only
from ctc_ray.report.latent_points import add_predictions, cluster_outlines, latent_points, sample_fraction
from ctc_ray.report.page import page_resources_digest, render_page
from ctc_ray.report.real_field import RealField
from ctc_ray.report.survey import Survey, SurveyRequest, contrast_frame, survey_patient

STAGE = "report"
PAGE = "report.html"
_REAL_FIELD_PNG = "real_field.png"


def run_report(
    config: RunConfig,
    cohort: Cohort,
    *,
    real_field: RealField | None = None,
    force: bool = False,
    progress: Progress,
) -> StageResult:
    """Write `reports/<name>/report.html` and its frames from whatever has been computed.

    A report is a view: it is written again whenever what it shows has changed, and is left alone otherwise.

    Args:
        config: settings of all stages; they say which classifier, map, simulation and detection run to show.
        cohort: any cohort; what has not run is named on the page with its command.
        real_field: a real field to show; None keeps the one that the report showed before.
        force: write it again in any case.
        progress: where progress goes.

    Returns:
        One unit: the page.
    """
    started = time.monotonic()
    folder = cohort.report(config.report.name)
    inputs = report_inputs(config, cohort, real_field)
    identity = identity_of(STAGE, config.model_dump(mode="json"), inputs)
    page_path = f"{folder}/{PAGE}"
    if not force and state_of(cohort.store, folder, identity) is State.COMPLETE:
        return StageResult(STAGE, 0, 1, paths=(page_path,), seconds=time.monotonic() - started)
    with progress.task("report", 3) as task:
        data = gather(config, cohort, real_field)
        task.advance(note="frames")
        data = add_cells(data, cohort)
        task.advance(note="cells")
        files: dict[str, Any] = {f"frames/{name}.csv": _csv(frame) for name, frame in data.frames().items()}
        if data.real_field_png is not None:
            files[_REAL_FIELD_PNG] = data.real_field_png
        files[PAGE] = render_page(data).encode("utf-8")
        task.advance(note="page")
    counts = {"patients": data.patients.height, "cells": int(data.patients["num_cells"].sum() or 0)}
    counts["page_bytes"] = len(files[PAGE])
    record = Record(
        stage=STAGE,
        unit=config.report.name,
        identity=identity,
        config=config.report.identity(),
        inputs=inputs,
        counts=counts,
        seconds=time.monotonic() - started,
        units_computed=1,
    )
    publish(cohort.store, folder, files, record)
    return StageResult(STAGE, 1, 0, counts=counts, paths=(page_path,), seconds=time.monotonic() - started)


def plan_report(config: RunConfig, cohort: Cohort) -> list[PlanRow]:
    """Say whether the report would be written, and why; nothing is changed."""
    folder = cohort.report(config.report.name)
    identity = identity_of(STAGE, config.model_dump(mode="json"), report_inputs(config, cohort, None))
    state = state_of(cohort.store, folder, identity)
    why = {
        State.COMPLETE: "complete: nothing to do",
        State.STALE: "what it shows has changed: will be written again",
        State.ABSENT: "not written yet",
    }[state]
    return [PlanRow(config.report.name, state, why)]


def report_inputs(config: RunConfig, cohort: Cohort, real_field: RealField | None) -> dict[str, str]:
    """Name -> identity of all that the page shows."""
    former = read_record(cohort.store, cohort.report(config.report.name))
    kept = former.inputs.get("real_field", "none") if former else "none"
    extra = [
        ("labels", labels_digest(cohort)),
        ("patients", digest_of(cohort.patients().write_csv().encode())),
        ("failures", digest_of(frames.failures_frame(cohort).write_csv().encode())),
        ("real_field", real_field.digest() if real_field is not None else kept),
        ("map_agreement", agreement_identity(cohort, config)),
        ("page", page_resources_digest()),
        ("uri", cohort.store.uri),
    ]
    return frames.inputs_of(frames.read_records(cohort, config), extra)


def gather(config: RunConfig, cohort: Cohort, real_field: RealField | None) -> ReportData:
    """Read every frame that needs no pixels."""
    labels = read_labels(cohort).select("cell_id", "label")
    points, sizes = latent_points(cohort, config, labels)
    folder = cohort.detection(config.compare.name)
    shown, picture = _real_field(config, cohort, real_field)
    return ReportData(
        config=config,
        cohort_uri=cohort.store.uri,
        patients=frames.patients_frame(cohort, config),
        flow=frames.flow_frame(cohort, config),
        failures=frames.failures_frame(cohort),
        contrast=contrast_frame([], config.report.contrast_percentiles),
        points=points,
        clusters=frames.cluster_frame(sizes, frames.metrics_frame(cohort, config)),
        agreement=read_agreement(cohort, config),
        simulation=frames.simulation_of(cohort, config),
        ppv=frames.read_output(cohort, folder, "ppv.parquet"),
        sensitivity=frames.read_output(cohort, folder, "sensitivity.parquet"),
        candidates=frames.candidates_frame(cohort, config),
        missed=frames.missed_events_frame(cohort, config),
        real_field=shown,
        real_field_png=picture,
        versions=library_versions(),
    )


def _real_field(config: RunConfig, cohort: Cohort, given: RealField | None) -> tuple[pl.DataFrame | None, bytes | None]:
    """The real field's numbers and picture: those given, else those of the report that is there."""
    if given is not None:
        values = {name: [getattr(given, name)] for name in ("average_precision_50", "num_true", "num_found", "source")}
        return pl.DataFrame(values), real_field_png(given)
    folder = cohort.report(config.report.name)
    former = read_record(cohort.store, folder)
    names = {"frames/real_field.csv", _REAL_FIELD_PNG}
    if former is None or not names <= former.files.keys():
        return None, None
    if any(cohort.store.size(f"{folder}/{name}") != former.files[name] for name in names):
        return None, None
    frame = pl.read_csv(cohort.store.read_bytes(f"{folder}/frames/real_field.csv"))
    return frame, cohort.store.read_bytes(f"{folder}/{_REAL_FIELD_PNG}")


def add_cells(data: ReportData, cohort: Cohort) -> ReportData:
    """Add what one pass of the workers over the cells gives: probabilities of the points, crops to show, the contrast."""
    chosen = cluster_examples(data.points, data.config.report.cluster_examples)
    requests = survey_requests(data, cohort, chosen)
    surveys: list[Survey] = []
    if requests:
        with connect(config=data.config.ray):
            surveys = list(fan_out(survey_patient, [(cohort.store, request) for request in requests]))
    probability = {name: value for survey in surveys for name, value in survey.probability.items()}
    points = None
    if data.points is not None:
        points = add_predictions(data.points, probability, data.config.detect.threshold)
        shown = points.select("cell_id", "probability")
        chosen = chosen.join(shown, on="cell_id", how="left", maintain_order="left")
    return dataclasses.replace(
        data,
        points=points,
        outlines=None if points is None else cluster_outlines(points),
        examples=None if data.points is None else chosen,
        contrast=contrast_frame(surveys, data.config.report.contrast_percentiles),
        crops={name: crop for survey in surveys for name, crop in survey.crops.items()},
    )


def cluster_examples(points: pl.DataFrame | None, num_examples: int) -> pl.DataFrame:
    """Choose cells of each cluster to show: two thirds labelled test cells where there are enough, the rest others.

    Returns:
        Columns cluster, rank, cell_id, patient, role, label; the choice depends on the cell ids alone.

    Source: paper, Figure 2 (two rows of labelled test data, one of unlabelled training data).
    """
    if points is None:
        schema = {"cluster": pl.Int16, "rank": pl.Int32, "cell_id": pl.String}
        return pl.DataFrame(schema=schema)
    first = -(-num_examples * 2 // 3)
    examined = (pl.col("role") == "test").fill_null(value=False) & pl.col("label").is_not_null()
    ordered = points.with_columns(examined=examined, order=sample_fraction(pl.col("cell_id"))).sort("order", "cell_id")
    parts = []
    for (cluster,), rows in ordered.group_by(["cluster"], maintain_order=True):
        if cluster is None:
            continue
        labelled, others = rows.filter("examined"), rows.filter(~pl.col("examined"))
        keep = max(first, num_examples - others.height)
        top = labelled.head(keep)
        own = pl.concat([top, others.head(num_examples - top.height)])
        parts.append(own.with_columns(rank=pl.int_range(own.height, dtype=pl.Int32)))
    columns = ["cluster", "rank", "cell_id", "patient", "role", "label"]
    empty = ordered.head(0).with_columns(rank=pl.lit(0, pl.Int32))
    return pl.concat([empty, *parts]).select(columns).sort("cluster", "rank")


def survey_requests(data: ReportData, cohort: Cohort, examples: pl.DataFrame) -> list[SurveyRequest]:
    """What each patient's worker has to fetch; [] where no patient is segmented."""
    crops: dict[str, set[str]] = {}
    shown = [examples] if examples.height else []
    if data.candidates is not None:
        shown.append(data.candidates.head(data.config.report.gallery_cells))
        shown.append(model_only(data.candidates).head(MAX_COMPARED_CELLS))
    if data.missed is not None:
        missed = data.missed.head(MAX_COMPARED_CELLS).filter(pl.col("nearest_cell_id").is_not_null())
        shown.append(missed.select("patient", pl.col("nearest_cell_id").alias("cell_id")))
    for frame in shown:
        for patient, cell_id in frame.select("patient", "cell_id").iter_rows():
            crops.setdefault(patient, set()).add(cell_id)
    classifier = data.config.train.name
    has_classifier = read_record(cohort.store, cohort.classifier(classifier)) is not None
    requests = []
    for patient in data.patients.filter(pl.col("num_cells").is_not_null())["patient"]:
        points = [] if data.points is None else data.points.filter(pl.col("patient") == patient)["cell_id"].to_list()
        requests.append(
            SurveyRequest(
                patient=patient,
                crop_ids=tuple(sorted(crops.get(patient, ()))),
                point_ids=tuple(points),
                encoder=data.config.map.encoder,
                classifier=classifier if has_classifier else None,
            )
        )
    return requests


def _csv(frame: pl.DataFrame) -> bytes:
    return frame.write_csv().encode("utf-8")
