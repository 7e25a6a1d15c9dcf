"""The steps of ingest without Ray: what is written, in which order, and what is joined."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from cells_cohort import cells_table

from ctc_ray.cohort import Cohort
from ctc_ray.config import EmbedConfig, RunConfig, load_config
from ctc_ray.errors import SchemaError, StaleOutputError
from ctc_ray.ingest.cells_step import CUT_SCHEMA, CellSender, from_stream, to_stream
from ctc_ray.ingest.embed_step import FieldEmbedder
from ctc_ray.ingest.finish import WorkDone, join_vectors
from ctc_ray.ingest.plan import (
    Encoder,
    IngestPlan,
    VectorPlan,
    note_extensions,
    plan_vectors,
    refuse_stale_vectors,
)
from ctc_ray.records import Record, State, publish, read_record
from ctc_ray.schema import Channel, embeddings_schema
from ctc_ray.segment.cartridge import FieldFile
from ctc_ray.segment.cells_step import CellCutter
from ctc_ray.segment.finish import finish_patient
from ctc_ray.segment.network_step import CandidateFinder
from ctc_ray.segment.plan import PatientPlan, Settings, part_name, plan_patients, resolve_settings
from ctc_ray.segment.read_step import FieldTask, read_fields
from ctc_ray.storage import Store

WIDTH = 4


class CountingEmbedder:
    """Stands for the network: the vector of a crop is its mean count, four times; crops that hold 99 fail."""

    width = WIDTH

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, crops: np.ndarray, *, full_scale: float | None = None) -> np.ndarray:
        self.batches.append(len(crops))
        if (crops == 99).any():
            raise SchemaError("a crop that cannot be embedded")
        means = crops.reshape(len(crops), -1).mean(axis=1, dtype=np.float32)
        return np.repeat(means[:, None], WIDTH, axis=1)


class LoggedStore(Store):
    """Remembers what was written, in order."""

    def __init__(self, uri: str | Path) -> None:
        super().__init__(uri)
        self.written: list[str] = []

    def write_table(self, path: str, table: pa.Table, *, row_group_size: int = 1000) -> int:
        self.written.append(path)
        return super().write_table(path, table, row_group_size=row_group_size)


def crops(*means: int, dtype: str = "uint8") -> np.ndarray:
    return np.repeat(np.array(means, dtype), 3 * 48 * 48).reshape(-1, 3, 48, 48)


def cut_row(field: int, cells: pa.Table | None, **more: Any) -> dict[str, Any]:
    file = FieldFile("P", field, f"P/{field}.tif", "cellsearch", None, (0, 0))
    task = FieldTask(file, "cells/P/_parts/a", "uint8", dict.fromkeys(Channel, 0), "f", vectors_folder="vectors")
    task = dataclasses.replace(task, **more)
    table = None if cells is None else to_stream(cells).to_pybytes()
    row = {"task": task.to_json(), "table": table, "patient": "P", "field": field, "path": file.path, "seconds": 0.0}
    return row | {"cells": 0 if cells is None else cells.num_rows}


def embedder_of(store: Store) -> tuple[FieldEmbedder, CountingEmbedder]:
    network: Any = CountingEmbedder()
    return FieldEmbedder(Cohort(store), EmbedConfig(), "fp32", lambda: ("node", 7), network), network


def test_cells_travel_as_bytes_with_the_metadata_of_their_pixels() -> None:
    cells = cells_table("P", crops(1, 2, 3))
    back = from_stream(to_stream(cells).to_pybytes())
    assert back.schema.equals(cells.schema, check_metadata=True)
    assert back.equals(cells)


def test_fields_are_embedded_together_and_vectors_are_written_before_cells(tmp_path: Path) -> None:
    store = LoggedStore(tmp_path)
    step, network = embedder_of(store)
    tables = {1: cells_table("P", crops(10, 20)), 2: cells_table("P", crops()), 5: cells_table("P", crops(30), first=9)}
    rows = [cut_row(field, table) for field, table in tables.items()]
    done = step(pa.Table.from_pylist([*rows, cut_row(6, None) | {"kind": "CartridgeError"}], schema=CUT_SCHEMA))
    assert network.batches == [3]
    names = [part_name(field) for field in tables]
    assert store.written == [path for name in names for path in (f"vectors/{name}", f"cells/P/_parts/a/{name}")]
    for field, cells in tables.items():
        vectors = store.read_table(f"vectors/{part_name(field)}")
        assert vectors.schema == embeddings_schema(WIDTH)
        assert vectors["cell_id"].to_pylist() == cells["cell_id"].to_pylist()
        assert store.read_table(f"cells/P/_parts/a/{part_name(field)}").equals(cells)
    assert store.read_table("vectors/field-00005.parquet")["embedding"].to_pylist() == [[30.0] * WIDTH]
    assert done["embed_node"].to_pylist() == ["node"] * 3 + [None]
    assert done["kind"].to_pylist() == [None] * 3 + ["CartridgeError"]


def test_fields_of_8_and_16_bits_in_one_batch_are_embedded_apart(tmp_path: Path) -> None:
    step, network = embedder_of(Store(tmp_path))
    rows = [cut_row(1, cells_table("P", crops(10))), cut_row(2, cells_table("P", crops(700, dtype="uint16")))]
    step(pa.Table.from_pylist(rows, schema=CUT_SCHEMA))
    assert network.batches == [1, 1]


def test_cells_that_cannot_be_embedded_are_kept_and_do_not_harm_their_neighbours(tmp_path: Path) -> None:
    store = Store(tmp_path)
    step, _ = embedder_of(store)
    rows = [cut_row(1, cells_table("P", crops(10))), cut_row(2, cells_table("P", crops(99)))]
    done = step(pa.Table.from_pylist(rows, schema=CUT_SCHEMA)).to_pylist()
    assert [row["embed_error"] for row in done] == [None, "SchemaError: a crop that cannot be embedded"]
    assert store.list_files("vectors") == ["vectors/field-00001.parquet"]
    assert len(store.list_files("cells/P/_parts/a")) == 2


def test_field_with_cells_gets_vectors_alone(tmp_path: Path) -> None:
    store = LoggedStore(tmp_path)
    store.write_table("cells/P/_parts/a/field-00003.parquet", cells_table("P", crops(7)))
    step, _ = embedder_of(store)
    (row,) = step(pa.Table.from_pylist([cut_row(3, None, has_cells=True)], schema=CUT_SCHEMA)).to_pylist()
    assert store.written[1:] == ["vectors/field-00003.parquet"]
    assert (row["has_cells"], row["cells"]) == (True, 1)


# Joining ------------------------------------------------------------------------------------------------------------


def vector_plan(**more: Any) -> VectorPlan:
    plan = VectorPlan("P", "embeddings/e/P", "new", {}, {}, WIDTH, State.ABSENT, None, frozenset())
    return dataclasses.replace(plan, **more)


def vectors_of(cells: pa.Table, value: float) -> pa.Table:
    columns = [cells["cell_id"], cells["patient"], pa.array([[value] * WIDTH] * len(cells), pa.list_(pa.float32(), 4))]
    return pa.table(columns, schema=embeddings_schema(WIDTH))


def two_shards(cohort: Cohort) -> list[pa.Table]:
    """Cells of fields 1 and 2 in one shard, of field 4 in another."""
    first, second = cells_table("P", crops(1, 2, 3)), cells_table("P", crops(4, 5), first=3)
    fields = [[1, 2, 2], [4, 4]]
    tables = [
        table.set_column(2, table.schema.field("field"), pa.array(numbers, pa.int16()))
        for table, numbers in zip((first, second), fields, strict=True)
    ]
    files = {f"part-{number:03d}.parquet": table for number, table in enumerate(tables)}
    publish(cohort.store, "cells/P", files, Record("segment", "P", "cells", {}, {}))
    return tables


@pytest.fixture
def cohort(tmp_path: Path) -> Cohort:
    return Cohort.open(str(tmp_path / "cohort"), create=True)


def test_vectors_of_fields_are_joined_to_shards_that_mirror_those_of_the_cells(cohort: Cohort) -> None:
    shards, plan = two_shards(cohort), vector_plan()
    for field, table in ((1, shards[0].slice(0, 1)), (2, shards[0].slice(1)), (4, shards[1])):
        cohort.store.write_table(f"{plan.parts_folder}/{part_name(field)}", vectors_of(table, field))
    assert join_vectors(cohort, plan, WorkDone([{"node": "n", "pid": 1, "units": 3}], 2.0, 3)) is None
    for number, table in enumerate(shards):
        found = cohort.store.read_table(f"embeddings/e/P/part-{number:03d}.parquet")
        assert found["cell_id"].to_pylist() == table["cell_id"].to_pylist()
    record = read_record(cohort.store, "embeddings/e/P")
    assert record is not None
    assert (record.stage, record.units_computed, record.units_reused, record.counts) == ("embed", 3, 0, {"cells": 5})
    assert not cohort.store.exists("embeddings/e/P/_parts")
    again = join_vectors(cohort, plan, WorkDone([], 0.0, 9))  # as after the loss of the machine that had just done it
    assert again is None
    assert read_record(cohort.store, "embeddings/e/P") == record


def test_nothing_is_finished_while_the_vectors_of_a_field_or_cell_are_missing(cohort: Cohort) -> None:
    shards, plan = two_shards(cohort), vector_plan()
    cohort.store.write_table(f"{plan.parts_folder}/{part_name(1)}", vectors_of(shards[0].slice(0, 1), 1))
    cohort.store.write_table(f"{plan.parts_folder}/{part_name(2)}", vectors_of(shards[0].slice(1, 1), 1))
    assert join_vectors(cohort, plan, WorkDone()) == "P"
    cohort.store.write_table(f"{plan.parts_folder}/{part_name(4)}", vectors_of(shards[1], 1))
    assert join_vectors(cohort, plan, WorkDone()) == "P"  # a cell of field 2 has none
    assert read_record(cohort.store, "embeddings/e/P") is None


def test_shards_of_embeddings_that_are_added_to_stay_unless_they_mirror_other_cells(cohort: Cohort) -> None:
    shards = two_shards(cohort)
    old = Record("embed", "P", "old", {}, {}, units_computed=2)
    kept = vectors_of(shards[0], 7)
    publish(cohort.store, "embeddings/e/P", {"part-000.parquet": kept}, old)
    plan = vector_plan(extends="old")
    cohort.store.write_table(f"{plan.parts_folder}/{part_name(4)}", vectors_of(shards[1], 4))
    assert join_vectors(cohort, plan, WorkDone([], 0.0, 1)) is None
    assert cohort.store.read_table("embeddings/e/P/part-000.parquet").equals(kept)
    record = read_record(cohort.store, "embeddings/e/P")
    assert record is not None
    assert (record.identity, record.units_computed, record.units_reused) == ("new", 1, 2)

    other = dataclasses.replace(plan, extends="new", identity="newer")
    publish(
        cohort.store, "embeddings/e/P", {"part-000.parquet": kept.slice(1)}, dataclasses.replace(old, identity="new")
    )
    assert join_vectors(cohort, other, WorkDone()) == "P"


# Planning -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(bright_spot_weights: Path) -> RunConfig:
    return load_config(None, [f"segment.weights={bright_spot_weights}", "embed.encoder=e"])


def look(config: RunConfig, cohort: Cohort, cartridges: Path, **options: bool) -> tuple[IngestPlan, Settings]:
    settings = resolve_settings(config.segment, "fp32")
    given = {"retry_failed": False, **options}
    (plan,), _ = plan_patients(config.segment, settings, cohort, Store(cartridges), patients=None, **given)
    return plan_vectors(config.embed, cohort, plan, Encoder("e", "weights", WIDTH, {"precision": "fp32"})), settings


def test_fields_are_reused_with_both_parts_and_embedded_alone_where_only_cells_are_there(
    config: RunConfig, cohort: Cohort, tmp_path: Path, write_cartridge: Callable[..., Path]
) -> None:
    write_cartridge("P", frames=(1, 2, 3, 4), grid=(2, 2))
    plan, _ = look(config, cohort, tmp_path / "cartridges")
    assert (len(plan.cells.todo), plan.unembedded, plan.vectors.fields) == (4, (), frozenset())
    cells = cells_table("P", crops(1))
    for field in (1, 2):
        cohort.store.write_table(f"{plan.cells.parts_folder}/{part_name(field)}", cells)
    for field in (2, 3):  # 3: killed between its vectors and its cells
        cohort.store.write_table(f"{plan.vectors.parts_folder}/{part_name(field)}", vectors_of(cells, 1))
    plan, settings = look(config, cohort, tmp_path / "cartridges")
    assert [file.field for file in plan.cells.todo] == [3, 4]
    assert [file.field for file in plan.unembedded] == [1]
    assert plan.vectors.fields == {2}
    tasks = plan.tasks(Store(tmp_path / "cartridges"), settings)
    assert [(task.field.field, task.has_cells) for task in tasks] == [(3, False), (4, False), (1, True)]
    assert {task.vectors_folder for task in tasks} == {plan.vectors.parts_folder}
    assert FieldTask.from_json(tasks[-1].to_json()) == tasks[-1]


def segment_here(plan: PatientPlan, settings: Settings, cohort: Cohort, images: Store) -> None:
    """Segment a patient without Ray, and finish it."""
    tasks = IngestPlan(plan, vector_plan(), ()).tasks(images, settings)
    table = read_fields(pa.table({"task": [task.to_json() for task in tasks]}), cartridges=images, settings=settings)
    CellCutter(settings, cohort.store)(CandidateFinder(settings, 1)(table))
    finish_patient(plan, settings, cohort, images, failures=[], workers=[], seconds=1.0)


def test_step_that_sends_cells_gives_those_that_the_writing_one_writes(
    config: RunConfig, cohort: Cohort, tmp_path: Path, write_cartridge: Callable[..., Path]
) -> None:
    write_cartridge("P")
    images = Store(tmp_path / "cartridges")
    plan, settings = look(config, cohort, tmp_path / "cartridges")
    tasks = pa.table({"task": [task.to_json() for task in plan.tasks(images, settings)]})
    candidates = CandidateFinder(settings, 1)(read_fields(tasks, cartridges=images, settings=settings))
    written = CellCutter(settings, cohort.store)(candidates).to_pylist()
    sent = CellSender(settings)(candidates).to_pylist()
    for status, row in zip(written, sent, strict=True):
        part = cohort.store.read_table(f"{plan.cells.parts_folder}/{part_name(row['field'])}")
        assert from_stream(row["table"]).equals(part)
        assert row["network_end"] > row["network_start"] > 0
        assert {key: row[key] for key in ("patient", "field", "cells", "kind")} == {
            key: status[key] for key in ("patient", "field", "cells", "kind")
        }
        assert part.num_rows == row["cells"] > 0


def test_finishing_again_after_the_record_leaves_the_cells_alone(
    config: RunConfig, cohort: Cohort, tmp_path: Path, write_cartridge: Callable[..., Path]
) -> None:
    write_cartridge("P")
    images = Store(tmp_path / "cartridges")
    plan, settings = look(config, cohort, tmp_path / "cartridges")
    segment_here(plan.cells, settings, cohort, images)
    record = read_record(cohort.store, "cells/P")
    assert record is not None
    assert record.counts["cells"] > 0
    again = finish_patient(plan.cells, settings, cohort, images, failures=[], workers=[], seconds=1.0)
    assert (again.cells, again.fields, again.failed) == (record.counts["cells"], 2, 0)
    assert read_record(cohort.store, "cells/P") == record


def test_stale_embeddings_are_refused_unless_they_are_added_to(
    config: RunConfig, cohort: Cohort, tmp_path: Path, write_cartridge: Callable[..., Path]
) -> None:
    folder = write_cartridge("P")
    images = tmp_path / "cartridges"
    plan, settings = look(config, cohort, images)
    segment_here(plan.cells, settings, cohort, Store(images))
    publish(cohort.store, "embeddings/e/P", {}, Record("embed", "P", plan.vectors.identity, {}, {}))
    closed, _ = look(config, cohort, images)
    assert (closed.cells.is_open, closed.vectors.state) == (False, State.COMPLETE)

    # A file that was set aside has changed: its patient's cells are kept and added to, and so are the vectors.
    path = folder / "Pp002.tif"
    failure = {
        "stage": ["segment"],
        "unit": ["P"],
        "source": ["P/processed/Pp002.tif"],
        "kind": ["x"],
        "message": ["y"],
    }
    cohort.store.write_table("failures/segment/P.parquet", pa.table(failure))
    path.write_bytes(path.read_bytes() + b"0")
    retried, _ = look(config, cohort, images, retry_failed=True)
    assert (retried.vectors.state, retried.vectors.extends) == (State.STALE, plan.vectors.identity)
    refuse_stale_vectors(cohort, [retried], force=False)
    note_extensions(cohort, [retried])
    cohort.store.write_json(
        "cells/P/_record.json", cohort.store.read_json("cells/P/_record.json") | {"identity": retried.cells.identity}
    )
    resumed, _ = look(config, cohort, images)
    assert resumed.vectors.extends == plan.vectors.identity

    cohort.store.delete_folder("embeddings/e/P/_parts")
    stale, _ = look(config, cohort, images)
    with pytest.raises(StaleOutputError, match="--force"):
        refuse_stale_vectors(cohort, [stale], force=False)
    refuse_stale_vectors(cohort, [stale], force=True)
