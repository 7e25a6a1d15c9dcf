from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType

import polars as pl
import pytest

from ctc_ray.cohort import Cohort
from ctc_ray.config import CompareConfig, DetectConfig, RunConfig
from ctc_ray.detect.compare import TABLES, plan_compare, run_compare
from ctc_ray.detect.stage import (
    detect_unit,
    detected_patients,
    find_candidates,
    patient_folder,
    plan_detect,
    run_detect,
)
from ctc_ray.errors import ConfigError, MissingInputError, SchemaError, StaleOutputError, TooManyFailuresError
from ctc_ray.progress import Progress
from ctc_ray.records import Record, State, publish, read_failures, read_record
from ctc_ray.schema import CANDIDATES_SCHEMA, MATCHES_SCHEMA, check_columns

FINAL = ['<b>x & "co"', "Müller 3"]
QUIET = Progress(quiet=True)


def _with_classifier(cohort: Cohort, identity: str = "classifier-1") -> None:
    record = Record("train", "svm", identity, {"encoder": "dino", "map": "map"}, {})
    publish(cohort.store, cohort.classifier("svm"), {}, record)


def _detect(faked: ModuleType, cohort: Cohort) -> None:
    for patient in FINAL:
        unit = detect_unit(DetectConfig(), cohort, patient)
        find_candidates(cohort, unit, faked.FirstValueClassifier(), DetectConfig())


@pytest.fixture
def cohort(faked: ModuleType, tmp_path: Path) -> tuple[Cohort, dict[str, object]]:
    cohort, patients = faked.fake_cohort(tmp_path / "cohort")
    _with_classifier(cohort)
    return cohort, patients


def test_find_candidates_faked_patient_fills_the_contract(
    faked: ModuleType, cohort: tuple[Cohort, dict[str, object]]
) -> None:
    place, _ = cohort
    _detect(faked, place)
    table = place.store.read_table(f"{patient_folder(place, 'final', 'Müller 3')}/candidates.parquet")
    check_columns(table, CANDIDATES_SCHEMA, "candidates")
    frame = pl.DataFrame(pl.from_arrow(table))
    assert 0 < frame.height < 60
    assert frame["probability"].min() > 0.5  # type: ignore[operator]
    assert frame["physical_id"].is_unique().all()
    scores = place.store.read_table(f"{patient_folder(place, 'final', 'Müller 3')}/scores.parquet")
    assert scores.num_rows == 60
    record = read_record(place.store, patient_folder(place, "final", "Müller 3"))
    assert record is not None
    assert record.counts["candidates"] == frame.height
    assert record.counts["detections"] >= frame.height
    assert detected_patients(place, "final") == FINAL


def test_find_candidates_embeddings_of_another_segmentation_are_refused(
    faked: ModuleType, cohort: tuple[Cohort, dict[str, object]]
) -> None:
    place, _ = cohort
    faked.fake_patient(place, "12", 60, 99)  # other cells, and so other ids, for patient 12
    table = place.store.read_table(f"{place.embeddings('dino', '12')}/part-000.parquet")
    record = read_record(place.store, place.embeddings("dino", "Müller 3"))
    assert record is not None
    publish(place.store, place.embeddings("dino", "Müller 3"), {"part-000.parquet": table}, record)
    unit = detect_unit(DetectConfig(), place, "Müller 3")
    with pytest.raises(SchemaError, match="ctc-ray embed"):
        find_candidates(place, unit, faked.FirstValueClassifier(), DetectConfig())


def test_plan_detect_states_follow_classifier_and_inputs(
    faked: ModuleType, cohort: tuple[Cohort, dict[str, object]]
) -> None:
    place, _ = cohort
    config = RunConfig()
    assert [row.state for row in plan_detect(config, place)] == [State.ABSENT, State.ABSENT]
    _detect(faked, place)
    assert [row.state for row in plan_detect(config, place)] == [State.COMPLETE, State.COMPLETE]
    _with_classifier(place, "classifier-2")
    assert [row.state for row in plan_detect(config, place)] == [State.STALE, State.STALE]
    place.store.delete_folder(place.classifier("svm"))
    assert all("ctc-ray train" in row.why for row in plan_detect(config, place))


def test_detect_unit_roles_are_no_part_of_the_identity(cohort: tuple[Cohort, dict[str, object]]) -> None:
    place, _ = cohort
    one = detect_unit(DetectConfig(roles=("final",)), place, "Müller 3")
    other = detect_unit(DetectConfig(roles=("test", "final")), place, "Müller 3")
    assert one.identity == other.identity
    assert detect_unit(DetectConfig(threshold=0.6), place, "Müller 3").identity != one.identity


