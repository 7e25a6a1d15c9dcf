"""The rows of a source without their pixels: patient, name, position, label; and what can be refused before any is read."""

from __future__ import annotations

import io
import json
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import polars as pl
from polars.exceptions import PolarsError

from ctc_ray.cohort import check_patient_id
from ctc_ray.config import ImportCropsConfig
from ctc_ray.errors import ConfigError, SchemaError
from ctc_ray.imports.source import PARQUET, Source, layout_of, npz_names, read_npz_column
from ctc_ray.records import FailureRow

NO_PATIENT = "_source"
"""Unit of `failures/import-crops/` for rows whose patient is not known."""
ROW_SCHEMA = pl.Schema(
    {
        "file": pl.String(),
        "source_row": pl.Int64(),
        "patient": pl.String(),
        "key": pl.String(),
        "paths": pl.List(pl.String()),
        "field": pl.Int16(),
        "row": pl.Float32(),
        "col": pl.Float32(),
        "y0": pl.Int16(),
        "x0": pl.Int16(),
        "label": pl.String(),
    }
)
"""`source_row` counts from 0; `paths` is null but for tables; field, row, col are null together where one is unknown."""
_PATIENT_COLUMNS = ("patient", "case")
_POSITION = ("field", "row", "col")
_REFERENCE_BOX = ("frame_num", "y_min", "y_max", "x_min", "x_max")


@dataclass(frozen=True)
class SourceRows:
    """Rows that can be tried, and those that cannot.

    Attributes:
        frame: columns of `ROW_SCHEMA`, in the order of files and rows.
        failures: patient (or `NO_PATIENT`) -> rows set aside already.
    """

    frame: pl.DataFrame
    failures: dict[str, list[FailureRow]] = field(default_factory=dict)


def row_name(file: str, source_row: int) -> str:
    """How failures name a row: its file and its number, from 1."""
    return f"{file} row {source_row + 1}"


def read_rows(source: Source, section: ImportCropsConfig) -> SourceRows:
    """Read all rows of a source but no pixels.

    Rows without a usable patient, with an empty image path, or whose name repeats within a patient are set aside.

    Raises:
        SchemaError: a column or array that the settings name is missing, or values cannot be read as what they should be.
        ConfigError: names of the settings do not fit the source.
    """
    frames = [_file_rows(source, file, section) for file in source.files]
    frame = pl.concat(frames)
    return _set_aside(frame, source.kind == "table")


def _file_rows(source: Source, file: str, section: ImportCropsConfig) -> pl.DataFrame:
    raw = _raw_columns(source, file, section)
    where = source.store.describe(file)
    missing = [name for name in _named(section) if name not in raw.columns]
    if missing:
        raise SchemaError(f"{where} lacks {', '.join(missing)}; it has {', '.join(raw.columns)}")
    patient = section.patient_column or next((name for name in _PATIENT_COLUMNS if name in raw.columns), None)
    stem = section.patient or file.rsplit("/", 1)[-1].rsplit(".", 1)[0]
    label = section.label_column or ("label" if "label" in raw.columns else None)
    try:
        return raw.select(
            pl.lit(file).alias("file"),
            pl.int_range(pl.len()).alias("source_row"),
            (pl.lit(stem) if patient is None else pl.col(patient).cast(pl.String)).alias("patient"),
            _key(source, file, section, raw).alias("key"),
            _paths(source, section, raw).alias("paths"),
            *_position(raw),
            (pl.lit(None, pl.String) if label is None else _label_text(label)).alias("label"),
        ).cast(ROW_SCHEMA)
    except PolarsError as error:
        raise SchemaError(f"{where}: {error}") from error


def _named(section: ImportCropsConfig) -> list[str]:
    names = (section.patient_column, section.id_column, section.label_column)
    return [name for name in names if name is not None]


def _wanted(section: ImportCropsConfig) -> set[str]:
    known = (*_named(section), *_PATIENT_COLUMNS, *_POSITION, *_REFERENCE_BOX, *section.path_columns)
    return {*known, "y0", "x0", "label", "source_id"}


def _raw_columns(source: Source, file: str, section: ImportCropsConfig) -> pl.DataFrame:
    """The columns that can matter, as they stand; at least the number of rows where there are none."""
    where, wanted = source.store.describe(file), _wanted(section)
    if source.kind == "npz":
        _, num_rows = layout_of(source, file, section)
        columns: dict[str, Any] = {"_row": range(num_rows)}
        for name in npz_names(source, file):
            if name in wanted:
                columns[name] = read_npz_column(source, file, name, num_rows)
        return pl.DataFrame(columns)
    if file.lower().endswith(PARQUET):
        names = [name for name in source.store.read_schema(file).names if name in wanted and name != section.pixels]
        frame = pl.DataFrame(pl.from_arrow(source.store.read_table(file, names))) if names else pl.DataFrame()
        num_rows = source.store.num_rows(file)
        return (
            frame.with_columns(pl.int_range(num_rows).alias("_row"))
            if names
            else pl.DataFrame({"_row": range(num_rows)})
        )
    try:
        frame = pl.read_csv(io.BytesIO(source.store.read_bytes(file)), infer_schema=False)
    except PolarsError as error:
        raise SchemaError(f"{where} cannot be read as CSV: {error}") from error
    return frame.select([name for name in frame.columns if name in wanted] or pl.all())


