"""What an import has to do: for each patient its identity and state, and the units of rows that are missing."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from ctc_ray.cohort import Cohort
from ctc_ray.config import ImportCropsConfig
from ctc_ray.errors import ConfigError, CtcRayError, SchemaError, StaleOutputError
from ctc_ray.imports.convert import Conversion, num_channels
from ctc_ray.imports.fitting import CountsRule
from ctc_ray.imports.pixels import ImageReader
from ctc_ray.imports.rows import SourceRows, identity_texts
from ctc_ray.imports.source import Source, content_tag, layout_of
from ctc_ray.records import FailureRow, Record, State, digest_of, identity_of, read_record, state_of

STAGE = "import-crops"
SET_ASIDE = "set_aside"
"""Input of a record that names the rows that failed: when a retry recovers one, what was made from the cells is stale."""
_NOT_PIXELS = (
    "label_column",
    "label_map",
    "reader",
    "path_columns",
    "pixels",
    "patient_column",
    "patient",
    "id_column",
)
_MAX_PROBES = 9


@dataclass(frozen=True)
class PatientPlan:
    """One patient of a source.

    Attributes:
        patient: its id.
        rows: of `ROW_SCHEMA`, in the order of the source.
        refused: rows that were set aside before any pixel was read.
        settings: what enters the identity.
        inputs: rows and files that it is made from.
        identity: of the cells, as far as it is known before they are read.
        state: of what is there.
        is_open: whether there is something to do.
    """

    patient: str
    rows: pl.DataFrame
    refused: tuple[FailureRow, ...]
    settings: dict[str, Any]
    inputs: dict[str, str]
    identity: str
    state: State
    is_open: bool

    @property
    def parts_folder(self) -> str:
        """Folder of the parts while the patient is open."""
        return f"cells/{self.patient}/_parts/{self.identity}"


@dataclass(frozen=True)
class ImportUnit:
    """Some rows of the source, and where each patient's part of them goes."""

    rows: pl.DataFrame
    parts: dict[str, str]


def conversion_of(source: Source, section: ImportCropsConfig, rows: SourceRows) -> Conversion:
    """Settle what every crop of the import becomes: number type, highest count, channels.

    Raises:
        SchemaError: the files differ, or hold numbers or channels that the settings do not explain.
        ConfigError: the source has no usable row.
    """
    if rows.frame.is_empty():
        reasons = [row for listed in rows.failures.values() for row in listed]
        first = (
            f": all {len(reasons)} are set aside. First: {reasons[0].source}: {reasons[0].message}" if reasons else ""
        )
        raise ConfigError(f"{source.store.describe()} has no row that could be imported{first}")
    if source.kind == "table":
        dtype, given = _probe_images(source, section, rows.frame), len(section.path_columns)
    else:
        layouts = {file: layout_of(source, file, section)[0] for file in source.files}
        kinds = {(layout.dtype, layout.channels) for layout in layouts.values()}
        if len(kinds) > 1:
            raise SchemaError(
                f"{source.store.describe()}: the files hold different crops, {sorted(kinds)}: import them one by one"
            )
        dtype, given = kinds.pop()
    return Conversion(section, _counts_rule(section, dtype, source), num_channels(given, section))


def _counts_rule(section: ImportCropsConfig, dtype: str, source: Source) -> CountsRule:
    kind = np.dtype(dtype)
    if section.bits is not None:
        if kind.kind == "f" and section.float_maximum is None:
            raise SchemaError(
                f"{source.store.describe()} holds {dtype}: set import_crops.float_maximum to say what they mean"
            )
        stored = "uint8" if section.bits == 8 else "uint16"
        return CountsRule(stored, 2**section.bits - 1, section.float_maximum, any_integer=True)
    if dtype not in ("uint8", "uint16"):
        remedy = "import_crops.bits" + (" and float_maximum" if kind.kind == "f" else "")
        raise SchemaError(
            f"{source.store.describe()} holds {dtype}, crops are stored as uint8 or uint16 counts: set {remedy}"
        )
    return CountsRule(dtype, int(np.iinfo(dtype).max))


def _probe_images(source: Source, section: ImportCropsConfig, frame: pl.DataFrame) -> str:
    """Number type of most of a few readable images, spread over the table."""
    places = np.unique(np.linspace(0, frame.height - 1, min(frame.height, _MAX_PROBES)).astype(int))
    answers = list(ImageReader(source, section.image_root).read(frame[places.tolist()]))
    found = Counter(str(answer.dtype) for answer in answers if not isinstance(answer, CtcRayError))
    if not found:
        first = next(answer for answer in answers if isinstance(answer, CtcRayError))
        raise SchemaError(
            f"{source.store.describe()}: none of {len(places)} images tried can be read. First: {first}. Paths are "
            "relative to the table's folder, or to import_crops.image_root"
        )
    return found.most_common(1)[0][0]