def test_detect_unit_no_embeddings_names_the_command(cohort: tuple[Cohort, dict[str, object]]) -> None:
    place, _ = cohort
    place.store.delete_folder(place.embeddings("dino", "Müller 3"))
    with pytest.raises(MissingInputError, match="ctc-ray embed"):
        detect_unit(DetectConfig(), place, "Müller 3")


def test_run_compare_no_detection_names_the_command(cohort: tuple[Cohort, dict[str, object]], tmp_path: Path) -> None:
    place, _ = cohort
    with pytest.raises(MissingInputError, match="ctc-ray detect"):
        run_compare(RunConfig(), place, cellsearch=str(tmp_path), progress=QUIET)


@pytest.mark.ray
def test_run_compare_faked_cohort_writes_tables_and_resumes(
    faked: ModuleType, cohort: tuple[Cohort, dict[str, object]], tmp_path: Path, ray_cluster: None
) -> None:
    place, patients = cohort
    _detect(faked, place)
    cellsearch = faked.write_cellsearch(tmp_path / "cellsearch", {name: patients[name] for name in FINAL})
    (cellsearch / "Müller 3" / "Müller 3.xml").rename(tmp_path / "hidden.xml")
    config = RunConfig()
    first = run_compare(config, place, cellsearch=str(cellsearch), progress=QUIET)
    assert (first.units_computed, first.units_reused, first.set_aside) == (1, 0, 1)
    assert read_failures(place.store, "compare")["message"].str.contains("holds no CellSearch event xml").all()
    folder = place.detection("final")
    alone = _tables(place, folder)

    (tmp_path / "hidden.xml").rename(cellsearch / "Müller 3" / "Müller 3.xml")
    second = run_compare(config, place, cellsearch=str(cellsearch), progress=QUIET)
    assert (second.units_computed, second.units_reused, second.set_aside) == (1, 1, 0)
    assert read_failures(place.store, "compare").is_empty()
    tables = _tables(place, folder)
    check_columns(tables["matches"].to_arrow(), MATCHES_SCHEMA, "matches")
    assert tables["ppv"]["patient"].to_list() == [*FINAL, None]
    for name in TABLES:  # the first patient's rows stayed as they were
        kept = tables[name].filter(pl.col("patient") == FINAL[0])
        assert kept.equals(alone[name].filter(pl.col("patient") == FINAL[0]))
    total = tables["ppv"].row(-1, named=True)
    assert total["num_judged"] == total["num_candidates"] > 0
    assert total["num_both"] + total["num_cellsearch_only"] == total["num_cellsearch_ctc"] > 0
    assert total["num_model_ctc"] == tables["judgements"]["is_ctc"].sum()
    assert total["num_cellsearch_ctc_segmented"] == total["num_cellsearch_ctc"]
    assert 0.5 < total["model_ppv"] <= 1

    third = run_compare(config, place, cellsearch=str(cellsearch), progress=QUIET)
    assert (third.units_computed, third.units_reused) == (0, 2)
    assert [row.state for row in plan_compare(config, place, cellsearch=str(cellsearch))] == [State.COMPLETE] * 2

    delivery = faked.write_cellsearch(tmp_path / "one delivery", {FINAL[0]: patients[FINAL[0]]})
    shutil.copy(cellsearch / "truth.parquet", delivery / "truth.parquet")
    fourth = run_compare(config, place, cellsearch=str(delivery), progress=QUIET)
    assert (fourth.units_computed, fourth.units_reused, fourth.set_aside) == (0, 2, 0)
    assert _tables(place, folder)["ppv"].equals(tables["ppv"])


@pytest.mark.ray
def test_run_compare_other_tolerance_is_stale_without_force(
    faked: ModuleType, cohort: tuple[Cohort, dict[str, object]], tmp_path: Path, ray_cluster: None
) -> None:
    place, patients = cohort
    _detect(faked, place)
    cellsearch = str(faked.write_cellsearch(tmp_path / "cellsearch", {n: patients[n] for n in FINAL}, with_truth=False))
    run_compare(RunConfig(), place, cellsearch=cellsearch, progress=QUIET)
    assert _tables(place, place.detection("final"))["ppv"]["model_ppv"].null_count() == 3
    strict = RunConfig(compare=CompareConfig(tolerance_px=2.0))
    assert {row.state for row in plan_compare(strict, place, cellsearch=cellsearch)} == {State.STALE}
    with pytest.raises(StaleOutputError, match="--force"):
        run_compare(strict, place, cellsearch=cellsearch, progress=QUIET)
    assert run_compare(strict, place, cellsearch=cellsearch, force=True, progress=QUIET).units_computed == 2


