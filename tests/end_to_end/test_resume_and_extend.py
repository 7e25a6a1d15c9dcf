"""A killed run continues and equals an uninterrupted one; new patients cost only themselves; bad input loses nothing."""

import math
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
from runner import Demo, ctc_ray, kill_when, record

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]
SOME = ["P01", "P02", "P03"]


def _table(folder: Path) -> pa.Table:
    tables = [pq.ParquetFile(path).read() for path in sorted(folder.glob("part-*.parquet"))]
    return pa.concat_tables(tables).sort_by("cell_id")


def _parts(folder: Path) -> int:
    return len(list(folder.rglob("_parts/**/*.parquet")))


def test_segment_killed_and_run_again_equals_an_uninterrupted_run(demo: Demo, tmp_path: Path) -> None:
    cohort = tmp_path / "cohort"
    command = ["segment", str(cohort), "--cartridges", str(demo.cartridges), "--patients", ",".join(SOME)]
    kill_when(lambda: _parts(cohort) >= 3, *command)
    assert not (cohort / "cells" / SOME[-1] / "_record.json").exists()
    again = ctc_ray(*command)
    assert again.code == 0, again.err[-3000:]
    records = [record(cohort / "cells" / patient) for patient in SOME]
    assert sum(r["units_reused"] for r in records) > 0
    assert sum(r["units_computed"] for r in records) > 0
    assert all(r["units_reused"] + r["units_computed"] == 6 for r in records)
    for patient in SOME:
        assert _table(cohort / "cells" / patient).equals(_table(demo.cohort / "cells" / patient))
        mine = pl.read_parquet(cohort / "duplicates" / f"{patient}.parquet").sort("cell_id")
        assert mine.equals(pl.read_parquet(demo.cohort / "duplicates" / f"{patient}.parquet").sort("cell_id"))


def _embed(cohort: Path) -> list[str]:
    """The command with units small enough to be interrupted; two runs of it compute the same batches."""
    small = ["--set", "embed.unit_cells=100", "--set", "embed.batch_size=50", "--set", "embed.num_actors=1"]
    return ["embed", str(cohort), *small]


def test_embed_killed_and_run_again_equals_an_uninterrupted_run(demo: Demo, tmp_path: Path) -> None:
    cohort, undisturbed = demo.copy(tmp_path / "cohort"), demo.copy(tmp_path / "undisturbed")
    for root in (cohort, undisturbed):
        shutil.rmtree(root / "embeddings" / "dino")
    kill_when(lambda: _parts(cohort / "embeddings") >= 3, *_embed(cohort))
    for root in (cohort, undisturbed):
        run = ctc_ray(*_embed(root))
        assert run.code == 0, run.err[-3000:]
    patients = sorted(path.parent.name for path in undisturbed.glob("embeddings/dino/*/_record.json"))
    assert len(patients) == 9
    records = [record(cohort / "embeddings" / "dino" / patient) for patient in patients]
    assert sum(r["units_reused"] for r in records) > 0
    assert sum(r["units_computed"] for r in records) > 0
    for patient in patients:
        mine, whole = (_table(root / "embeddings" / "dino" / patient) for root in (cohort, undisturbed))
        assert mine["cell_id"].equals(whole["cell_id"])
        np.testing.assert_allclose(
            np.stack(mine["embedding"].to_numpy()), np.stack(whole["embedding"].to_numpy()), atol=1e-5
        )


