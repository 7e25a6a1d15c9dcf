"""What a stage leaves beside its output: a record written last, from which complete, stale and absent follow."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import polars as pl
import pyarrow as pa

from ctc_ray.errors import SchemaError, StaleOutputError
from ctc_ray.schema import FAILURES_SCHEMA
from ctc_ray.storage import Store, encode_parquet

RECORD_NAME = "_record.json"
_VERSIONED = (
    "ctc-ray",
    "ray",
    "torch",
    "timm",
    "stardist",
    "pyarrow",
    "numpy",
    "scikit-learn",
    "umap-learn",
    "hdbscan",
)


class State(StrEnum):
    """Where an output stands against the configuration and inputs of now."""

    ABSENT = "absent"
    STALE = "stale"
    COMPLETE = "complete"


@dataclass(frozen=True)
class Record:
    """What was done for one unit of output; written after all of its files."""

    stage: str
    unit: str
    """Patient id, or the name of a cohort-wide output."""
    identity: str
    """`identity_of` the stage, its configuration and its inputs."""
    config: dict[str, Any]
    inputs: dict[str, str]
    """Input name -> identity or digest of that input."""
    files: dict[str, int] = field(default_factory=dict)
    """File name below the folder -> bytes."""
    counts: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    units_computed: int = 0
    units_reused: int = 0
    workers: list[dict[str, Any]] = field(default_factory=list)
    """One row a worker process: node, pid, units."""
    versions: dict[str, str] = field(default_factory=dict)
    created_at: str = ""


@dataclass(frozen=True)
class StageResult:
    """What every stage returns: counts and paths, never data."""

    stage: str
    units_computed: int
    units_reused: int
    set_aside: int = 0
    """Units that failed and lie in `failures/`; the command then ends with exit code 3."""
    counts: dict[str, int] = field(default_factory=dict)
    paths: tuple[str, ...] = ()
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    """Sentences that the command prints below the counts."""
    failures_of: str = ""
    """Stage in whose name the set-aside units are listed; empty for this one."""


@dataclass(frozen=True)
class PlanRow:
    """One line of `--dry-run`: a unit, its state, and why it would or would not run."""

    unit: str
    state: State
    why: str


@dataclass(frozen=True)
class FailureRow:
    """One unit that was set aside."""

    source: str
    """File or shard that failed."""
    kind: str
    """Name of the error class."""
    message: str


class WorkerTally:
    """Count the units that each worker process did."""

    def __init__(self) -> None:
        self._units: dict[tuple[str, int], int] = {}

    def add(self, node: str, pid: int, units: int = 1) -> None:
        """Note that a process finished some units."""
        self._units[(node, pid)] = self._units.get((node, pid), 0) + units

    def rows(self) -> list[dict[str, Any]]:
        """Rows for `Record.workers`, sorted."""
        return [{"node": node, "pid": pid, "units": units} for (node, pid), units in sorted(self._units.items())]


def canonical_json(value: Any) -> str:
    """Serialise for hashing: keys sorted, no floats that print unstably.

    Raises:
        SchemaError: a value is not JSON or not finite.
    """

    def check(item: Any) -> Any:
        if isinstance(item, float) and not math.isfinite(item):
            raise SchemaError(f"cannot fingerprint {item!r}: use finite numbers")
        if isinstance(item, Mapping):
            return {str(key): check(inner) for key, inner in item.items()}
        if isinstance(item, list | tuple):
            return [check(inner) for inner in item]
        if item is None or isinstance(item, str | int | float | bool):
            return item
        raise SchemaError(f"cannot fingerprint a {type(item).__name__}: {item!r}")

    return json.dumps(check(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def digest_of(value: Any) -> str:
    """Stable 16-character digest of a JSON-like value, or of bytes."""
    data = value if isinstance(value, bytes) else canonical_json(value).encode()
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def identity_of(stage: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Identity of an output: what it was made by and from. Paths, actor counts and machine size are no part of it."""
    return digest_of({"stage": stage, "config": config, "inputs": inputs})