@pytest.mark.ray
def test_run_compare_events_that_cannot_be_read_are_listed_and_the_patient_is_compared(
    faked: ModuleType, cohort: tuple[Cohort, dict[str, object]], tmp_path: Path, ray_cluster: None
) -> None:
    place, patients = cohort
    _detect(faked, place)
    cellsearch = faked.write_cellsearch(tmp_path / "cellsearch", {n: patients[n] for n in FINAL})
    xml = cellsearch / "Müller 3" / "Müller 3.xml"
    broken = faked.event_xml(900, 1, 100, 50, 10, is_ctc=True).replace("<framenum>1", "<framenum>?")
    xml.write_text(xml.read_text(encoding="utf-8").replace("</events>", f"{broken}</events>"), encoding="utf-8")
    for computed in (2, 0):  # a second run computes nothing and lists the same
        result = run_compare(RunConfig(), place, cellsearch=str(cellsearch), progress=QUIET)
        assert (result.units_computed, result.set_aside, result.counts["events_set_aside"]) == (computed, 0, 1)
        failures = read_failures(place.store, "compare")
        assert failures["unit"].to_list() == ["Müller 3"]
        assert failures["source"][0].endswith("Müller 3.xml event 900")
    assert "900" not in _tables(place, place.detection("final"))["events"]["event_id"]


@pytest.mark.ray
def test_run_compare_every_xml_missing_fails_and_keeps_what_was(
    faked: ModuleType, cohort: tuple[Cohort, dict[str, object]], tmp_path: Path, ray_cluster: None
) -> None:
    place, patients = cohort
    _detect(faked, place)
    cellsearch = faked.write_cellsearch(tmp_path / "cellsearch", {n: patients[n] for n in FINAL})
    run_compare(RunConfig(), place, cellsearch=str(cellsearch), progress=QUIET)
    before = _tables(place, place.detection("final"))
    with pytest.raises(TooManyFailuresError, match="2 of 2 patients failed"):
        run_compare(RunConfig(), place, cellsearch=str(tmp_path / "elsewhere"), progress=QUIET)
    after = _tables(place, place.detection("final"))
    assert all(before[name].equals(after[name]) for name in TABLES)


@pytest.mark.ray
def test_run_detect_one_damaged_patient_is_set_aside_and_resumes(
    faked: ModuleType, tmp_path: Path, ray_cluster: None
) -> None:
    place, patients = faked.fake_cohort(tmp_path / "cohort")
    faked.train_faked(place, patients)
    shard = f"{place.embeddings('dino', 'Müller 3')}/part-000.parquet"
    whole = place.store.read_bytes(shard)
    place.store.write_bytes(shard, whole[:-8] + b"damaged!")
    first = run_detect(RunConfig(), place, progress=QUIET)
    assert (first.units_computed, first.units_reused, first.set_aside) == (1, 0, 1)
    assert "cannot be read as Parquet" in read_failures(place.store, "detect")["message"][0]
    assert detected_patients(place, "final") == [FINAL[0]]

    place.store.write_bytes(shard, whole)
    second = run_detect(RunConfig(), place, progress=QUIET)
    assert (second.units_computed, second.units_reused, second.set_aside) == (1, 1, 0)
    assert read_failures(place.store, "detect").is_empty()
    assert second.counts["cells"] == 120
    written = place.store.read_bytes(f"{patient_folder(place, 'final', 'Müller 3')}/candidates.parquet")

    stricter = RunConfig(detect=DetectConfig(threshold=0.9))
    with pytest.raises(StaleOutputError, match="--force"):
        run_detect(stricter, place, progress=QUIET)
    fewer = run_detect(stricter, place, force=True, progress=QUIET)
    assert 0 < fewer.counts["candidates"] < second.counts["candidates"]
    run_detect(RunConfig(), place, force=True, progress=QUIET)
    assert place.store.read_bytes(f"{patient_folder(place, 'final', 'Müller 3')}/candidates.parquet") == written


def test_run_detect_unknown_patient_and_missing_role_are_refused(cohort: tuple[Cohort, dict[str, object]]) -> None:
    place, _ = cohort
    with pytest.raises(ConfigError, match="no patient 'P99'"):
        run_detect(RunConfig(), place, patients=["P99"], progress=QUIET)
    with pytest.raises(ConfigError, match="role pretrain"):
        run_detect(RunConfig(detect=DetectConfig(roles=("pretrain",))), place, progress=QUIET)


def _tables(place: Cohort, folder: str) -> dict[str, pl.DataFrame]:
    return {name: pl.DataFrame(pl.from_arrow(place.store.read_table(f"{folder}/{name}.parquet"))) for name in TABLES}
