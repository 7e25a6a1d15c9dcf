"""Importing without Ray: three kinds of source give the same cells, and what is wrong with a row is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ctc_ray.cohort import Cohort
from ctc_ray.config import load_config
from ctc_ray.errors import ConfigError, MissingInputError, SchemaError
from ctc_ray.imports.plan import PatientPlan
from ctc_ray.labels.consensus import read_labels
from ctc_ray.labels.events import crop_digest, read_events
from ctc_ray.records import State, read_failures, read_record
from ctc_ray.schema import cells_schema, pack_pixels, pixels_field, unpack_pixels

ImportHere = Callable[..., list[PatientPlan]]
PATIENTS = ["007", "Müller 3"]


def _cohort(path: Path) -> Cohort:
    return Cohort.open(str(path), create=True)


def _crops_of(cohort: Cohort, patient: str) -> np.ndarray:
    table = pa.concat_tables([cohort.store.read_table(path) for path in cohort.shards(cohort.cells(patient))])
    return unpack_pixels(table["pixels"], table.schema.field("pixels"))


def _reasons(cohort: Cohort) -> dict[str, str]:
    frame = read_failures(cohort.store, "import-crops")
    return dict(frame.select("source", "message").iter_rows())


def test_table_of_png_files_becomes_cells_by_the_contract(
    tmp_path: Path, table: Path, crops: np.ndarray, import_here: ImportHere
) -> None:
    cohort = _cohort(tmp_path / "c")
    import_here(cohort, table)
    assert cohort.patient_ids() == PATIENTS
    for patient, first in zip(PATIENTS, (0, 1), strict=True):
        assert np.array_equal(_crops_of(cohort, patient), crops[first::2])
        path = cohort.shards(cohort.cells(patient))[0]
        assert cohort.store.read_schema(path).equals(cells_schema(), check_metadata=False)
        assert cohort.store.read_schema(path).field("pixels").metadata[b"layout"] == b"CHW"
    frame = pl.DataFrame(pl.from_arrow(cohort.read_columns("cells/007", ["field", "row", "col", "y0", "x0", "prob"])))
    assert frame.row(1) == (3, 34.5, 44.0, 10, 20, 1.0)
    record = cohort.require("cells/007", "import-crops")
    assert (record.stage, record.counts["cells"], record.units_computed) == ("import-crops", 3, 1)
    assert cohort.physical_ids("007").height == 3
    origins = pl.DataFrame(pl.from_arrow(cohort.store.read_table("imports/007.parquet")))
    assert origins["source"].to_list() == [f"cells_dataframe row {n}" for n in (1, 3, 5)]
    assert origins["crop_sha"][0] == crop_digest(crops[0])
    assert not cohort.store.exists("cells/007/_parts")


def test_codes_of_the_reference_become_label_events(tmp_path: Path, table: Path, import_here: ImportHere) -> None:
    cohort = _cohort(tmp_path / "c")
    import_here(cohort, table)
    labels = read_labels(cohort)
    assert sorted(labels["label"]) == ["ctc", "ctc", "non_ctc", "non_ctc"]
    assert set(read_events(cohort)["source"]) == {"cells_dataframe"}
    import_here(cohort, table)  # the same labels again: no second batch
    assert read_events(cohort).height == 4
    import_here(cohort, table, "label_map={0: artefact}")  # changed: the later answer counts
    assert sorted(read_labels(cohort)["label"]) == ["artefact", "artefact", "ctc", "ctc"]


def test_unknown_label_is_listed_and_its_cell_imported(tmp_path: Path, table: Path, import_here: ImportHere) -> None:
    table.write_text(table.read_text().replace(",10.0,", ",blast,"))
    cohort = _cohort(tmp_path / "c")
    import_here(cohort, table)
    assert len(_crops_of(cohort, "007")) == 3
    failures = read_failures(cohort.store, "import-crops-labels")
    assert failures["kind"].to_list() == ["LabelError", "LabelError"]
    assert "label_map" in failures["message"][0]
    import_here(cohort, table, "label_map={'*': non_ctc}")
    assert read_failures(cohort.store, "import-crops-labels").is_empty()


def test_npz_and_parquet_give_the_pixels_of_the_table(
    tmp_path: Path, table: Path, crops: np.ndarray, import_here: ImportHere
) -> None:
    names = np.array([PATIENTS[index % 2] for index in range(len(crops))])
    last = np.moveaxis(crops, 1, -1)
    np.savez_compressed(tmp_path / "cells.npz", X=last, who=names)
    npz = _cohort(tmp_path / "npz")
    import_here(npz, tmp_path / "cells.npz", "pixels=X", "patient_column=who", "unit_cells=4")
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(last)
    forms = {
        "own": pa.table([pack_pixels(crops), names], schema=pa.schema([pixels_field(), ("patient", pa.string())])),
        "bytes": pa.table({"pixels": [crop.tobytes() for crop in crops], "patient": names}),
        "lists": pa.table({"pixels": [crop.ravel() for crop in crops], "patient": names}),
        "tensors": pa.table({"pixels": tensors, "patient": names}),
    }
    told = {"bytes": ["shape=[3,48,48]", "dtype=uint8"], "lists": ["shape=[3,48,48]"]}
    for name, content in forms.items():
        pq.write_table(content, tmp_path / f"{name}.parquet", row_group_size=2)
        cohort = _cohort(tmp_path / name)
        import_here(cohort, tmp_path / f"{name}.parquet", *told.get(name, []))
        for patient, first in zip(PATIENTS, (0, 1), strict=True):
            assert np.array_equal(_crops_of(cohort, patient), crops[first::2]), name
            assert np.array_equal(_crops_of(npz, patient), crops[first::2])


def test_ids_follow_pixels_and_names_and_not_the_order_or_the_rule(
    tmp_path: Path, crops: np.ndarray, import_here: ImportHere
) -> None:
    ids: dict[str, dict[str, str]] = {}
    for name, order, rule in (
        ("a", [0, 1, 2, 3], "exact"),
        ("b", [3, 1, 0, 2], "exact"),
        ("c", [0, 1, 2, 3], "bilinear"),
    ):
        np.savez(tmp_path / f"{name}.npz", pixels=crops[order], source_id=np.array([f"cell{i}" for i in order]))
        cohort = _cohort(tmp_path / name)
        import_here(cohort, tmp_path / f"{name}.npz", "patient=P1", f"resize={rule}")
        frame = pl.DataFrame(pl.from_arrow(cohort.store.read_table("imports/P1.parquet")))
        ids[name] = dict(frame.select("source_key", "cell_id").iter_rows())
    assert ids["a"] == ids["b"] == ids["c"]
    assert len(set(ids["a"].values())) == 4
    crops[0, 0, 0, 0] ^= 1
    np.savez(tmp_path / "d.npz", pixels=crops[:4], source_id=np.array([f"cell{i}" for i in range(4)]))
    import_here(_cohort(tmp_path / "d"), tmp_path / "d.npz", "patient=P1")
    frame = pl.DataFrame(pl.from_arrow(_cohort(tmp_path / "d").store.read_table("imports/P1.parquet")))
    changed = {key for key, name in frame.select("source_key", "cell_id").iter_rows() if ids["a"][key] != name}
    assert changed == {"cell0"}


def test_bad_rows_are_set_aside_with_their_reasons(tmp_path: Path, table: Path, import_here: ImportHere) -> None:
    folder = table.parent
    Image.fromarray(np.zeros((40, 48), np.uint8)).save(folder / "0_dapi.png")  # row 1: sizes differ
    (folder / "1_ck.png").write_bytes(b"\x89PNG but not really")  # row 2
    (folder / "2_cd45.png").unlink()  # row 3
    Image.fromarray(np.zeros((48, 48, 3), np.uint8)).save(folder / "3_ck.png")  # row 4: colours
    for name in ("dapi", "ck", "cd45"):
        Image.fromarray(np.zeros((48, 48), np.uint16)).save(folder / f"4_{name}.png")  # row 5: 16 bit among 8
    lines = table.read_text().splitlines()
    columns = lines[0].split(",")
    nobody = ",".join("" if name == "case" else value for name, value in zip(columns, lines[6].split(","), strict=True))
    no_path = lines[6].replace("5_ck.png", "")
    slashed = lines[6].replace("Müller 3", "a/b")
    table.write_text("\n".join([*lines, lines[6], nobody, no_path, slashed]) + "\n")
    cohort = _cohort(tmp_path / "c")
    import_here(cohort, table, "bits=8")
    reasons = _reasons(cohort)
    expected = {
        1: "differ in size",
        2: "cannot be decoded",
        3: "2_cd45.png",
        4: "mode RGB",
        5: "uint16 in an import of uint8",
    }
    expected |= {7: "there twice", 9: "path is empty"}
    assert {f"cells_dataframe row {n}" for n in expected} == set(reasons)
    for number, reason in expected.items():
        assert reason in reasons[f"cells_dataframe row {number}"]
    assert _crops_of(cohort, "007").shape == (0, 3, 48, 48)
    assert len(_crops_of(cohort, "Müller 3")) == 1
    record = read_record(cohort.store, "cells/007")
    assert record is not None
    assert record.counts["failed"] == 3


def test_nan_in_an_array_is_set_aside_and_the_rest_scaled(tmp_path: Path, import_here: ImportHere) -> None:
    values = np.random.default_rng(0).random((3, 3, 40, 40)).astype(np.float32)
    values[1, 2, 3, 4] = np.nan
    np.savez(tmp_path / "P9.npz", pixels=values)
    cohort = _cohort(tmp_path / "c")
    with pytest.raises(SchemaError, match=r"float32.*float_maximum"):
        import_here(cohort, tmp_path / "P9.npz")
    options = ["bits=12", "float_maximum=1", "resize=pad-zero"]
    import_here(cohort, tmp_path / "P9.npz", *options)
    assert _reasons(cohort)["P9.npz row 2"].startswith("1 of 4800 pixels are not finite")
    pixels = _crops_of(cohort, "P9")
    assert pixels.dtype == np.uint16
    assert np.array_equal(pixels[1, :, 4:44, 4:44], np.rint(values[2].astype(float) * 4095))


def test_channels_are_chosen_by_number_and_four_are_kept(tmp_path: Path, import_here: ImportHere) -> None:
    pixels = np.random.default_rng(0).integers(0, 4096, (2, 48, 48, 5), dtype=np.uint16)
    np.savez(tmp_path / "P1.npz", pixels=pixels)
    with pytest.raises(SchemaError, match="layout"):
        import_here(_cohort(tmp_path / "a"), tmp_path / "P1.npz")
    with pytest.raises(SchemaError, match="3 or 4 channels; the source has 5"):
        import_here(_cohort(tmp_path / "a"), tmp_path / "P1.npz", "layout=channels_last")
    cohort = _cohort(tmp_path / "b")
    import_here(cohort, tmp_path / "P1.npz", "layout=channels_last", "channel_order=[4,0,2,1]")
    assert np.array_equal(_crops_of(cohort, "P1"), np.moveaxis(pixels, -1, 1)[:, [4, 0, 2, 1]])


def test_object_arrays_are_never_loaded(tmp_path: Path, import_here: ImportHere) -> None:
    np.savez(tmp_path / "P1.npz", pixels=np.array([{"a": 1}] * 4, dtype=object).reshape(1, 1, 2, 2))
    with pytest.raises(SchemaError, match="Python objects, which are never loaded"):
        import_here(_cohort(tmp_path / "c"), tmp_path / "P1.npz")


def test_source_that_is_not_there_or_mixed_is_one_clear_error(tmp_path: Path, import_here: ImportHere) -> None:
    cohort = _cohort(tmp_path / "c")
    with pytest.raises(MissingInputError, match="nothing is no file"):
        import_here(cohort, tmp_path / "nothing")
    (tmp_path / "both").mkdir()
    np.savez(tmp_path / "both" / "a.npz", pixels=np.zeros((1, 3, 48, 48), np.uint8))
    (tmp_path / "both" / "b.csv").write_text("dapi_path\n")
    with pytest.raises(ConfigError, match="one kind at a time"):
        import_here(cohort, tmp_path / "both")
    np.savez(tmp_path / "a.npz", X=np.zeros((1, 3, 48, 48), np.uint8))
    with pytest.raises(SchemaError, match="no array 'pixels'; it has X"):
        import_here(cohort, tmp_path / "a.npz")
    with pytest.raises(SchemaError, match="lacks y; it has"):
        import_here(cohort, tmp_path / "a.npz", "pixels=X", "label_column=y")


def test_folder_of_files_names_patients_after_them_and_only_changed_ones_are_stale(
    tmp_path: Path, crops: np.ndarray, import_here: ImportHere
) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    np.savez(folder / "P1.npz", pixels=crops[:2])
    np.savez(folder / "P2.npz", pixels=crops[2:])
    cohort = _cohort(tmp_path / "c")
    assert {plan.patient: plan.state for plan in import_here(cohort, folder)} == {
        "P1": State.ABSENT,
        "P2": State.ABSENT,
    }
    np.savez(folder / "P2.npz", pixels=crops[3:])
    np.savez(folder / "P3.npz", pixels=crops[:1])
    states = {plan.patient: plan.state for plan in import_here(cohort, folder)}
    assert states == {"P1": State.COMPLETE, "P2": State.STALE, "P3": State.ABSENT}


def test_source_without_a_usable_row_tells_the_first_reason(tmp_path: Path, import_here: ImportHere) -> None:
    path = tmp_path / "cells.csv"
    path.write_text("patient,dapi_path,ck_path,cd45_path\na/b,1,2,3\n")
    with pytest.raises(ConfigError, match=r"all 1 are set aside. First: cells.csv row 1: patient id 'a/b'"):
        import_here(_cohort(tmp_path / "c"), path)


def test_settings_refuse_what_cannot_be_meant() -> None:
    with pytest.raises(ConfigError, match="resize"):
        load_config(None, ["import_crops.resize=stretch"])
    with pytest.raises(ConfigError, match="float_maximum needs bits"):
        load_config(None, ["import_crops.float_maximum=1"])
    assert (
        json.dumps(load_config(None, ["import_crops.resize=pad-edge"]).import_crops.identity()["resize"])
        == '["pad-edge"]'
    )