def test_two_new_patients_cost_only_themselves(demo: Demo, tmp_path: Path) -> None:
    cohort, new = demo.copy(tmp_path / "cohort"), tmp_path / "new cartridges"
    ids = ["007", "Müller 3"]
    names = 'phantom.patient_ids=["007", "Müller 3"]'
    assert ctc_ray("phantom", str(new), "--fields", "2", "--seed", "99", "--set", names).code == 0
    before = {
        path: path.read_bytes()
        for path in cohort.rglob("_record.json")
        if "cells" in path.parts or "embeddings" in path.parts
    }
    config = ["--config", str(Path(__file__).resolve().parents[2] / "jobs" / "configs" / "demo.yaml")]
    for command in (
        ["segment", str(cohort), "--cartridges", str(new)],
        ["split", str(cohort)],
        ["embed", str(cohort)],
        ["map", str(cohort)],
        ["train", str(cohort)],
        ["index", str(cohort)],
        ["detect", str(cohort), "--patients", "007,Müller 3"],
        ["compare", str(cohort), "--cellsearch", str(new)],
    ):
        run = ctc_ray(*command, *config)
        assert run.code == 0, f"{command[0]} ended with {run.code}: {run.err[-3000:]}"
        if command[0] in ("segment", "embed", "detect"):
            # A unit is a field for segment, up to 50 cells of a shard for embed (jobs/configs/demo.yaml), a patient for detect.
            shards = [path for patient in ids for path in (cohort / "cells" / patient).glob("part-*.parquet")]
            slices = sum(math.ceil(pl.read_parquet(path, columns=["cell_id"]).height / 50) for path in shards)
            units = {"segment": 4, "embed": slices, "detect": 2}[command[0]]
            assert f"{command[0]}: {units} computed" in run.out, run.out
        if command[0] == "train":
            assert "0 computed" in run.out, run.out
    assert {path: path.read_bytes() for path in before} == before
    for patient in ids:
        assert record(cohort / "cells" / patient)["units_computed"] == 2
        assert (cohort / "latent" / "dino" / "map" / "cells" / patient).is_dir()
        assert (cohort / "detections" / "final" / patient / "candidates.parquet").exists()
    roles = dict(pl.read_parquet(cohort / "patients.parquet").select("patient", "role").iter_rows())
    old = dict(pl.read_parquet(demo.cohort / "patients.parquet").select("patient", "role").iter_rows())
    assert {patient: roles[patient] for patient in old} == old
    assert all(roles[patient] is not None for patient in ids)


def test_bad_fields_are_set_aside_and_the_rest_goes_on(demo: Demo, tmp_path: Path) -> None:
    cartridges, cohort = tmp_path / "cartridges", tmp_path / "cohort"
    shutil.copytree(demo.cartridges / "P01", cartridges / "P01")
    fields = sorted((cartridges / "P01").rglob("*.tif"))
    fields[0].write_bytes(fields[0].read_bytes()[:50_000])
    pages = tifffile.imread(fields[1])
    tifffile.imwrite(fields[1], pages[:3], photometric="minisblack")
    command = ["segment", str(cohort), "--cartridges", str(cartridges), "--set", "segment.max_failure_fraction=0.5"]
    run = ctc_ray(*command)
    assert run.code == 3, (run.out, run.err[-2000:])
    failures = pl.read_parquet(cohort / "failures" / "segment" / "P01.parquet")
    assert failures.columns == ["stage", "unit", "source", "kind", "message"]
    assert {Path(source).name for source in failures["source"]} == {fields[0].name, fields[1].name}
    good = _table(cohort / "cells" / "P01")
    whole = _table(demo.cohort / "cells" / "P01").to_pandas()
    lost = {int(path.stem.rsplit("p", 1)[1]) for path in fields[:2]}
    kept = whole[~whole["field"].isin(lost)]["cell_id"]
    assert good["cell_id"].to_pylist() == sorted(kept)
    strict = ctc_ray(*command[:-2], "--force")
    assert strict.code == 1
    assert "max_failure_fraction" in strict.err
    assert "Traceback" not in strict.err


def test_stale_cohort_is_refused_and_keeps_its_output(demo: Demo, tmp_path: Path) -> None:
    cohort = demo.copy(tmp_path / "cohort")
    command = ["segment", str(cohort), "--cartridges", str(demo.cartridges), "--set", "segment.prob_threshold=0.9"]
    run = ctc_ray(*command)
    assert run.code == 1
    assert "--force" in run.err
    assert "Traceback" not in run.err
    assert _table(cohort / "cells" / "P01").equals(_table(demo.cohort / "cells" / "P01"))
    plan = ctc_ray(*command, "--dry-run")
    assert plan.code == 0
    assert "stale" in plan.out


def test_empty_cartridge_folder_is_one_clear_message(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    run = ctc_ray("segment", str(tmp_path / "cohort"), "--cartridges", str(tmp_path / "nothing"))
    assert run.code == 1
    assert str(tmp_path / "nothing") in run.err
    assert "Traceback" not in run.err


def test_unwritable_output_is_one_clear_message(demo: Demo, tmp_path: Path) -> None:
    (tmp_path / "cohort").write_text("a file where the cohort should be")
    run = ctc_ray("segment", str(tmp_path / "cohort"), "--cartridges", str(demo.cartridges))
    assert run.code == 1
    assert "cannot write" in run.err
    assert "Traceback" not in run.err
    assert (tmp_path / "cohort").read_text() == "a file where the cohort should be"
