"""Candidates like the labelled CTCs: ranking against a plain product, what is left out, diversity, the command."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from ctc_ray.cli import app
from ctc_ray.cohort import Cohort
from ctc_ray.config import IndexConfig, RunConfig
from ctc_ray.errors import ConfigError, LabelError
from ctc_ray.index.retrieval import diversify, likeness, more_like, similarities
from ctc_ray.index.search import CellIndex, cells_in_clusters, similar
from ctc_ray.index.stage import run_index
from ctc_ray.labels.consensus import read_labels
from ctc_ray.labels.transfer import import_labels

CONFIG = RunConfig(index=IndexConfig(num_threads=1))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory, mixture: ModuleType) -> Any:
    """An indexed cohort with a map, six labelled CTCs, ten others and one unsure."""
    folder = tmp_path_factory.mktemp("labelled")
    made = mixture.build_cohort(folder, num_cells=60)
    run_index(CONFIG, made.cohort)
    mixture.write_map(made.cohort, made.kinds)
    with_patient = CellIndex.open(made.cohort, "dino").cells.ids().to_list()
    ctcs = [name for name in with_patient if made.kinds[name] == "ctc"][:6]
    others = [name for name in with_patient if made.kinds[name] != "ctc"][:11]
    labels = ["ctc"] * 6 + ["non_ctc"] * 10 + ["unsure"]
    pl.DataFrame({"cell_id": ctcs + others, "label": labels}).write_csv(folder / "labels.csv")
    import_labels(made.cohort, folder / "labels.csv", reader="expert", source="labels.csv")
    return made


def labelled_ids(cohort: Cohort) -> set[str]:
    tables = [pl.DataFrame(pl.from_arrow(cohort.store.read_table(p))) for p in cohort.store.list_files("labels")]
    return set(pl.concat(tables)["cell_id"])


def test_candidates_are_unlabelled_ctcs_in_the_order_of_their_likeness(labelled: Any) -> None:
    found = more_like(CONFIG, labelled.cohort, k=40)
    labels = labelled_ids(labelled.cohort)
    assert found["rank"].to_list() == list(range(1, 41))
    assert not set(found["cell_id"]) & labels
    assert set(found["query"]) <= labels
    assert np.mean([labelled.kinds[name] == "ctc" for name in found["cell_id"]]) > 0.9
    index = CellIndex.open(labelled.cohort, "dino")
    vectors = index.vectors(np.arange(len(index)))
    ids = index.cells.ids().to_list()
    ctcs = [ids.index(name) for name in labels if labelled.kinds[name] == "ctc"]
    score = np.sort(vectors @ vectors[ctcs].T, axis=1)[:, -3:].mean(axis=1)
    physical = index.cells.physical
    taken = {physical[ids.index(name)] for name in labels}
    best: list[int] = []
    for position in np.argsort(-score, kind="stable"):
        if physical[position] not in taken and len(best) < 40:
            taken.add(physical[position])
            best.append(int(position))
    assert found["cell_id"].to_list() == [ids[i] for i in best]
    np.testing.assert_allclose(found["similarity"], score[best], atol=1e-5)


def test_one_detection_of_a_physical_cell_and_none_of_a_labelled_one(labelled: Any) -> None:
    everything = more_like(CONFIG, labelled.cohort, k=1000)
    index = CellIndex.open(labelled.cohort, "dino")
    numbers = index.cells.physical[index.positions_of(everything["cell_id"].to_list())]
    assert len(np.unique(numbers)) == everything.height
    gone = index.cells.physical[index.positions_of(sorted(labelled_ids(labelled.cohort)))]
    assert not set(numbers.tolist()) & set(gone.tolist())
    assert everything.height == len(np.unique(index.cells.physical)) - len(np.unique(gone))


def test_contrast_subtracts_the_likeness_to_labelled_cells_that_are_no_ctcs(labelled: Any) -> None:
    found = more_like(CONFIG, labelled.cohort, k=1000, contrast=0.7)
    index = CellIndex.open(labelled.cohort, "dino")
    labels = read_labels(labelled.cohort)

    def nearest_three(label: str) -> np.ndarray:
        examples = labels.filter(pl.col("label") == label)["cell_id"].to_list()
        candidates = index.vectors(index.positions_of(found["cell_id"].to_list()))
        cosines = candidates @ index.vectors(index.positions_of(examples)).T
        return np.sort(cosines, axis=1)[:, -3:].mean(axis=1)

    expected = nearest_three("ctc") - 0.7 * nearest_three("non_ctc")
    np.testing.assert_allclose(found["similarity"], expected, atol=1e-5)
    assert (np.diff(expected) <= 1e-5).all()


def test_diversity_spreads_the_candidates(labelled: Any) -> None:
    index = CellIndex.open(labelled.cohort, "dino")

    def alike(diversity: float) -> float:
        found = more_like(CONFIG, labelled.cohort, k=15, diversity=diversity)
        vectors = index.vectors(index.positions_of(found["cell_id"].to_list()))
        return float((vectors @ vectors.T)[np.triu_indices(15, 1)].mean())

    assert alike(0.0) > alike(0.5) > alike(1.0)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 12), st.integers(1, 15), st.floats(0, 1), st.integers(0, 2**31), st.sampled_from(["cosine", "l2"])
)
def test_each_choice_is_the_best_by_marginal_relevance(
    num: int, k: int, diversity: float, seed: int, metric: str
) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(num, 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    relevance = rng.normal(size=num).astype(np.float32)
    chosen = diversify(vectors, relevance, k, diversity, metric).tolist()
    assert len(chosen) == len(set(chosen)) == min(k, num)
    assert chosen[0] == relevance.argmax()
    alike = similarities(vectors, vectors, metric)
    for step in range(1, len(chosen)):
        value = (1 - diversity) * relevance - diversity * alike[:, chosen[:step]].max(axis=1)
        free = [i for i in range(num) if i not in chosen[:step]]
        assert value[chosen[step]] >= max(value[i] for i in free) - 1e-4


def test_likeness_is_the_mean_of_the_three_nearest() -> None:
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(9, 3)).astype(np.float32), rng.normal(size=(5, 3)).astype(np.float32)
    distances = -np.linalg.norm(left[:, None] - right[None], axis=2)
    mean, nearest = likeness(left, right, "l2")
    np.testing.assert_allclose(mean, np.sort(distances, axis=1)[:, -3:].mean(axis=1), atol=1e-5)
    np.testing.assert_array_equal(nearest, distances.argmax(axis=1))
    np.testing.assert_allclose(likeness(left, right[:1], "l2")[0], distances[:, 0], atol=1e-5)


def test_clusters_narrow_both_searches(labelled: Any, mixture: ModuleType) -> None:
    members = {name for name, kind in labelled.kinds.items() if kind == mixture.KINDS[1]}
    assert set(cells_in_clusters(labelled.cohort, "dino", "map", [1])) == members
    query = next(iter(labelled.kinds))
    near = similar(CONFIG, labelled.cohort, [query], k=20, clusters=[1])
    assert near.height == 20
    assert set(near["cell_id"]) <= members
    both = similar(CONFIG, labelled.cohort, [query], k=20, clusters=[1, -1], patients=["P4"])
    assert set(both["patient"]) == {"P4"}
    assert set(more_like(CONFIG, labelled.cohort, k=5, clusters=[1])["cell_id"]) <= members
    with pytest.raises(ConfigError, match="no cells in cluster 7; it has -1, 0, 1, 2"):
        similar(CONFIG, labelled.cohort, [query], k=3, clusters=[7])


def test_examples_can_be_named_and_wrong_requests_are_refused(
    labelled: Any, mixture: ModuleType, tmp_path: Path
) -> None:
    smear = [name for name, kind in labelled.kinds.items() if kind == "smear"][:3]
    found = more_like(CONFIG, labelled.cohort, smear, k=10)
    assert np.mean([labelled.kinds[name] == "smear" for name in found["cell_id"]]) > 0.8
    assert not set(found["cell_id"]) & set(smear)
    with pytest.raises(ConfigError, match="diversity = 2"):
        more_like(CONFIG, labelled.cohort, k=5, diversity=2)
    bare = mixture.build_cohort(tmp_path, roles={"007": "train"}, num_cells=20)
    run_index(CONFIG, bare.cohort)
    with pytest.raises(LabelError, match="labelled ctc"):
        more_like(CONFIG, bare.cohort, k=5)


def test_command_lists_neighbours_or_candidates(labelled: Any) -> None:
    uri = str(labelled.cohort.store.local_path())
    query = next(iter(labelled.kinds))

    def rows(*arguments: str) -> list[dict[str, Any]]:
        done = CliRunner().invoke(app, ["similar", uri, *arguments, "--json"])
        assert done.exit_code == 0, done.output
        found: list[dict[str, Any]] = json.loads(done.stdout)
        return found

    assert [row["query"] for row in rows(query, "-k", "3")] == [query] * 3
    candidates = rows("--unlabelled", "-k", "4", "--diversity", "0.2", "--contrast", "0.5", "--clusters", "0,1")
    assert [row["rank"] for row in candidates] == [1, 2, 3, 4]
    assert {row["patient"] for row in rows(query, "-k", "2", "--patients", "P4,P5")} <= {"P4", "P5"}
    twin = labelled.cohort.read_columns("cells/007", ["cell_id"])["cell_id"].to_pylist()[-2:]
    assert rows(twin[0], "-k", "1", "--same-cell")[0]["cell_id"] == twin[1]
    for wrong in ([], [query, "--clusters", "a"]):
        assert isinstance(CliRunner().invoke(app, ["similar", uri, *wrong]).exception, ConfigError)