def _key(source: Source, file: str, section: ImportCropsConfig, raw: pl.DataFrame) -> pl.Expr:
    """Name of each row within its patient."""
    name = section.id_column or ("source_id" if "source_id" in raw.columns else None)
    if name is not None:
        return pl.col(name).cast(pl.String)
    if source.kind == "table":
        return pl.concat_str([pl.col(c).fill_null("") for c in section.path_columns], separator="\t")
    return pl.lit(f"{file}#") + pl.int_range(pl.len()).cast(pl.String)


def _paths(source: Source, section: ImportCropsConfig, raw: pl.DataFrame) -> pl.Expr:
    if source.kind != "table":
        return pl.lit(None, pl.List(pl.String))
    missing = [name for name in section.path_columns if name not in raw.columns]
    if missing:
        raise SchemaError(
            f"{source.store.describe()} lacks {', '.join(missing)}: import_crops.path_columns names the columns of image "
            f"files; the table has {', '.join(raw.columns)}"
        )
    num_channels = len(section.channel_order or section.path_columns)
    if num_channels not in (3, 4):
        raise ConfigError(
            f"a crop has 3 or 4 channels, the settings give {num_channels}: see import_crops.path_columns"
        )
    return pl.concat_list([pl.col(name).fill_null("") for name in section.path_columns])


def _position(raw: pl.DataFrame) -> list[pl.Expr]:
    """Columns field, row, col, y0, x0: as given, or from the box of the reference's tables (its centre), or null."""
    names, none = set(raw.columns), pl.lit(None, pl.Float64)
    number = {name: pl.col(name).cast(pl.Float64) for name in names & {*_POSITION, *_REFERENCE_BOX, "y0", "x0"}}
    if set(_POSITION) <= names:
        place = [number[name] for name in _POSITION]
    elif set(_REFERENCE_BOX) <= names:
        box = [number[name] for name in _REFERENCE_BOX]
        place = [box[0], (box[1] + box[2]) / 2, (box[3] + box[4]) / 2]
    else:
        place = [none, none, none]
    known = pl.all_horizontal(*(part.is_not_null() & part.is_finite() for part in place))
    whole = [pl.when(known).then(part).alias(name) for name, part in zip(_POSITION, place, strict=True)]
    corner = (("y0", "y_min"), ("x0", "x_min"))
    corners = [number.get(name, number.get(box, none)).floor().alias(name) for name, box in corner]
    return [*whole, *corners]


def _label_text(column: str) -> pl.Expr:
    """Labels as text; the reference writes its codes as floats (`10.0`)."""
    text = pl.col(column).cast(pl.String).str.strip_chars()
    text = text.str.replace(r"^(-?\d+)\.0+$", "$1")
    return pl.when(text != "").then(text)


def _set_aside(frame: pl.DataFrame, has_paths: bool) -> SourceRows:
    """Take out the rows that cannot be tried."""
    failures: defaultdict[str, list[FailureRow]] = defaultdict(list)
    reasons = {name: _patient_fault(name) for name in frame["patient"].unique().to_list()}
    bad = {name for name, reason in reasons.items() if reason}
    unknown = pl.col("patient").is_null() | pl.col("patient").is_in([name for name in bad if name is not None])
    for row in frame.filter(unknown).iter_rows(named=True):
        failures[NO_PATIENT].append(_failure(row, reasons[row["patient"]]))
    frame = frame.filter(~unknown)
    if has_paths:
        empty = pl.col("paths").list.contains("")
        for row in frame.filter(empty).iter_rows(named=True):
            failures[row["patient"]].append(_failure(row, "an image path is empty"))
        frame = frame.filter(~empty)
    nameless = pl.col("key").is_null() | (pl.col("key") == "")
    for row in frame.filter(nameless).iter_rows(named=True):
        failures[row["patient"]].append(_failure(row, "it has no id"))
    frame = frame.filter(~nameless)
    repeated = ~pl.struct("patient", "key").is_first_distinct()
    for row in frame.filter(repeated).iter_rows(named=True):
        failures[row["patient"]].append(_failure(row, f"{row['key']!r} is there twice; the first is taken"))
    return SourceRows(frame.filter(~repeated), dict(failures))


def _patient_fault(name: str | None) -> str:
    if name is None:
        return "it names no patient"
    try:
        check_patient_id(name)
    except ConfigError as error:
        return str(error)
    return ""


def _failure(row: dict[str, Any], reason: str) -> FailureRow:
    return FailureRow(row_name(row["file"], row["source_row"]), SchemaError.__name__, reason)


def identity_texts(frame: pl.DataFrame) -> list[str]:
    """One text a row of what its cell is made from, for the identity of a patient's cells.

    Neither labels nor the row's place in a table belong to it: labels change, and rows of new patients come between.
    """
    names = ["key", "paths", *_POSITION, "y0", "x0"]
    return [json.dumps(list(row), ensure_ascii=True) for row in frame.select(names).iter_rows()]
