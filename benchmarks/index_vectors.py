"""Vectors of any number for the benchmark of the index, and a cohort that holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ctc_ray.cohort import Cohort
from ctc_ray.index.build import faiss_threads, new_index, prepared
from ctc_ray.records import Record, publish
from ctc_ray.schema import DUPLICATES_SCHEMA, embeddings_schema

Float32 = npt.NDArray[np.float32]
PATIENTS = 90
ENCODER = "dino"
SEED = 20_261
BASE_CROPS = 22_000
QUERY_CROPS = 2_000

Draw = Callable[[int, int, np.random.Generator], Float32]
"""Vectors (number, D) of a patient (0 to 89)."""


def phantom_embeddings(path: Path | None) -> tuple[Float32, npt.NDArray[np.str_], Float32]:
    """Embeddings (N, D) of phantom crops by the shipped encoder, their kinds (N,), and embeddings of further crops."""
    if path is None or not path.exists():
        from ctc_ray.embed import Embedder
        from ctc_ray.phantom import PROFILES
        from ctc_ray.phantom.crops import draw_crops

        crops, kinds = draw_crops(BASE_CROPS + QUERY_CROPS, seed=SEED, profile=PROFILES["paper"])
        vectors = Embedder.load(precision="fp32")(crops)
        if path is None:
            return vectors[:BASE_CROPS], kinds[:BASE_CROPS], vectors[BASE_CROPS:]
        np.savez(path, vectors=vectors, kinds=kinds)
    with np.load(path) as stored:
        return stored["vectors"][:BASE_CROPS], stored["kinds"][:BASE_CROPS], stored["vectors"][BASE_CROPS:]


def draw_from(base_ND: Float32) -> Draw:
    """Walk from known vectors towards their neighbours; each patient has vectors of its own, as patients have cells."""
    near = np.empty((len(base_ND), 10), np.int64)
    with faiss_threads(1):
        for patient in range(PATIENTS):
            own = np.arange(patient, len(base_ND), PATIENTS)
            index = new_index(base_ND.shape[1], "l2")
            index.add(base_ND[own])
            near[own] = own[index.search(base_ND[own], 11)[1][:, 1:]]

    def draw(num: int, patient: int, rng: np.random.Generator) -> Float32:
        start = rng.choice(np.arange(patient % PATIENTS, len(base_ND), PATIENTS), num)
        step = base_ND[near[start, rng.integers(0, 10, num)]] - base_ND[start]
        scale = 0.1 * np.linalg.norm(step, axis=1, keepdims=True) / base_ND.shape[1] ** 0.5
        noise = rng.standard_normal(step.shape, np.float32) * scale
        return (base_ND[start] + rng.random((num, 1), np.float32) * step + noise).astype(np.float32)

    return draw


def mixture(width: int, components: int = 500, dimensions: int = 16) -> Draw:
    """Clouds of few dimensions, each turned its own way."""
    rng = np.random.default_rng(SEED)
    centres = rng.standard_normal((components, width)).astype(np.float32)
    axes = rng.standard_normal((components, dimensions, width)).astype(np.float32) / dimensions**0.5

    def draw(num: int, _patient: int, rng: np.random.Generator) -> Float32:
        code = np.sort(rng.integers(0, components, num))
        vectors = centres[code] + 0.05 * rng.standard_normal((num, width), np.float32)
        for number in np.unique(code):
            own = code == number
            vectors[own] += rng.standard_normal((int(own.sum()), dimensions), np.float32) @ axes[number] * 0.5
        return vectors[rng.permutation(num)].astype(np.float32)

    return draw


def write_cohort(cohort: Cohort, draw: Draw, num_cells: int) -> None:
    """A cohort of as many patients as the paper's, with what the index stage reads."""
    names = [f"P{number:02d}" for number in range(PATIENTS)]
    cohort.add_patients(dict.fromkeys(names, "made"))
    for number, (name, part) in enumerate(zip(names, np.array_split(np.arange(num_cells), PATIENTS), strict=True)):
        write_patient(cohort, name, part, draw(len(part), number, np.random.default_rng([SEED, number])))


def write_patient(cohort: Cohort, patient: str, numbers: npt.NDArray[np.int64], vectors: Float32) -> None:
    """Cells, duplicates and embeddings of one patient; the ids are the numbers of its cells."""
    ids, width = [f"{number:024x}" for number in numbers], vectors.shape[1]
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), width)
    columns = {"cell_id": ids, "patient": [patient] * len(ids), "embedding": embedding}
    table = pa.table(columns, schema=embeddings_schema(width))
    place = np.arange(len(ids)).astype(np.float32)
    cells = pa.table({"cell_id": ids, "field": np.ones(len(ids), np.int16), "row": place, "col": place})
    own = pa.table({"cell_id": ids, "physical_id": ids}, schema=DUPLICATES_SCHEMA)
    store = cohort.store
    publish(store, cohort.cells(patient), {"part-000.parquet": cells}, Record("segment", patient, "1", {}, {}))
    store.write_table(cohort.duplicates_path(patient), own, row_group_size=65_536)
    record = Record("embed", patient, "1", {}, {})
    publish(store, cohort.embeddings(ENCODER, patient), {"part-000.parquet": table}, record)


def all_vectors(cohort: Cohort) -> Iterator[Float32]:
    """Unit vectors (., D) of a cohort, shard after shard."""
    from ctc_ray.latent.embeddings import iterate_shards

    for patient in cohort.patient_ids():
        for _, _, vectors in iterate_shards(cohort, ENCODER, patient):
            yield prepared(vectors, "cosine", patient)