def plan_patients(
    cohort: Cohort,
    source: Source,
    rows: SourceRows,
    conversion: Conversion,
    *,
    patients: Sequence[str] | None = None,
    retry_failed: bool = False,
) -> list[PatientPlan]:
    """Compare each patient of a source with what the cohort holds; sorted by patient.

    Raises:
        ConfigError: a named patient is not in the source.
    """
    there = rows.frame["patient"].unique().to_list()
    unknown = sorted(set(patients or ()) - set(there))
    if unknown:
        raise ConfigError(
            f"no patient {', '.join(map(repr, unknown))} in {source.store.describe()}: it has {', '.join(sorted(there)[:20])}"
        )
    tags = {} if source.kind == "table" else {f: content_tag(source, f, conversion.section) for f in source.files}
    settings = {k: v for k, v in conversion.section.identity().items() if k not in _NOT_PIXELS}
    settings |= {"counts": dataclasses.asdict(conversion.counts), "channels": conversion.channels}
    plans = []
    for (patient,), own in rows.frame.partition_by("patient", as_dict=True, maintain_order=True).items():
        if patients and patient not in patients:
            continue
        files = own["file"].unique(maintain_order=True).to_list()
        inputs = {"rows": digest_of(identity_texts(own)), **{name: tags[name] for name in files if name in tags}}
        refused = tuple(rows.failures.get(str(patient), ()))
        plans.append(_plan_patient(cohort, str(patient), own, refused, settings, inputs, retry_failed=retry_failed))
    return sorted(plans, key=lambda plan: plan.patient)


def _plan_patient(
    cohort: Cohort,
    patient: str,
    rows: pl.DataFrame,
    refused: tuple[FailureRow, ...],
    settings: dict[str, Any],
    inputs: dict[str, str],
    *,
    retry_failed: bool,
) -> PatientPlan:
    folder = cohort.cells(patient)
    record = read_record(cohort.store, folder)
    noted = {SET_ASIDE: record.inputs[SET_ASIDE]} if record and SET_ASIDE in record.inputs else {}
    state = state_of(cohort.store, folder, identity_of(STAGE, settings, inputs | noted))
    is_open = state is not State.COMPLETE or (retry_failed and failed_rows(record) > 0)
    identity = identity_of(STAGE, settings, inputs)
    return PatientPlan(patient, rows, refused, settings, inputs, identity, state, is_open)


def failed_rows(record: Record | None) -> int:
    """Rows of a record whose pixels could not be imported."""
    return record.counts.get("failed", 0) if record else 0


def refuse_stale(cohort: Cohort, plans: Sequence[PatientPlan], *, force: bool) -> None:
    """Stop before cells of another origin are replaced.

    Raises:
        StaleOutputError: a patient's cells were made otherwise and `force` is not set.
    """
    stale = [plan.patient for plan in plans if plan.state is State.STALE]
    if stale and not force:
        raise StaleOutputError(
            f"{cohort.store.uri} holds other cells of {', '.join(stale[:5])}{' and more' if len(stale) > 5 else ''}: made from "
            "other rows or files, with other settings, or by segment. Run again with --force to replace them, or import "
            "under another patient id"
        )


def units_of(source: Source, plans: Sequence[PatientPlan], unit_cells: int) -> list[ImportUnit]:
    """Cut the rows of all patients into units; open patients alone have parts.

    A table's units hold one patient, since images lie anywhere; those of arrays follow the file, so that it is read once.
    Units do not depend on which patients are open: a resumed run finds its parts.
    """
    numbered = [plan.rows.with_row_index("number") for plan in plans]
    if source.kind == "table":
        chunks = [own[start : start + unit_cells] for own in numbered for start in range(0, own.height, unit_cells)]
    elif numbered:
        whole = pl.concat(numbered).sort("file", "source_row")
        chunks = [whole[start : start + unit_cells] for start in range(0, whole.height, unit_cells)]
    else:
        chunks = []
    folders = {plan.patient: plan.parts_folder for plan in plans if plan.is_open}
    units = []
    for chunk in chunks:
        parts = {}
        for (patient,), own in chunk.partition_by("patient", as_dict=True, maintain_order=True).items():
            if patient in folders:
                name = f"part-{own['number'][0]:09d}-{digest_of(identity_texts(own))}.parquet"
                parts[str(patient)] = f"{folders[str(patient)]}/{name}"
        if parts:
            units.append(ImportUnit(chunk.drop("number"), parts))
    return units


def missing_units(units: Sequence[ImportUnit], present: set[str]) -> list[ImportUnit]:
    """Units without the parts that are there already, and without the rows of those."""
    missing = []
    for unit in units:
        parts = {patient: path for patient, path in unit.parts.items() if path not in present}
        if parts:
            missing.append(ImportUnit(unit.rows.filter(pl.col("patient").is_in(list(parts))), parts))
    return missing
