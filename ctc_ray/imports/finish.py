"""From a patient's parts to its finished output: shards, duplicates, origin of each cell, failures, record last."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ctc_ray.cohort import Cohort
from ctc_ray.imports.convert import SOURCE_COLUMNS, read_part
from ctc_ray.imports.plan import SET_ASIDE, STAGE
from ctc_ray.labels.events import crop_digest
from ctc_ray.records import (
    FailureRow,
    Record,
    digest_of,
    identity_of,
    read_record,
    write_failures,
    write_record,
)
from ctc_ray.schema import DUPLICATES_SCHEMA
from ctc_ray.storage import Store

ROWS_PER_FILE = 20_000
"""About 140 MB of 8-bit pixels of three channels: what one finishing task holds in memory."""
ORIGINS_SCHEMA = pa.schema(
    [
        ("cell_id", pa.string()),
        *SOURCE_COLUMNS,
        ("crop_sha", pa.string()),
        ("row", pa.float32()),
        ("col", pa.float32()),
        ("field", pa.int16()),
    ]
)
"""Columns of `imports/<patient>.parquet`; `row`, `col` in px of the field, null where the source does not tell them."""


@dataclass(frozen=True)
class PatientOutput:
    """What finishing needs of a plan: small, it travels to a worker."""

    patient: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    parts: tuple[str, ...]
    refused: tuple[FailureRow, ...]
    units_computed: int
    seconds: float
    workers: tuple[dict[str, Any], ...]


def origins_path(patient: str) -> str:
    """Table of where each imported cell of a patient came from."""
    return f"imports/{patient}.parquet"


def finish_patient(cohort: Cohort, output: PatientOutput) -> int:
    """Write a patient's output from its parts, then delete them; returns its cells.

    Args:
        cohort: where parts lie and the output goes.
        output: of one patient; all its parts are there.
    """
    store, folder = cohort.store, cohort.cells(output.patient)
    failures: list[FailureRow] = []
    origins: list[pa.Table] = []
    files = {}
    for number, table in enumerate(_shards(store, sorted(output.parts), failures)):
        shas = pa.array([crop_digest(crop.as_py()) for crop in table["pixels"]], pa.string())
        origins.append(table.append_column("crop_sha", shas).select(ORIGINS_SCHEMA.names).cast(ORIGINS_SCHEMA))
        name = f"part-{number:03d}.parquet"
        files[name] = store.write_table(f"{folder}/{name}", table.drop_columns(SOURCE_COLUMNS.names))
    joined = pa.concat_tables(origins)
    ids = joined["cell_id"]
    store.write_table(cohort.duplicates_path(output.patient), pa.table([ids, ids], schema=DUPLICATES_SCHEMA))
    store.write_table(origins_path(output.patient), joined)
    write_failures(store, STAGE, output.patient, [*output.refused, *failures])
    inputs = dict(output.inputs)
    if failures:
        inputs[SET_ASIDE] = digest_of(sorted(failure.source for failure in failures))
    former = read_record(store, folder)
    record = Record(
        stage=STAGE,
        unit=output.patient,
        identity=identity_of(STAGE, output.settings, inputs),
        config=output.settings,
        inputs=inputs,
        files=files,
        counts={"cells": joined.num_rows, "physical_cells": joined.num_rows, "failed": len(failures)},
        seconds=output.seconds,
        units_computed=output.units_computed,
        units_reused=len(output.parts) - output.units_computed,
        workers=list(output.workers),
    )
    write_record(store, folder, record)
    for name in sorted(set(former.files if former else ()) - set(files)):
        store.delete(f"{folder}/{name}")
    store.delete_folder(f"{folder}/_parts")
    return int(joined.num_rows)


def _shards(store: Store, parts: Sequence[str], failures: list[FailureRow]) -> Iterator[pa.Table]:
    """Tables of at least `ROWS_PER_FILE` rows (the last may be shorter), in the order of the source; notes failures.

    There is always one table, empty where no row could be imported.
    """
    held: list[pa.Table] = []
    given = 0
    for path in parts:
        table, failed = read_part(store, path)
        failures += failed
        held.append(table.replace_schema_metadata(None))
        if sum(part.num_rows for part in held) >= ROWS_PER_FILE:
            yield pa.concat_tables(held).combine_chunks()
            held, given = [], given + 1
    if any(part.num_rows for part in held) or not given:
        yield pa.concat_tables(held).combine_chunks()