@cache
def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries whose results an output depends on."""
    found = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def read_record(store: Store, folder: str) -> Record | None:
    """Read the record of a folder; None where there is none.

    Raises:
        SchemaError: the record is there but not readable as one.
    """
    path = f"{folder}/{RECORD_NAME}"
    if not store.exists(path):
        return None
    values = store.read_json(path)
    names = {item.name for item in dataclasses.fields(Record)}
    if not isinstance(values, dict) or not {"stage", "unit", "identity", "config", "inputs"} <= values.keys():
        raise SchemaError(
            f"{store.describe(path)} is not a record of ctc_ray: delete the folder, or run its stage with --force"
        )
    return Record(**{key: value for key, value in values.items() if key in names})


def write_record(store: Store, folder: str, record: Record) -> None:
    """Write a record, stamped with versions and time; call it after every file of the output."""
    stamped = dataclasses.replace(
        record,
        versions=record.versions or library_versions(),
        created_at=record.created_at or datetime.now(UTC).isoformat(timespec="seconds"),
    )
    store.write_json(f"{folder}/{RECORD_NAME}", dataclasses.asdict(stamped))


def damaged_files(store: Store, folder: str, record: Record) -> list[str]:
    """Files of a record that are gone or of another size."""
    return [name for name, size in record.files.items() if store.size(f"{folder}/{name}") != size]


def state_of(store: Store, folder: str, identity: str) -> State:
    """Compare a folder with what it should be.

    Returns:
        ABSENT without a record or with files missing from it, STALE where the record has another identity, else COMPLETE.
    """
    record = read_record(store, folder)
    if record is None:
        return State.ABSENT
    if record.identity != identity:
        return State.STALE
    return State.ABSENT if damaged_files(store, folder, record) else State.COMPLETE


def require_fresh(store: Store, folder: str, identity: str, *, force: bool) -> State:
    """State of a folder that a stage is about to fill.

    Raises:
        StaleOutputError: it holds the output of another configuration or of other inputs, and `force` is not set.
    """
    state = state_of(store, folder, identity)
    if state is State.STALE and not force:
        record = read_record(store, folder)
        made = record.created_at if record else "an unknown time"
        raise StaleOutputError(
            f"{store.describe(folder)} was made on {made} with another configuration or other inputs. "
            "Run again with --force to replace it (the old output stays until the new one is complete), or use another name"
        )
    return state


def publish(store: Store, folder: str, files: Mapping[str, bytes | pa.Buffer | pa.Table], record: Record) -> Record:
    """Write all files of a small output, then its record, then delete what only the former record listed.

    Args:
        store: where.
        folder: folder of the output, relative.
        files: name below the folder -> bytes, or a table to encode as Parquet.
        record: its `files` are filled in here.

    Returns:
        The record as written. Each file is replaced atomically; between the first file and the record an older record no
        longer fits its files, so a reader sees the output as absent, never as a mixture.
    """
    former = read_record(store, folder)
    encoded = {name: encode_parquet(data) if isinstance(data, pa.Table) else data for name, data in files.items()}
    sizes = {name: store.write_bytes(f"{folder}/{name}", data) for name, data in encoded.items()}
    finished = dataclasses.replace(record, files={**record.files, **sizes})
    write_record(store, folder, finished)
    for name in sorted(set(former.files if former else ()) - set(finished.files)):
        store.delete(f"{folder}/{name}")
    return finished


def failures_path(stage: str, unit: str) -> str:
    """Where the set-aside sources of one unit are listed."""
    return f"failures/{stage}/{unit}.parquet"


def write_failures(store: Store, stage: str, unit: str, rows: Sequence[FailureRow]) -> None:
    """Replace the failures of one unit; no rows delete the file."""
    path = failures_path(stage, unit)
    if not rows:
        store.delete(path)
        return
    values = [{"stage": stage, "unit": unit, "source": r.source, "kind": r.kind, "message": r.message} for r in rows]
    store.write_table(path, pa.Table.from_pylist(values, schema=FAILURES_SCHEMA))


def read_failures(store: Store, stage: str, unit: str | None = None) -> pl.DataFrame:
    """Failures of a stage, of one unit or of all; an empty frame where there are none."""
    paths = [failures_path(stage, unit)] if unit is not None else store.list_files(f"failures/{stage}", ".parquet")
    tables = [store.read_table(path) for path in paths if store.exists(path)]
    table = pa.concat_tables(tables) if tables else FAILURES_SCHEMA.empty_table()
    frame = pl.from_arrow(table)
    if not isinstance(frame, pl.DataFrame):
        raise SchemaError("failures are not a table")
    return frame
