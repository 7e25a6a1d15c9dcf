"""The simulated expert: matching to the truth, the draw, and its batches."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctc_ray.config import LabelsConfig, RunConfig
from ctc_ray.errors import LabelError, MissingInputError, StaleOutputError
from ctc_ray.labels.consensus import read_labels
from ctc_ray.labels.crops import digest_crops, read_crops
from ctc_ray.labels.events import crop_digest, read_events
from ctc_ray.labels.labeller import SimulatedExpert
from ctc_ray.labels.simulated import plan_simulate_expert, simulate_expert, simulated_expert
from ctc_ray.labels.truth import draw_cells, label_of_kind, match_points, true_labels
from ctc_ray.records import State

CONFIG = RunConfig(labels=LabelsConfig(per_patient=40))


def slow_match(points: np.ndarray, others: np.ndarray, radius: float) -> list[int]:
    """All pairs, nearest first, each point and each other once."""
    pairs = sorted((float(np.hypot(*(p - o))), i, j) for i, p in enumerate(points) for j, o in enumerate(others))
    found, taken = [-1] * len(points), set()
    for distance, i, j in pairs:
        if distance <= radius and found[i] < 0 and j not in taken:
            found[i] = j
            taken.add(j)
    return found


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(0, 15), m=st.integers(0, 15))
def test_matching_agrees_with_all_pairs(seed: int, n: int, m: int) -> None:
    rng = np.random.default_rng(seed)
    points, others = rng.uniform(0, 40, (n, 2)), rng.uniform(0, 40, (m, 2))
    assert match_points(points, others, 12.0).tolist() == slow_match(points, others, 12.0)


def test_true_label_needs_the_same_field_and_a_near_point() -> None:
    cells = pl.DataFrame({"cell_id": ["a", "b", "c"], "field": [1, 1, 2], "row": [10.0, 50.0, 10.0], "col": [10.0] * 3})
    truth = pl.DataFrame({"field": [1, 1], "row": [12.0, 70.0], "col": [10.0, 10.0], "kind": ["ctc", "smear"]})
    found = true_labels(cells, truth, 12.0)
    assert found.select("cell_id", "kind", "label").rows() == [
        ("a", "ctc", "ctc"),
        ("b", None, "non_ctc"),
        ("c", None, "non_ctc"),
    ]


@pytest.mark.parametrize(
    ("kind", "label"),
    [("ctc_in_dense_dapi", "ctc"), ("smear", "artefact"), ("debris", "artefact"), ("leukocyte", "non_ctc")],
)
def test_label_of_each_kind_of_object(kind: str, label: str) -> None:
    assert label_of_kind(kind) == label


def test_label_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(LabelError, match="unknown kind 'yeast'"):
        label_of_kind("yeast")


def test_draw_is_balanced_seeded_and_blind_to_row_order() -> None:
    cells = pl.DataFrame({"cell_id": [f"c{i}" for i in range(300)], "label": ["ctc"] * 80 + ["non_ctc"] * 220})
    drawn = draw_cells(cells, per_patient=100, balanced=True, seed=1)
    assert drawn["label"].value_counts(sort=True).get_column("count").to_list() == [50, 50]
    assert drawn.equals(draw_cells(cells.reverse(), per_patient=100, balanced=True, seed=1))
    assert not drawn.equals(draw_cells(cells, per_patient=100, balanced=True, seed=2))
    assert draw_cells(cells.filter(pl.col("label") != "ctc"), per_patient=100, balanced=True, seed=1).height == 20
    assert draw_cells(cells, per_patient=100, balanced=False, seed=1).height == 100


def test_simulated_expert_flips_the_asked_share_and_answers_alike_each_time() -> None:
    truth = {f"c{i}": "ctc" if i % 2 else "artefact" for i in range(2000)}
    expert = SimulatedExpert(truth, error_rate=0.1, seed=4)
    answers = expert.label(list(truth))
    flipped = [answer != truth[name] for name, answer in zip(truth, answers, strict=True)]
    assert 0.07 < np.mean(flipped) < 0.13
    assert set(answers) == {"ctc", "artefact", "non_ctc"}
    assert expert.label(["c7"]) == [answers[7]]
    assert SimulatedExpert(truth).label(list(truth)) == list(truth.values())
    with pytest.raises(LabelError, match="no truth for 1 of 1"):
        expert.label(["stranger"])


def test_simulate_expert_labels_the_roles_from_the_truth(tmp_path: Path, mixture: ModuleType) -> None:
    made = mixture.build_cohort(tmp_path, num_cells=80)
    result = simulate_expert(CONFIG, made.cohort, str(made.truth_path))
    labels = read_labels(made.cohort)
    assert (result.units_computed, result.units_reused) == (4, 0)
    assert set(labels["patient"]) == {"007", "12", "Müller 3", "P4"}
    assert all(
        label_of_kind(made.kinds[name]) == label for name, label in labels.select("cell_id", "label").iter_rows()
    )
    assert labels.group_by("patient").len()["len"].max() <= 40
    events = read_events(made.cohort)
    assert set(events["strategy"]) == {"initial"}
    assert set(events["seconds"]) == {3.0}


def test_simulate_expert_again_reuses_and_with_other_settings_needs_force(tmp_path: Path, mixture: ModuleType) -> None:
    made = mixture.build_cohort(tmp_path, num_cells=60)
    simulate_expert(CONFIG, made.cohort, str(made.truth_path))
    before = {path: made.cohort.store.read_bytes(path) for path in made.cohort.store.list_files("labels")}
    assert simulate_expert(CONFIG, made.cohort, str(made.truth_path)).units_reused == 4
    other = RunConfig(labels=LabelsConfig(per_patient=40, seed=7))
    assert {row.state for row in plan_simulate_expert(other, made.cohort, str(made.truth_path))} == {State.STALE}
    with pytest.raises(StaleOutputError, match="--force"):
        simulate_expert(other, made.cohort, str(made.truth_path))
    assert simulate_expert(other, made.cohort, str(made.truth_path), force=True).units_computed == 4
    simulate_expert(CONFIG, made.cohort, str(made.truth_path), force=True)
    assert {path: made.cohort.store.read_bytes(path) for path in made.cohort.store.list_files("labels")} == before


def test_simulate_expert_without_roles_or_truth_says_what_to_do(tmp_path: Path, mixture: ModuleType) -> None:
    made = mixture.build_cohort(tmp_path, roles={"P5": "final"}, num_cells=20)
    with pytest.raises(MissingInputError, match="ctc-ray split"):
        simulate_expert(CONFIG, made.cohort, str(made.truth_path))
    with pytest.raises(MissingInputError, match="does not exist"):
        simulate_expert(CONFIG, made.cohort, str(tmp_path / "none.parquet"))


def test_simulated_expert_of_a_cohort_knows_every_cell_of_its_patients(tmp_path: Path, mixture: ModuleType) -> None:
    made = mixture.build_cohort(tmp_path, roles={"007": "train", "P5": "final"}, num_cells=30)
    expert = simulated_expert(LabelsConfig(), made.cohort, str(made.truth_path), ["P5"])
    cells = made.cohort.read_columns("cells/P5", ["cell_id"])["cell_id"].to_pylist()
    assert len(expert) == 30
    assert expert.label(cells) == [label_of_kind(made.kinds[name]) for name in cells]


def test_crops_are_read_by_id_and_digested_as_stored(tmp_path: Path, mixture: ModuleType) -> None:
    made = mixture.build_cohort(tmp_path, roles={"007": "train"}, num_cells=30)
    store, shards = made.cohort.store, made.cohort.shards("cells/007")
    ids = made.cohort.read_columns("cells/007", ["cell_id"])["cell_id"].to_pylist()
    names, crops = read_crops(store, shards, [ids[20], ids[2]])
    raw = made.cohort.read_columns("cells/007", ["pixels"])["pixels"]
    assert names == [ids[2], ids[20]]
    assert crops[1].tobytes() == raw[20].as_py()
    assert digest_crops(store, shards, [ids[2]]) == {ids[2]: crop_digest(raw[2].as_py())}
    with pytest.raises(LabelError, match="stranger"):
        digest_crops(store, shards, ["stranger"])


@pytest.mark.ray
def test_simulate_expert_in_ray_equals_one_process(tmp_path: Path, mixture: ModuleType, ray_cluster: None) -> None:
    made = mixture.build_cohort(tmp_path, num_cells=40)
    simulate_expert(CONFIG, made.cohort, str(made.truth_path))
    events = read_events(made.cohort)
    import ray

    assert ray.is_initialized()
    cells = made.cohort.read_columns("cells/12", ["cell_id"])["cell_id"].to_pylist()
    crops = digest_crops(made.cohort.store, made.cohort.shards("cells/12"), cells)
    twelve = events.filter(pl.col("patient") == "12")
    assert twelve.height > 0
    assert all(crops[name] == sha for name, sha in twelve.select("cell_id", "crop_sha").iter_rows())
