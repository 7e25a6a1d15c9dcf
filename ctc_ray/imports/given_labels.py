"""Labels that a source brings with its crops, as immutable events like any other reader's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import polars as pl

from ctc_ray.cohort import Cohort
from ctc_ray.config import ImportCropsConfig
from ctc_ray.errors import LabelError
from ctc_ray.imports.finish import origins_path
from ctc_ray.imports.plan import PatientPlan
from ctc_ray.imports.rows import row_name
from ctc_ray.labels.events import LabelEvent, batch_state, event_id_of, events_table, write_batch
from ctc_ray.records import FailureRow, State, digest_of, identity_of, read_record, write_failures
from ctc_ray.schema import LABELS

STAGE = "import-crops-labels"
ANY_VALUE = "*"
"""Key of `import_crops.label_map` for every value that is not named."""
REFERENCE_CODES: Mapping[str, str | None] = {"1": "ctc", "0": "non_ctc", "10": None}
"""Labels of the reference's tables; 10 is unknown."""


@dataclass(frozen=True)
class GivenLabels:
    """What came of one patient's labels."""

    written: int = 0
    """Events of a new batch."""
    there: int = 0
    """Events of a batch that was there already."""
    unknown: int = 0
    """Labels that no rule translates, listed in `failures/import-crops-labels/`."""


def translate(label: str, label_map: Mapping[str, str | None]) -> str | None:
    """Give a source's label the name it has here; None for none.

    Raises:
        LabelError: neither the map nor the built-in names know it.
    """
    known: Mapping[str, str | None] = {**{name: name for name in LABELS}, **REFERENCE_CODES, **label_map}
    if label in known:
        return known[label]
    if ANY_VALUE in label_map:
        return label_map[ANY_VALUE]
    raise LabelError(
        f"unknown label {label!r}: name it in import_crops.label_map (label: ctc, non_ctc, unsure, artefact or null)"
    )


def write_given_labels(cohort: Cohort, plan: PatientPlan, section: ImportCropsConfig, source_name: str) -> GivenLabels:
    """Write the labels of one patient's imported cells as a batch of events; one that is there already stays.

    Args:
        cohort: the patient's cells are complete.
        plan: its rows.
        section: `label_map` and `reader`.
        source_name: kept in the events.

    Changed labels make a new batch: the latest answer of a reader counts, and nothing is edited.
    """
    given, failures = _translated(plan.rows, section)
    write_failures(cohort.store, STAGE, plan.patient, failures)
    record = read_record(cohort.store, cohort.cells(plan.patient))
    if not given or record is None:
        return GivenLabels(unknown=len(failures))
    content = digest_of([[key, label] for key, label in sorted(given.items())])
    who = {"reader": section.reader, "source": source_name}
    identity = identity_of(STAGE, who, {"cells": record.identity, "labels": content})
    batch = f"import-crops-{plan.patient}-{identity}"
    if batch_state(cohort, batch, identity) is State.COMPLETE:
        return GivenLabels(there=len(given), unknown=len(failures))
    origins = pl.DataFrame(pl.from_arrow(cohort.store.read_table(origins_path(plan.patient))))
    now = datetime.now(UTC)
    events = []
    for row in origins.filter(pl.col("source_key").is_in(list(given))).iter_rows(named=True):
        event = LabelEvent(
            cell_id=row["cell_id"],
            patient=plan.patient,
            label=given[row["source_key"]],
            reader=section.reader,
            source=source_name,
            at=now,
            crop_sha=row["crop_sha"],
            field=row["field"],
            row=row["row"],
            col=row["col"],
        )
        stable = replace(event, at=datetime.fromtimestamp(0, UTC), source=f"{source_name}/{identity}")
        events.append(replace(event, event_id=event_id_of(stable)))
    write_batch(cohort, batch, events_table(events), identity=identity)
    return GivenLabels(written=len(events), unknown=len(failures))


def _translated(rows: pl.DataFrame, section: ImportCropsConfig) -> tuple[dict[str, str], list[FailureRow]]:
    """Source key -> label, and the rows whose label is unknown."""
    given, failures = {}, []
    labelled = rows.filter(pl.col("label").is_not_null()).select("file", "source_row", "key", "label")
    for file, source_row, key, text in labelled.iter_rows():
        try:
            label = translate(text, section.label_map)
        except LabelError as error:
            failures.append(FailureRow(row_name(file, source_row), LabelError.__name__, str(error)))
            continue
        if label is not None:
            given[key] = label
    return given, failures
