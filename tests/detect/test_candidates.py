from __future__ import annotations

from types import ModuleType

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctc_ray.detect.candidates import embedding_matrix, join_cells, score_shards, select_candidates
from ctc_ray.errors import SchemaError
from ctc_ray.schema import CANDIDATES_SCHEMA, embeddings_schema


def _cells(probability: list[float], physical: list[int]) -> pl.DataFrame:
    n = len(probability)
    return pl.DataFrame(
        {
            "cell_id": [f"c{i:02d}" for i in range(n)],
            "patient": ["007"] * n,
            "field": pl.Series([1] * n, dtype=pl.Int16),
            **{name: pl.Series([float(i) for i in range(n)], dtype=pl.Float32) for name in ("row", "col")},
            **{name: pl.Series([0.0] * n, dtype=pl.Float32) for name in ("global_row", "global_col", "diameter_um")},
            "probability": pl.Series(probability, dtype=pl.Float32),
            "cluster": pl.Series([0] * n, dtype=pl.Int16),
            "physical_id": [f"p{i}" for i in physical],
        }
    )


def _shard(ids: list[str], vectors: list[list[float]]) -> pa.Table:
    flat = pa.FixedSizeListArray.from_arrays(pa.array(np.asarray(vectors, np.float32).ravel()), len(vectors[0]))
    return pa.table({"cell_id": ids, "patient": ["p"] * len(ids), "embedding": flat}).cast(
        embeddings_schema(len(vectors[0]))
    )


def test_select_candidates_duplicate_detections_keeps_the_most_probable() -> None:
    found = select_candidates(_cells([0.6, 0.9, 0.2, 0.7], [0, 0, 0, 1]), 0.5)
    assert found["cell_id"].to_list() == ["c01", "c03"]
    assert found["num_detections"].to_list() == [3, 1]
    assert found.columns == CANDIDATES_SCHEMA.names


def test_select_candidates_equal_probabilities_takes_the_smaller_id() -> None:
    found = select_candidates(_cells([0.8, 0.8], [0, 0]), 0.5)
    assert found["cell_id"].to_list() == ["c00"]


def test_select_candidates_at_the_threshold_is_a_candidate() -> None:
    assert select_candidates(_cells([0.5, 0.499999], [0, 1]), 0.5)["cell_id"].to_list() == ["c00"]


@settings(max_examples=30, deadline=None)
@given(
    data=st.lists(st.tuples(st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.9]), st.integers(0, 5)), min_size=1, max_size=20),
    threshold=st.sampled_from([0.0, 0.3, 0.5, 0.8]),
    seed=st.integers(0, 3),
)
def test_select_candidates_any_cells_agrees_with_a_plain_loop(
    data: list[tuple[float, int]], threshold: float, seed: int
) -> None:
    cells = _cells([p for p, _ in data], [i for _, i in data])
    expected: dict[str, tuple[float, str]] = {}
    for row in cells.iter_rows(named=True):
        key = (-row["probability"], row["cell_id"])
        if row["probability"] >= float(np.float32(threshold)) and key < expected.get(row["physical_id"], (0.0, "~")):
            expected[row["physical_id"]] = key
    found = select_candidates(cells.sample(fraction=1, shuffle=True, seed=seed), threshold)
    assert set(found["cell_id"]) == {name for _, name in expected.values()}
    assert found["physical_id"].n_unique() == found.height
    assert found["num_detections"].sum() <= cells.height
    assert found["probability"].is_sorted(descending=True)


def test_score_shards_several_shards_scores_each_cell_once(faked: ModuleType) -> None:
    shards = [("a", _shard(["x", "y"], [[0.0, 1.0], [5.0, 1.0]])), ("b", _shard(["z"], [[-5.0, 1.0]]))]
    scores = score_shards(faked.FirstValueClassifier(), shards)
    assert scores["cell_id"].to_list() == ["x", "y", "z"]
    np.testing.assert_allclose(scores["probability"], [0.5, 1 / (1 + np.exp(-10)), 1 / (1 + np.exp(10))], rtol=1e-5)


def test_score_shards_repeated_cell_is_refused(faked: ModuleType) -> None:
    shard = _shard(["x"], [[0.0, 1.0]])
    with pytest.raises(SchemaError, match="twice"):
        score_shards(faked.FirstValueClassifier(), [("a", shard), ("b", shard)])


def test_score_shards_no_cells_gives_an_empty_frame(faked: ModuleType) -> None:
    assert score_shards(faked.FirstValueClassifier(), []).columns == ["cell_id", "probability"]


def test_embedding_matrix_sliced_table_reads_its_own_rows() -> None:
    table = _shard(["x", "y", "z"], [[1, 2], [3, 4], [5, 6]]).slice(1)
    np.testing.assert_array_equal(embedding_matrix(table, "t"), [[3, 4], [5, 6]])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_embedding_matrix_value_not_finite_is_refused(value: float) -> None:
    with pytest.raises(SchemaError, match="not finite"):
        embedding_matrix(_shard(["x"], [[value, 0.0]]), "shard 3")


def test_join_cells_cell_without_embedding_names_the_stage_to_run() -> None:
    positions = pl.DataFrame({"cell_id": ["a", "b"]})
    full = pl.DataFrame({"cell_id": ["a", "b"], "cluster": [0, 1], "physical_id": ["a", "b"]})
    with pytest.raises(SchemaError, match=r"1 of 2 cells have no probability.*ctc-ray embed"):
        join_cells(positions, pl.DataFrame({"cell_id": ["a"], "probability": [0.5]}), full, full, "007")
