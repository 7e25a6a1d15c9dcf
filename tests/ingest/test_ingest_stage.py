"""Ingest through Ray equals segment, then embed: complete, set aside, tried again, extended, after an interrupted segment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ctc_ray.cli import main
from ctc_ray.cohort import Cohort
from ctc_ray.config import RunConfig, load_config
from ctc_ray.embed.stage import plan_embed, run_embed
from ctc_ray.errors import MissingInputError
from ctc_ray.ingest.stage import plan_ingest, run_ingest
from ctc_ray.progress import Progress
from ctc_ray.records import Record, State, read_failures, read_record
from ctc_ray.segment.plan import part_name
from ctc_ray.segment.stage import plan_segment, run_segment

QUIET = Progress(quiet=True)
WriteCartridge = Callable[..., Path]


@pytest.fixture
def overrides(bright_spot_weights: Path) -> list[str]:
    return [
        f"segment.weights={bright_spot_weights}",
        "segment.max_failure_fraction=0.5",
        "embed.encoder=default",
        "embed.precision=fp32",
    ]


@pytest.fixture
def config(overrides: list[str]) -> RunConfig:
    return load_config(None, overrides)


@pytest.fixture
def cartridges(tmp_path: Path) -> str:
    return str(tmp_path / "cartridges")


def cohort_at(folder: Path) -> Cohort:
    return Cohort.open(str(folder), create=True)


def record_of(cohort: Cohort, folder: str) -> Record:
    record = read_record(cohort.store, folder)
    assert record is not None
    return record


def vectors_of(cohort: Cohort, patient: str) -> pa.Table:
    return cohort.read_columns(f"embeddings/default/{patient}", ["cell_id", "patient", "embedding"])


def assert_equal_outputs(one: Cohort, other: Cohort, patients: list[str]) -> None:
    """Same cells to the byte, same duplicates, set-asides and identities; vectors of the same cells in order, alike within 1e-5."""
    for patient in patients:
        cells, others = record_of(one, f"cells/{patient}"), record_of(other, f"cells/{patient}")
        assert (cells.identity, cells.files, cells.counts) == (others.identity, others.files, others.counts)
        same = [f"cells/{patient}/{name}" for name in cells.files] + [f"duplicates/{patient}.parquet"]
        for path in same:
            assert one.store.read_bytes(path) == other.store.read_bytes(path)
        assert read_failures(one.store, "segment", patient).equals(read_failures(other.store, "segment", patient))
        found, wanted = (record_of(c, f"embeddings/default/{patient}") for c in (one, other))
        assert (found.identity, found.inputs, found.config) == (wanted.identity, wanted.inputs, wanted.config)
        assert (sorted(found.files), found.counts) == (sorted(wanted.files), wanted.counts)
        assert sorted(found.files) == sorted(cells.files)
        assert_equal_vectors(vectors_of(one, patient), vectors_of(other, patient))
        for folder in (f"cells/{patient}", f"embeddings/default/{patient}"):
            assert not one.store.exists(f"{folder}/_parts")


def assert_equal_vectors(found: pa.Table, wanted: pa.Table) -> None:
    assert found.schema.equals(wanted.schema, check_metadata=True)
    assert found["cell_id"].to_pylist() == wanted["cell_id"].to_pylist()
    a, b = (np.stack(table["embedding"].to_numpy()) for table in (found, wanted))
    assert np.allclose(a, b, atol=1e-5)


def test_ingest_without_the_encoder_says_how_to_get_one(
    config: RunConfig, cartridges: str, write_cartridge: WriteCartridge, tmp_path: Path
) -> None:
    write_cartridge("A")
    other = config.model_copy(update={"embed": config.embed.model_copy(update={"encoder": "dino"})})
    with pytest.raises(MissingInputError, match=r"embed\.encoder=default"):
        run_ingest(other, cohort_at(tmp_path / "cohort"), cartridges=cartridges, progress=QUIET)
    with pytest.raises(MissingInputError, match="pretrain"):
        plan_ingest(other, cohort_at(tmp_path / "cohort"), cartridges=cartridges)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_ingest_equals_segment_then_embed_sets_aside_what_is_bad_and_extends(
    config: RunConfig,
    overrides: list[str],
    cartridges: str,
    write_cartridge: WriteCartridge,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    patients = ["007", "12", "Müller 3"]
    for patient in patients:
        write_cartridge(patient, frames=(1, 2, 3), grid=(1, 3))
    bad = tmp_path / "cartridges" / "12" / "processed" / "12p002.tif"
    good = bad.read_bytes()
    bad.write_bytes(good[:3000])
    ingested, staged = cohort_at(tmp_path / "ingested"), cohort_at(tmp_path / "staged")

    states = plan_ingest(config, ingested, cartridges=cartridges)
    assert [(row.unit, row.state) for row in states] == [(patient, State.ABSENT) for patient in patients]
    assert "3 fields to segment and embed" in states[0].why
    assert ingested.store.list_folders() == []
    words = ["ingest", str(tmp_path / "ingested"), "--cartridges", cartridges]
    with pytest.raises(SystemExit) as end:
        main([*words, *(word for override in overrides for word in ("--set", override))])
    assert end.value.code == 3
    printed = capsys.readouterr().out
    assert "ingest: 8 computed, 0 reused, 1 set aside" in printed
    assert "both at once for" in printed
    assert "failures/segment/" in printed

    run_segment(config, staged, cartridges=cartridges, progress=QUIET)
    run_embed(config, staged, progress=QUIET)
    assert_equal_outputs(ingested, staged, patients)
    record = record_of(ingested, "embeddings/default/007")
    assert (record.units_computed, record.units_reused) == (3, 0)
    assert sum(worker["units"] for worker in record.workers) == 3
    rows = ingested.store.read_table("statistics/ingest/12.parquet").to_pylist()
    assert [(row["field"], row["embed_start"] is None) for row in rows] == [(1, False), (2, True), (3, False)]

    # What the single stages and ingest itself find afterwards.
    for plan in (
        plan_segment(config, ingested, cartridges=cartridges),
        plan_embed(config, ingested),
        plan_ingest(config, ingested, cartridges=cartridges),
    ):
        assert [row.state for row in plan] == [State.COMPLETE] * 3
    write_cartridge("new", frames=(1, 2), grid=(1, 2))
    extended = run_ingest(config, ingested, cartridges=cartridges, progress=QUIET)
    assert (extended.units_computed, extended.units_reused) == (2, 8)
    assert record_of(ingested, "embeddings/default/007") == record

    # The bad file is mended: its cells and their vectors are added, the others stay as they are.
    kept = vectors_of(ingested, "12")
    bad.write_bytes(good)
    retried = run_ingest(config, ingested, cartridges=cartridges, retry_failed=True, progress=QUIET)
    assert (retried.units_computed, retried.units_reused, retried.set_aside) == (1, 10, 0)
    record = record_of(ingested, "embeddings/default/12")
    assert sorted(record.files) == ["part-000.parquet", "part-001.parquet"]
    assert (record.units_computed, record.units_reused) == (1, 2)
    assert ingested.store.read_table("embeddings/default/12/part-000.parquet").equals(kept)
    found = vectors_of(ingested, "12")["cell_id"].to_pylist()
    assert found == ingested.read_columns("cells/12", ["cell_id"])["cell_id"].to_pylist()
    assert [row.state for row in plan_embed(config, ingested)] == [State.COMPLETE] * 4


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_ingest_goes_on_from_whatever_was_interrupted(
    config: RunConfig, cartridges: str, write_cartridge: WriteCartridge, tmp_path: Path
) -> None:
    for patient in ("begun", "joined", "segmented"):
        write_cartridge(patient, frames=(1, 2, 3, 4), grid=(2, 2))
    whole, broken = cohort_at(tmp_path / "whole"), cohort_at(tmp_path / "broken")
    run_ingest(config, whole, cartridges=cartridges, progress=QUIET)
    run_segment(config, broken, cartridges=cartridges, progress=QUIET)

    # An interrupted `segment` leaves the parts of two fields, an interrupted `ingest` a third one, with its vectors.
    parts = f"_parts/{record_of(whole, 'cells/begun').identity[:12]}"
    vector_parts = f"_parts/{record_of(whole, 'embeddings/default/begun').identity}"
    cells, vectors = whole.store.read_table("cells/begun/part-000.parquet"), vectors_of(whole, "begun")
    broken.store.delete_folder("cells/begun")
    for field in (1, 3, 4):
        chosen = np.asarray(cells["field"]) == field
        broken.store.write_table(f"cells/begun/{parts}/{part_name(field)}", cells.filter(chosen))
        if field == 4:
            broken.store.write_table(f"embeddings/default/begun/{vector_parts}/{part_name(4)}", vectors.filter(chosen))
    # A kill between the record of the cells and that of the vectors leaves the vectors of all fields.
    identity = record_of(whole, "embeddings/default/joined").identity
    cells, vectors = whole.store.read_table("cells/joined/part-000.parquet"), vectors_of(whole, "joined")
    for field in (1, 2, 3, 4):
        part = vectors.filter(np.asarray(cells["field"]) == field)
        broken.store.write_table(f"embeddings/default/joined/_parts/{identity}/{part_name(field)}", part)

    why = {row.unit: row.why for row in plan_ingest(config, broken, cartridges=cartridges)}
    assert "1 fields to segment and embed, 2 to embed, 1 finished already" in why["begun"]
    assert why["joined"] == why["segmented"] == "cells are there, not embedded yet"
    result = run_ingest(config, broken, cartridges=cartridges, progress=QUIET)
    assert (result.units_computed, result.units_reused) == (1, 11)
    assert_equal_outputs(broken, whole, ["begun", "joined", "segmented"])
    counts = {patient: record_of(broken, f"embeddings/default/{patient}") for patient in why}
    assert (counts["begun"].units_computed, counts["begun"].units_reused) == (3, 1)
    assert (counts["joined"].units_computed, counts["joined"].units_reused) == (0, 4)
    assert counts["segmented"].units_computed == 1  # by the embed stage, whose unit is a slice


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_embed_notices_cells_that_a_retry_of_segment_added_under_the_same_identity(
    config: RunConfig, cartridges: str, write_cartridge: WriteCartridge, tmp_path: Path
) -> None:
    folder = write_cartridge("A", frames=(1, 2), grid=(1, 2))
    file = folder / "Ap002.tif"
    good = file.read_bytes()
    file.write_bytes(b"\0" * len(good))  # of the same size: nothing but the retry tells
    cohort = cohort_at(tmp_path / "cohort")
    run_ingest(config, cohort, cartridges=cartridges, progress=QUIET)
    before = vectors_of(cohort, "A")
    file.write_bytes(good)
    run_segment(config, cohort, cartridges=cartridges, retry_failed=True, progress=QUIET)
    assert [row.state for row in plan_embed(config, cohort)] == [State.ABSENT]
    assert [row.state for row in plan_ingest(config, cohort, cartridges=cartridges)] == [State.ABSENT]
    result = run_ingest(config, cohort, cartridges=cartridges, progress=QUIET)
    assert result.counts["embedded"] == result.counts["cells"] > before.num_rows
    after = vectors_of(cohort, "A")
    assert_equal_vectors(after.slice(0, before.num_rows), before)
    assert after["cell_id"].to_pylist() == cohort.read_columns("cells/A", ["cell_id"])["cell_id"].to_pylist()
    assert [row.state for row in plan_embed(config, cohort)] == [State.COMPLETE]
