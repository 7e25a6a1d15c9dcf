"""Inverted lists written part by part, against an index that FAISS fills itself, and the choice of probes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from ctc_ray.errors import SchemaError
from ctc_ray.index.assemble import prefer_graph, spans_of
from ctc_ray.index.build import faiss_threads, load_faiss, new_index, open_mapped, prepared, vectors_at
from ctc_ray.index.lists import (
    FormerLists,
    ListSource,
    MappedPart,
    centroids_of,
    lists_around,
    num_lists_for,
    sort_into_lists,
    train_lists,
    write_lists,
)
from ctc_ray.index.search import CellIndex
from ctc_ray.index.tune import LENGTHS, _exact, foreign_questions, recall_of, tune


def clouds(num: int, seed: int = 0, width: int = 8) -> np.ndarray[Any, np.dtype[np.float32]]:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(7).normal(0, 3, (12, width))
    return prepared(centres[rng.integers(0, 12, num)] + rng.normal(0, 1, (num, width)), "cosine", "test")


def parts_of(empty: Any, shards: list[np.ndarray], folder: Path, first: int = 0) -> list[ListSource]:
    sources: list[ListSource] = []
    for number, shard in enumerate(shards):
        path = folder / f"{first}-{number}.safetensors"
        save_file(sort_into_lists(empty, shard).arrays(), path)
        sources.append(MappedPart(path, first))
        first += len(shard)
    return sources


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_file_written_by_parts_answers_as_an_index_that_faiss_filled(tmp_path: Path, metric: Any) -> None:
    vectors, queries = clouds(900), clouds(30, seed=3)
    with faiss_threads(1) as faiss:
        empty = train_lists(vectors, 20, metric)
        sources = parts_of(empty, [vectors[:300], vectors[300:310], vectors[310:]], tmp_path)
        size = write_lists(empty, sources, tmp_path / "index.faiss", num_probes=3)
        ours = open_mapped(str(tmp_path / "index.faiss"))
        theirs = lists_around(centroids_of(ours), metric)
        theirs.add(vectors)
        theirs.nprobe = 3
        for got, expected in zip(ours.search(queries, 7), theirs.search(queries, 7), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-6)
        faiss.write_index(theirs, str(tmp_path / "theirs.faiss"))
    assert (ours.ntotal, ours.nprobe) == (900, 3)
    assert size == (tmp_path / "index.faiss").stat().st_size
    np.testing.assert_array_equal(vectors_at(ours, np.array([899, 0, 305])), vectors[[899, 0, 305]])
    # The file differs from FAISS's own only by the direct map: 8 bytes a vector.
    assert size - (tmp_path / "theirs.faiss").stat().st_size == 8 * 900


def test_extended_lists_equal_lists_written_at_once(tmp_path: Path) -> None:
    vectors = clouds(400)
    with faiss_threads(1):
        empty = train_lists(vectors, 9, "cosine")
        write_lists(empty, parts_of(empty, [vectors[:250]], tmp_path), tmp_path / "former.faiss")
        former = open_mapped(str(tmp_path / "former.faiss"))
        again = lists_around(centroids_of(former), "cosine")
        new = parts_of(again, [vectors[250:]], tmp_path, first=250)
        write_lists(again, [FormerLists(former), *new], tmp_path / "extended.faiss")
        once = lists_around(centroids_of(former), "cosine")
        write_lists(once, parts_of(once, [vectors], tmp_path), tmp_path / "once.faiss")
    assert (tmp_path / "extended.faiss").read_bytes() == (tmp_path / "once.faiss").read_bytes()


def test_parts_that_leave_a_position_empty_are_refused(tmp_path: Path) -> None:
    vectors = clouds(50)
    with faiss_threads(1):
        empty = train_lists(vectors, 4, "cosine")
        parts = parts_of(empty, [vectors[:20]], tmp_path) + parts_of(empty, [vectors[20:40]], tmp_path, first=0)
        with pytest.raises(SchemaError, match="positions 0 to 39"):
            write_lists(empty, parts, tmp_path / "index.faiss")


def test_lists_are_trained_on_few_vectors_and_refused_on_none() -> None:
    with faiss_threads(1):
        assert train_lists(clouds(3), 64, "cosine").nlist == 3
        same = [centroids_of(train_lists(clouds(200), 8, "l2", seed=seed)) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(same[0], same[1])
    assert not np.array_equal(same[0], same[2])
    with pytest.raises(SchemaError, match="no vectors"):
        train_lists(np.empty((0, 4), np.float32), 8, "cosine")
    assert [num_lists_for(n) for n in (0, 1, 60_000, 1_300_000)] == [2, 2, 512, 2048]


def test_probes_reach_the_target_on_queries_that_were_not_tuned_on(tmp_path: Path) -> None:
    vectors = clouds(4000, width=16)
    with faiss_threads(1):
        empty = train_lists(vectors[:2000], 64, "cosine")
        write_lists(empty, parts_of(empty, [vectors], tmp_path), tmp_path / "index.faiss")
        index = open_mapped(str(tmp_path / "index.faiss"))
        measured = tune(index, 0.97, num_queries=200)
        flat = new_index(16, "cosine")
        flat.add(vectors)
        queries = clouds(200, seed=11, width=16)
        index.nprobe = measured["depth"]
        recall = recall_of(index.search(queries, 10)[0], flat.search(queries, 10)[0]).mean()
        index.nprobe = max(1, measured["depth"] // 4)
        less = recall_of(index.search(queries, 10)[0], flat.search(queries, 10)[0]).mean()
    assert 1 < measured["depth"] < 64
    assert measured["lower_bound"] >= 0.97
    assert recall >= 0.96 > less
    assert 64 < measured["compared"] < 4064
    for nearest in LENGTHS:
        recalls = [trial["recall"] for trial in measured["trials"] if trial["nearest"] == nearest]
        assert recalls == sorted(recalls)


def test_longer_answers_get_the_depth_that_they_were_measured_to_need(tmp_path: Path) -> None:
    vectors, queries = clouds(4000, width=4), clouds(100, seed=11, width=4)
    with faiss_threads(1):
        empty = train_lists(vectors[:2000], 256, "cosine")  # few vectors a list, so that fifty neighbours lie in many
        write_lists(empty, parts_of(empty, [vectors], tmp_path), tmp_path / "index.faiss")
        index = open_mapped(str(tmp_path / "index.faiss"))
        measured = tune(index, 0.95, num_queries=200)
        flat = new_index(4, "cosine")
        flat.add(vectors)
    depths = {int(length): depth for length, depth in measured["depths"].items()}
    assert list(depths) == list(LENGTHS)
    assert depths[10] == measured["depth"] < depths[50] < depths[200]
    cells = pl.DataFrame(
        {
            "cell_id": [f"{i:04d}" for i in range(4000)],
            "patient": "p",
            "physical_id": [f"{i:04d}" for i in range(4000)],
            "field": pl.Series(np.ones(4000, np.int16)),
            "row": pl.Series(np.zeros(4000, np.float32)),
            "col": pl.Series(np.zeros(4000, np.float32)),
        }
    )
    opened = CellIndex(index, cells, "cosine", num_threads=1, depths=depths)
    for k in (10, 50, 200, 400):
        _, found = opened.nearest(queries, k)
        exact = flat.search(queries, k)[0]
        assert recall_of(found, exact).mean() >= 0.94, k


def test_cells_of_new_patients_are_found_too_where_each_patient_looks_its_own_way(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    centres = np.repeat(rng.normal(0, 1, (24, 8)), 150, axis=0)
    vectors = prepared(centres + rng.normal(0, 0.4, (3600, 8)), "cosine", "test")
    spans = [(first, first + 150) for first in range(0, 3600, 150)]
    with faiss_threads(1):
        empty = train_lists(vectors, 128, "cosine")
        write_lists(empty, parts_of(empty, [vectors], tmp_path), tmp_path / "index.faiss")
        index = open_mapped(str(tmp_path / "index.faiss"))
        alone = tune(index, 0.97, num_queries=160)
        measured = tune(index, 0.97, spans=spans, num_queries=160)
    assert alone["recall_of_new_patients"] is None
    assert measured["depth"] > alone["depth"]
    assert measured["recall_of_new_patients"] >= measured["lower_bound"] >= 0.97
    questions = foreign_questions(index, 160, spans, np.random.default_rng(0))
    assert questions is not None
    assert len(questions.spans) == 16
    for rows, span in questions.spans:
        assert span in spans
        found = [(vectors[span[0] : span[1]] == vector).all(axis=1).any() for vector in questions.vectors[rows]]
        assert found == [True] * 10
        others = np.delete(vectors, np.arange(*span), axis=0)
        expected = -np.sort(-(questions.vectors[rows] @ others.T), axis=1)[:, :10]
        np.testing.assert_allclose(_exact(index, questions, 10)[rows], expected, atol=1e-6)


def test_one_patient_alone_cannot_be_left_out() -> None:
    with faiss_threads(1):
        index = lists_around(clouds(4), "cosine")
        index.add(clouds(300))
    assert foreign_questions(index, 16, [(0, 300)], np.random.default_rng(0)) is None


def test_patients_lie_in_spans_of_positions() -> None:
    def spans(names: list[str]) -> list[tuple[int, int]]:
        return spans_of(pa.table({"patient": pa.array(names, pa.string())}))

    assert spans(["b", "b", "a", "c", "c"]) == [(0, 2), (2, 3), (3, 5)]
    assert spans([]) == []


def test_few_queries_are_searched_by_one_thread() -> None:
    """Threads without a query of their own would spin, and on a busy machine hold the answer up."""
    faiss, seen = load_faiss(), []

    class Watching(faiss.IndexFlatIP):  # type: ignore[misc]
        def search(self, *arguments: Any, **options: Any) -> Any:
            seen.append(faiss.omp_get_max_threads())
            return super().search(*arguments, **options)

    watched = Watching(8)
    watched.add(clouds(40))
    ids = [str(i) for i in range(40)]
    places = {"field": [1] * 40, "row": [0.0] * 40, "col": [0.0] * 40}
    cells = pl.DataFrame({"cell_id": ids, "patient": "p", "physical_id": ids, **places})
    index = CellIndex(watched, cells, "cosine", num_threads=2)
    for num in (1, 31, 32, 40):
        index.nearest(clouds(num, seed=1), 3)
    assert seen == [1, 1, 2, 2]


def test_graph_is_measured_against_its_own_vectors() -> None:
    with faiss_threads(1):
        graph = new_index(8, "cosine", "hnsw")
        graph.add(clouds(600))
        measured = tune(graph, 0.95, num_queries=100)
    assert measured["recall_at_10"] >= 0.95
    assert 10 < measured["compared"] <= 600


def test_graph_is_preferred_only_where_it_does_less_and_misses_no_more() -> None:
    lists = {"lower_bound": 0.99, "compared": 1000.0}
    assert prefer_graph(lists, {"lower_bound": 0.99, "compared": 200.0}, target=0.99)
    assert not prefer_graph(lists, {"lower_bound": 0.99, "compared": 300.0}, target=0.99)
    assert not prefer_graph(lists, {"lower_bound": 0.97, "compared": 200.0}, target=0.99)
    assert prefer_graph({**lists, "lower_bound": 0.9}, {"lower_bound": 0.97, "compared": 200.0}, target=0.99)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(0, 12), st.integers(0, 2**31))
def test_recall_counts_found_among_exact(num_exact: int, num_found: int, seed: int) -> None:
    num_found = min(num_found, num_exact)
    scores = -np.sort(-np.random.default_rng(seed).permutation(100)[: num_exact + 5]).astype(np.float32)
    found = np.concatenate([scores[:num_found], scores[num_exact : num_exact + (num_exact - num_found)]])
    found = np.pad(found, (0, num_exact - len(found)), constant_values=-np.inf)
    assert recall_of(found[None], scores[None, :num_exact])[0] == pytest.approx(num_found / num_exact)
