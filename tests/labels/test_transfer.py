"""Import, export and relinking of labels."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import polars as pl
import pytest

from ctc_ray.config import RunConfig
from ctc_ray.errors import LabelError, MissingInputError, SchemaError
from ctc_ray.labels.consensus import one_per_physical_cell, read_labels
from ctc_ray.labels.events import read_events
from ctc_ray.labels.relink import relink
from ctc_ray.labels.transfer import export_labels, import_labels
from ctc_ray.records import read_failures


@pytest.fixture
def made(tmp_path: Path, mixture: ModuleType) -> Any:
    return mixture.build_cohort(tmp_path, roles={"007": "train", "Müller 3": "test"}, num_cells=40)


def cells_of(made: Any, patient: str) -> pl.DataFrame:
    table = made.cohort.read_columns(f"cells/{patient}", ["cell_id", "patient", "field", "row", "col"])
    return pl.DataFrame(pl.from_arrow(table))


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_labels_exported_and_imported_into_a_copy_are_the_same(
    made: Any, tmp_path: Path, mixture: ModuleType, suffix: str
) -> None:
    frame = pl.concat([cells_of(made, "007").head(10), cells_of(made, "Müller 3").head(5)])
    frame = frame.select("cell_id", label=pl.Series(["ctc", "non_ctc", "unsure"] * 5))
    file = tmp_path / f"given.{suffix}"
    frame.write_csv(file) if suffix == "csv" else frame.write_parquet(file)
    result = import_labels(made.cohort, file, reader="anna")
    assert (result.units_computed, result.set_aside, result.counts["ctc"]) == (1, 0, 5)
    out = tmp_path / f"out.{suffix}"
    export_labels(made.cohort, out)
    copy = mixture.build_cohort(tmp_path / "copy", roles={"007": "train", "Müller 3": "test"}, num_cells=40)
    import_labels(copy.cohort, out, reader="anna")
    assert read_labels(copy.cohort).equals(read_labels(made.cohort))
    assert read_events(made.cohort)["crop_sha"].str.len_chars().to_list() == [32] * 15


def test_positions_take_the_nearest_cell_and_far_ones_are_set_aside(made: Any, tmp_path: Path) -> None:
    cells = cells_of(made, "007").head(3)
    moved = cells.with_columns(row=pl.col("row") + pl.Series([0.0, 3.0, 8.0]), label=pl.lit("ctc"))
    file = tmp_path / "positions.csv"
    moved.drop("cell_id").write_csv(file)
    result = import_labels(made.cohort, file, reader="anna")
    assert result.set_aside == 1
    assert set(read_labels(made.cohort)["cell_id"]) == set(cells["cell_id"][:2])
    failures = read_failures(made.cohort.store, "import-labels")
    assert failures["source"].str.ends_with("row 3").to_list() == [True]


def test_the_same_file_again_is_reused_and_two_readers_are_counted(made: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    cells_of(made, "007").head(2).select("cell_id", label=pl.lit("ctc")).write_csv(file)
    import_labels(made.cohort, file, reader="anna")
    assert import_labels(made.cohort, file, reader="anna").units_reused == 1
    import_labels(made.cohort, file, reader="ben")
    assert read_labels(made.cohort)["num_readers"].to_list() == [2, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": ["ctc", "tumour", "ctc"]}, "unknown labels .row 2: 'tumour'.; valid are ctc, non_ctc"),
        ({"cell_id": ["x", None, None]}, "unknown cells .row 1: 'x'"),
        ({"cell_id": "same", "label": ["ctc", "non_ctc", "ctc"]}, "different labels for one cell .row 1: 'ctc', row 2"),
    ],
)
def test_wrong_rows_are_refused_with_their_numbers(
    made: Any, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    ids = cells_of(made, "007")["cell_id"].to_list()[:3]
    values: dict[str, Any] = {"cell_id": ids, "label": ["ctc"] * 3}
    if change.get("cell_id") == "same":
        change = {**change, "cell_id": [ids[0]] * 3}
    elif "cell_id" in change:
        change = {"cell_id": [given or known for given, known in zip(change["cell_id"], ids, strict=True)]}
    file = tmp_path / "wrong.csv"
    pl.DataFrame({**values, **change}).write_csv(file)
    with pytest.raises(LabelError, match=message):
        import_labels(made.cohort, file, reader="anna")
    assert read_events(made.cohort).height == 0


def test_unknown_patient_missing_columns_and_odd_files_are_refused(made: Any, tmp_path: Path) -> None:
    file = tmp_path / "p.csv"
    file.write_text("patient,field,row,col,label\nP99,1,2,3,ctc\n")
    with pytest.raises(LabelError, match=r"unknown patients .row 1: 'P99'.; the cohort has 007, Müller 3"):
        import_labels(made.cohort, file, reader="anna")
    file.write_text("patient,field,label\n007,1,ctc\n")
    with pytest.raises(SchemaError, match="lacks row, col"):
        import_labels(made.cohort, file, reader="anna")
    with pytest.raises(SchemaError, match="CSV or Parquet"):
        import_labels(made.cohort, tmp_path / "p.xlsx", reader="anna")
    with pytest.raises(MissingInputError, match="does not exist"):
        import_labels(made.cohort, tmp_path / "none.csv", reader="anna")
    with pytest.raises(MissingInputError, match="no labels to export"):
        export_labels(made.cohort, tmp_path / "out.csv")


def test_patient_ids_that_look_like_numbers_stay_text(made: Any, tmp_path: Path) -> None:
    file = tmp_path / "n.csv"
    cell = cells_of(made, "007").row(0, named=True)
    file.write_text(f"patient,field,row,col,label\n007,{cell['field']},{cell['row']},{cell['col']},ctc\n")
    import_labels(made.cohort, file, reader="anna")
    assert read_labels(made.cohort)["patient"].to_list() == ["007"]


def test_relink_carries_labels_to_new_ids_and_lists_the_rest(made: Any, tmp_path: Path, mixture: ModuleType) -> None:
    labelled = pl.concat([cells_of(made, "007").head(6), cells_of(made, "Müller 3").head(6)])
    file = tmp_path / "a.csv"
    labelled.select("cell_id", label=pl.Series(["ctc", "non_ctc"] * 6)).write_csv(file)
    import_labels(made.cohort, file, reader="anna")
    before = read_labels(made.cohort)
    mixture.write_patient(made.cohort, "007", num_cells=40, seed=3, spread=1.6, version="2")
    mixture.write_patient(made.cohort, "Müller 3", num_cells=40, seed=99, spread=1.6, version="2")
    with pytest.raises(LabelError, match="relink"):
        one_per_physical_cell(made.cohort, before)
    result = relink(RunConfig(), made.cohort)
    new = pl.concat([cells_of(made, "007"), cells_of(made, "Müller 3")])
    near = labelled.join(
        new, on=["patient", "field", "row", "col"]
    )  # cells lie on a grid of 25 px: near means the same
    assert near.filter(pl.col("patient") == "007").height == 6
    assert (result.units_computed, result.set_aside) == (near.height, 12 - near.height)
    assert result.set_aside > 0
    answers = dict(before.select("cell_id", "label").iter_rows())
    expected = {now: answers[old] for old, now in near.select("cell_id", "cell_id_right").iter_rows()}
    assert dict(read_labels(made.cohort).select("cell_id", "label").iter_rows()) == expected
    assert read_failures(made.cohort.store, "relink").height == result.set_aside
    assert relink(RunConfig(), made.cohort).units_computed == 0
