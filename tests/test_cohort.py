from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest

from ctc_ray import records
from ctc_ray.cohort import Cohort, check_patient_id
from ctc_ray.errors import ConfigError, MissingInputError, RoleLeakError
from ctc_ray.records import Record

ODD_IDS = {"007": "a", "12": "b", "Müller 3": "c"}


def test_cohort_open_of_nothing_names_the_command_that_starts_one(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"ctc-ray segment .* --cartridges"):
        Cohort.open(str(tmp_path / "none"))


def test_cohort_ids_stay_text(tmp_path: Path) -> None:
    cohort = Cohort.open(str(tmp_path), create=True)
    cohort.add_patients(ODD_IDS)
    assert Cohort.open(str(tmp_path)).patient_ids() == ["007", "12", "Müller 3"]


def test_cohort_add_patients_never_changes_a_role(tmp_path: Path) -> None:
    cohort = Cohort.open(str(tmp_path), create=True)
    cohort.add_patients({"007": "a"})
    cohort.write_patients(cohort.patients().with_columns(pl.lit("train").alias("role")))
    cohort.add_patients({**ODD_IDS, "007": "elsewhere"})
    rows = {row["patient"]: (row["role"], row["cartridge"]) for row in cohort.patients().iter_rows(named=True)}
    assert rows == {"007": ("train", "a"), "12": (None, "b"), "Müller 3": (None, "c")}


@pytest.mark.parametrize("name", ["", " a", "a ", "a/b", "../x", ".hidden", "_record", "a\nb"])
def test_patient_ids_that_cannot_name_a_folder_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a folder"):
        check_patient_id(name)


def test_cohort_patient_in_two_roles_is_a_leak(tmp_path: Path) -> None:
    cohort = Cohort.open(str(tmp_path), create=True)
    rows = pl.DataFrame({"patient": ["1", "1"], "role": ["train", "test"], "cartridge": ["", ""]})
    cohort.write_patients(rows)
    with pytest.raises(RoleLeakError, match="twice"):
        cohort.patients()


def test_cohort_require_role_refuses_a_leak(tmp_path: Path) -> None:
    cohort = Cohort.open(str(tmp_path), create=True)
    cohort.add_patients(ODD_IDS)
    cohort.write_patients(cohort.patients().with_columns(pl.Series("role", ["train", "test", "test"])))
    cohort.require_role(["007"], "train")
    with pytest.raises(RoleLeakError, match="12"):
        cohort.require_role(["007", "12"], "train")


def test_cohort_select_patients_refuses_an_unknown_name(tmp_path: Path) -> None:
    cohort = Cohort.open(str(tmp_path), create=True)
    cohort.add_patients(ODD_IDS)
    assert cohort.select_patients(["12"]) == ["12"]
    with pytest.raises(ConfigError, match="no patient '7'"):
        cohort.select_patients(["7"])


def test_cohort_shards_are_what_the_record_lists(tmp_path: Path) -> None:
    cohort = Cohort.open(str(tmp_path), create=True)
    folder = cohort.cells("Müller 3")
    record = Record(stage="segment", unit="Müller 3", identity="i", config={}, inputs={})
    records.publish(cohort.store, folder, {"part-000.parquet": pa.table({"a": [1, 2]})}, record)
    cohort.store.write_table(
        f"{folder}/part-001.parquet", pa.table({"a": [3]})
    )  # of a generation that was never finished
    assert cohort.shards(folder) == [f"{folder}/part-000.parquet"]
    assert cohort.read_columns(folder, ["a"]).column("a").to_pylist() == [1, 2]


def test_cohort_require_names_the_command_for_a_missing_stage(tmp_path: Path) -> None:
    cohort = Cohort.open(str(tmp_path), create=True)
    with pytest.raises(MissingInputError, match="ctc-ray embed"):
        cohort.require(cohort.embeddings("dino", "007"), "embed")
