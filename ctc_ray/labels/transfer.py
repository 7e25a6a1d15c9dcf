"""Import and export of labels as CSV or Parquet."""

from __future__ import annotations

import io
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
from polars.exceptions import PolarsError
from scipy.spatial import cKDTree

from ctc_ray.cohort import Cohort
from ctc_ray.errors import LabelError, MissingInputError, SchemaError
from ctc_ray.labels.consensus import read_labels
from ctc_ray.labels.crops import digest_crops
from ctc_ray.labels.events import LabelEvent, batch_state, event_id_of, events_table, write_batch
from ctc_ray.labels.patients import run_over
from ctc_ray.progress import Progress
from ctc_ray.records import FailureRow, StageResult, State, digest_of, identity_of, write_failures
from ctc_ray.schema import LABELS
from ctc_ray.storage import Store

STAGE = "import-labels"
MATCH_RADIUS_PX = 5.0
"""How far a given position may lie from a cell's centroid. Source: design, the same as for relinking."""
_SHOWN = 5
_POSITION = ("patient", "field", "row", "col")


def import_labels(
    cohort: Cohort,
    file: str | Path,
    *,
    reader: str,
    source: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> StageResult:
    """Bring labels of a file in as one batch of events.

    Args:
        cohort: segmented.
        file: `.csv` or `.parquet` with a column `label` and either `cell_id`, or `patient`, `field`, `row`, `col` (px of the
            field; the nearest cell within 5 px is meant). Optional columns: `seconds`, `strategy`, and `at` (a time).
        reader: who answered.
        source: name kept in the events; None: the file's name.
        force: replace an earlier import of the same name.
        progress: where progress goes.

    Returns:
        One unit: computed, or reused where this very file was imported before. `set_aside` counts rows without a cell; they
        lie in `failures/import-labels/<batch>.parquet`.

    Raises:
        MissingInputError: no such file, or a patient is not segmented.
        SchemaError: columns are missing.
        LabelError: unknown labels, cells or patients (with row numbers), or two answers about one cell.
    """
    started = time.monotonic()
    file = str(file)
    data, frame = _read_file(file)
    name = source or Path(file).name
    identity = identity_of(STAGE, {"reader": reader, "source": name}, {"file": digest_of(data)})
    batch = f"import-{identity}"
    path = f"labels/{batch}.parquet"
    if batch_state(cohort, batch, identity) is State.COMPLETE and not force:
        return StageResult(STAGE, 0, 1, paths=(path,), seconds=time.monotonic() - started)
    placed = _placed(cohort, frame, file)
    lost = placed.filter(pl.col("cell_id").is_null())
    kept = _one_answer_each(placed.filter(pl.col("cell_id").is_not_null()), file)
    events = _events(kept, reader, name, identity)
    events = _with_digests(cohort, events, progress)
    write_batch(cohort, batch, events_table(events), identity=identity, force=force)
    write_failures(cohort.store, STAGE, batch, [_failure(file, row) for row in lost.iter_rows(named=True)])
    counts = {label: sum(event.label == label for event in events) for label in LABELS}
    return StageResult(STAGE, 1, 0, lost.height, counts, (path,), time.monotonic() - started)


def export_labels(cohort: Cohort, file: str | Path) -> StageResult:
    """Write the consensus labels as CSV or Parquet, by the file's suffix; `import_labels` reads them back.

    Columns: cell_id, patient, field, row, col, label, num_readers, agreement; sorted by patient, field and cell_id.

    Raises:
        SchemaError: the suffix is neither `.csv` nor `.parquet`.
        MissingInputError: there are no labels.
    """
    started = time.monotonic()
    suffix = _suffix(str(file))
    labels = read_labels(cohort)
    if labels.is_empty():
        raise MissingInputError(
            f"{cohort.store.uri} has no labels to export: label cells, or run `ctc-ray import-labels` first"
        )
    frames = []
    for patient in sorted(set(labels["patient"])):
        places = _cells(cohort, patient).select("cell_id", "field", "row", "col")
        frames.append(labels.filter(pl.col("patient") == patient).join(places, on="cell_id", how="left"))
    columns = ["cell_id", "patient", "field", "row", "col", "label", "num_readers", "agreement"]
    table = pl.concat(frames).select(columns).sort("patient", "field", "cell_id")
    buffer = io.BytesIO()
    if suffix == ".csv":
        table.write_csv(buffer)
    else:
        table.write_parquet(buffer)
    target = Path(file)
    Store(target.parent).write_bytes(target.name, buffer.getvalue())
    return StageResult(
        "export-labels", 1, 0, counts={"cells": table.height}, paths=(str(file),), seconds=time.monotonic() - started
    )


def _suffix(file: str) -> str:
    suffix = Path(file).suffix.lower()
    if suffix not in (".csv", ".parquet"):
        raise SchemaError(f"{file}: labels are CSV or Parquet; give a file that ends in .csv or .parquet")
    return suffix


def _read_file(file: str) -> tuple[bytes, pl.DataFrame]:
    """Bytes of the file, and its rows with `number` (1-based row of data) and text, number and time columns typed."""
    suffix = _suffix(file)
    target = Path(file)
    data = Store(target.parent).read_bytes(target.name)
    text = {"cell_id": pl.String, "patient": pl.String, "label": pl.String, "strategy": pl.String}
    try:
        if suffix == ".csv":
            frame = pl.read_csv(io.BytesIO(data), schema_overrides=text, try_parse_dates=True)
        else:
            frame = pl.read_parquet(io.BytesIO(data))
        types = {"field": pl.Int64, "row": pl.Float64, "col": pl.Float64, "seconds": pl.Float64, **text}
        frame = frame.with_columns(pl.col(name).cast(types[name]) for name in frame.columns if name in types)
    except PolarsError as error:
        raise SchemaError(f"{file} cannot be read as {suffix[1:].upper()}: {error}") from error
    missing = [] if "label" in frame.columns else ["label"]
    if "cell_id" not in frame.columns:
        missing += [name for name in _POSITION if name not in frame.columns]
    if missing:
        raise SchemaError(
            f"{file} lacks {', '.join(missing)}: it needs `label`, and `cell_id` or all of {', '.join(_POSITION)}; "
            f"it has {', '.join(frame.columns)}"
        )
    frame = frame.drop("number", strict=False).with_row_index("number", offset=1)
    _refuse(
        frame.filter(pl.col("label").is_null() | ~pl.col("label").is_in(list(LABELS))),
        f"{file}: unknown labels",
        "label",
        f"valid are {', '.join(LABELS)}",
    )
    return data, frame


def _refuse(rows: pl.DataFrame, what: str, column: str, remedy: str) -> None:
    """Raise for the rows, naming the first few by number and value."""
    if rows.is_empty():
        return
    shown = ", ".join(f"row {row['number']}: {row[column]!r}" for row in rows.head(_SHOWN).iter_rows(named=True))
    more = f" and {rows.height - _SHOWN} more" if rows.height > _SHOWN else ""
    raise LabelError(f"{what} ({shown}{more}); {remedy}")


def _cells(cohort: Cohort, patient: str) -> pl.DataFrame:
    cohort.require(cohort.cells(patient), "segment")
    table = cohort.read_columns(cohort.cells(patient), ["cell_id", "patient", "field", "row", "col"])
    return pl.DataFrame(pl.from_arrow(table))


def _placed(cohort: Cohort, frame: pl.DataFrame, file: str) -> pl.DataFrame:
    """Rows with cell_id (null: no cell near), patient, field, row, col of the cell, label and the optional columns."""
    known = cohort.patient_ids()
    if "patient" in frame.columns:
        strangers = frame.filter(pl.col("patient").is_null() | ~pl.col("patient").is_in(known))
        _refuse(strangers, f"{file}: unknown patients", "patient", f"the cohort has {', '.join(known)}")
        known = sorted(set(frame["patient"]))
    optional = [name for name in ("at", "seconds", "strategy") if name in frame.columns]
    if "cell_id" in frame.columns:
        cells = pl.concat([_cells(cohort, patient) for patient in known])
        joined = frame.select("number", "cell_id", "label", *optional).join(cells, on="cell_id", how="left")
        strangers = joined.filter(pl.col("patient").is_null())
        _refuse(
            strangers,
            f"{file}: unknown cells",
            "cell_id",
            "after a new segmentation give patient, field, row and col instead",
        )
        return joined
    frames = [_nearest(_cells(cohort, patient), frame.filter(pl.col("patient") == patient)) for patient in known]
    return pl.concat(frames).select("number", "cell_id", *_POSITION, "label", *optional)


def _nearest(cells: pl.DataFrame, rows: pl.DataFrame) -> pl.DataFrame:
    """Give each row the id and place of the nearest cell of its field; rows with none near keep their own place."""
    names = cells["cell_id"].to_list()
    places = cells.select("row", "col").to_numpy().astype(np.float64)
    fields = cells["field"].to_numpy()
    updated = []
    for row in rows.iter_rows(named=True):
        here = np.flatnonzero(fields == row["field"])
        found = None
        if len(here) and row["row"] is not None and row["col"] is not None:
            distance, index = cKDTree(places[here]).query((row["row"], row["col"]))
            found = int(here[index]) if distance <= MATCH_RADIUS_PX else None
        if found is not None:
            row["row"], row["col"] = (float(value) for value in places[found])
        updated.append({**row, "cell_id": None if found is None else names[found]})
    return pl.DataFrame(updated, schema=pl.Schema({**rows.schema, "cell_id": pl.String()}))


def _one_answer_each(rows: pl.DataFrame, file: str) -> pl.DataFrame:
    """Drop repeated answers; refuse contradictory ones."""
    labels = rows.group_by("cell_id").agg(pl.col("label").n_unique())
    torn = labels.filter(pl.col("label") > 1)["cell_id"].to_list()
    _refuse(
        rows.filter(pl.col("cell_id").is_in(torn)).sort("cell_id", "number"),
        f"{file}: different labels for one cell",
        "label",
        "keep one row a cell",
    )
    return rows.unique("cell_id", keep="first", maintain_order=True)


def _events(rows: pl.DataFrame, reader: str, source: str, identity: str) -> list[LabelEvent]:
    now = datetime.now(UTC)
    events = []
    for row in rows.sort("number").iter_rows(named=True):
        given = row.get("at")
        at = given if isinstance(given, datetime) else now
        event = LabelEvent(
            cell_id=row["cell_id"],
            patient=row["patient"],
            label=row["label"],
            reader=reader,
            source=source,
            at=at if at.tzinfo else at.replace(tzinfo=UTC),
            field=row["field"],
            row=row["row"],
            col=row["col"],
            seconds=row.get("seconds"),
            strategy=row.get("strategy"),
        )
        # The id follows from the file, not from the time of the import: importing twice gives the same ids.
        stable = replace(event, at=datetime.fromtimestamp(0, UTC), source=f"{source}/{identity}")
        events.append(replace(event, event_id=event_id_of(stable)))
    return events


def _with_digests(cohort: Cohort, events: list[LabelEvent], progress: Progress | None) -> list[LabelEvent]:
    patients = sorted({event.patient for event in events})
    calls = [
        (cohort.store, cohort.shards(cohort.cells(p)), sorted({e.cell_id for e in events if e.patient == p}))
        for p in patients
    ]
    digests: dict[str, str] = {}
    for _, found in run_over(digest_crops, calls, description="crops of labels", progress=progress, names=patients):
        digests.update(found)
    return [replace(event, crop_sha=digests[event.cell_id]) for event in events]


def _failure(file: str, row: dict[str, object]) -> FailureRow:
    where = f"patient {row['patient']}, field {row['field']}, row {row['row']}, col {row['col']}"
    return FailureRow(f"{file} row {row['number']}", "LabelError", f"no cell within {MATCH_RADIUS_PX:g} px of {where}")
