"""The latent map's profiles side by side: agreement, trustworthiness, seconds of fit, cells placed a second.

    python -m benchmarks.latent_map --cells 20000 [--labelled 2638] [--new 3000] [--base FILE] [--vary] [--ray CELLS]

Embeddings of phantom crops (demo profile) by the shipped encoder. The first `--cells` are a training patient, of which
`--labelled` have a label (0: none, so that UMAP is fitted on all of them, as where nobody has labelled yet); the next `--new`
are a patient that no map has seen. Each profile is fitted by the stage's own code on one thread and places the new cells;
`paper` is fitted a second time with another UMAP seed, which says how far two maps differ that mean the same. `--vary` fits
what lies between the profiles too. `--ray` runs the stage's placing of that many further cells (drawn around the known ones)
in one patient, on two Ray CPUs. Seconds are of the processor, but where it says wall. Adds its result to
`benchmarks/results/latent_map.json`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
from threadpoolctl import threadpool_limits

from benchmarks.segment_accuracy import hardware
from ctc_ray.cluster import connect
from ctc_ray.cohort import Cohort
from ctc_ray.config import MapConfig, RayConfig, RunConfig
from ctc_ray.latent.agreement import SharedCells, summarise_agreement, trustworthiness
from ctc_ray.latent.fit import fit_map
from ctc_ray.latent.model import LatentMap
from ctc_ray.latent.stage import plan_fit, run_map
from ctc_ray.records import Record, library_versions, publish
from ctc_ray.schema import embeddings_schema

Float32 = npt.NDArray[np.float32]
RESULTS = Path(__file__).parent / "results" / "latent_map.json"
ENCODER = "dino"
SEED = 20_261
TRAIN, NEW, LARGE = "train", "new", "large"
_SHARD_CELLS = 5_000


@dataclass(frozen=True)
class Fitted:
    """One map and what it took."""

    latent_map: LatentMap
    fit_s: float
    fit_cpu_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--labelled", type=int, default=2_638, help="as many as in the paper; 0: nothing is labelled")
    parser.add_argument("--new", type=int, default=3_000)
    parser.add_argument("--base", type=Path, help="file that keeps the embeddings between runs")
    parser.add_argument("--vary", action="store_true")
    parser.add_argument("--ray", type=int, default=0, metavar="CELLS")
    options = parser.parse_args()
    vectors, kinds = phantom_embeddings(options.cells + options.new, options.base)
    with tempfile.TemporaryDirectory() as folder:
        cohort = Cohort.open(str(Path(folder) / "cohort"), create=True)
        write_patient(cohort, TRAIN, vectors[: options.cells], 0)
        write_patient(cohort, NEW, vectors[options.cells :], options.cells)
        with threadpool_limits(1):
            faiss.omp_set_num_threads(1)
            maps, result = measure(options, cohort, vectors[options.cells :], kinds[options.cells :])
        if options.ray:
            result["stage"] = {
                name: place_by_stage(cohort, name, maps[name], vectors, options.ray) for name in ("paper", "fast")
            }
    result |= {"hardware": hardware(), "versions": library_versions()}
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known[f"{options.cells}_cells_{options.labelled}_labelled"] = result
    RESULTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def phantom_embeddings(num: int, path: Path | None) -> tuple[Float32, npt.NDArray[np.str_]]:
    """Embeddings (num, D) of phantom crops and their kinds (num,), from the file where it holds enough."""
    if path is not None and path.exists():
        with np.load(path) as stored:
            vectors, kinds = stored["vectors"], stored["kinds"]
        if len(vectors) >= num:
            return vectors[:num], kinds[:num]
    from ctc_ray.embed import Embedder
    from ctc_ray.phantom import PROFILES
    from ctc_ray.phantom.crops import draw_crops

    crops, kinds = draw_crops(num, seed=SEED, profile=PROFILES["demo"])
    vectors = Embedder.load(precision="fp32")(crops)
    if path is not None:
        np.savez(path, vectors=vectors, kinds=kinds)
    return vectors, kinds


def write_patient(cohort: Cohort, patient: str, vectors_ND: Float32, first: int) -> None:
    """Embeddings of one patient, as the embed stage leaves them."""
    cohort.add_patients({patient: "made"})
    role = pl.when(pl.col("patient") == patient).then(pl.lit("train" if patient == TRAIN else "final"))
    cohort.write_patients(cohort.patients().with_columns(role=role.otherwise(pl.col("role"))))
    schema = embeddings_schema(vectors_ND.shape[1])
    tables = {}
    for number, start in enumerate(range(0, len(vectors_ND), _SHARD_CELLS)):
        part = vectors_ND[start : start + _SHARD_CELLS]
        ids = [f"{first + start + cell:024x}" for cell in range(len(part))]
        embedding = pa.FixedSizeListArray.from_arrays(pa.array(part.ravel()), part.shape[1])
        columns = {"cell_id": ids, "patient": [patient] * len(ids), "embedding": embedding}
        tables[f"part-{number:03d}.parquet"] = pa.table(columns, schema=schema)
    publish(cohort.store, cohort.embeddings(ENCODER, patient), tables, Record("embed", patient, "1", {}, {}))


def fit(cohort: Cohort, config: MapConfig, num_labelled: int) -> Fitted:
    """Fit one map on the training patient, of which the first cells have a label."""
    labels = pl.DataFrame({"cell_id": [f"{cell:024x}" for cell in range(num_labelled)]}, schema={"cell_id": pl.String})
    started, cpu = time.perf_counter(), time.process_time()
    latent_map = fit_map(cohort, config, {TRAIN: "train"}, labels)
    return Fitted(latent_map, time.perf_counter() - started, time.process_time() - cpu)


def profiles(vary: bool) -> dict[str, MapConfig]:
    """Maps to compare; the first is what the others are held against."""
    fast = {"profile": "fast", "backend": "cpu"}
    found = {
        "paper": MapConfig(),
        "paper, other seed": MapConfig(umap_seed=43),
        "fast": MapConfig.model_validate(fast),
    }
    if vary:
        found |= {f"paper, {k} neighbours": MapConfig(umap_neighbors=k) for k in (15, 30, 50, 100)}
        found["paper, 30 epochs"] = MapConfig(placing_epochs=30)
        found |= {
            f"fast, at most {n} cells": MapConfig.model_validate({**fast, "max_fit_cells": n}) for n in (5_000, 10_000)
        }
        found["fast, eom"] = MapConfig.model_validate({**fast, "hdbscan_selection": "eom"})
    return found


def measure(
    options: argparse.Namespace, cohort: Cohort, new_ND: Float32, kinds_N: npt.NDArray[np.str_]
) -> tuple[dict[str, LatentMap], dict[str, Any]]:
    """Fit every map, place the new cells on it, and compare it with the first."""
    ids = [f"{options.cells + cell:024x}" for cell in range(len(new_ND))]
    rows: dict[str, Any] = {}
    maps: dict[str, LatentMap] = {}
    reference: npt.NDArray[np.int16] | None = None
    print(f"{'map':28} {'fit s':>7} {'ms/cell':>8} {'clusters':>8} {'trust':>6} {'ARI':>6} {'equal':>6} {'purity':>6}")
    for name, config in profiles(options.vary).items():
        fitted = fit(cohort, config, options.labelled)
        fitted.latent_map.locate(ids[:64], new_ND[:64])  # compiles the descent
        started, cpu = time.perf_counter(), time.process_time()
        scores, places, clusters = fitted.latent_map.locate(ids, new_ND)
        wall, seconds = time.perf_counter() - started, time.process_time() - cpu
        reference = clusters if reference is None else reference
        shared = SharedCells()
        shared.add(clusters, reference)
        row = {
            "used": fitted.latent_map.summary["used"],
            "num_plane_cells": fitted.latent_map.summary["num_plane_cells"],
            "num_clustered_cells": fitted.latent_map.summary["num_clustered_cells"],
            "fit_wall_s": round(fitted.fit_s, 2),
            "fit_cpu_s": round(fitted.fit_cpu_s, 2),
            "placing_cpu_s_per_1000_cells": round(seconds / len(ids) * 1000, 4),
            "placing_wall_s_per_1000_cells": round(wall / len(ids) * 1000, 4),
            "extrapolated_cpu_minutes_for_a_million": round(seconds / len(ids) * 1e6 / 60, 1),
            "trustworthiness_of_placed": rounded(trustworthiness(scores, places)),
            "kind_purity": round(purity(clusters, kinds_N), 4),
            "against_paper": {key: rounded(value) for key, value in summarise_agreement(shared).items()},
        }
        rows[name], maps[name] = row, fitted.latent_map
        print(
            f"{name:28} {fitted.fit_cpu_s:7.1f} {seconds / len(ids) * 1000:8.3f} "
            f"{fitted.latent_map.clusters.num_clusters:8d} {row['trustworthiness_of_placed']:6.3f} "
            f"{row['against_paper']['adjusted_rand']:6.3f} {row['against_paper']['equal_share']:6.3f} {row['kind_purity']:6.3f}",
            flush=True,
        )
    command = (
        f"python -m benchmarks.latent_map --cells {options.cells} --labelled {options.labelled} --new {options.new}"
    )
    return maps, {
        "command": command + " --vary" * options.vary + f" --ray {options.ray}" * bool(options.ray),
        "maps": rows,
    }


def rounded(value: float | None) -> float | None:
    return value if value is None else round(value, 4)


def purity(clusters_N: npt.NDArray[np.int16], kinds_N: npt.NDArray[np.str_]) -> float:
    """Share of the cells outside the background that are of their cluster's most frequent kind."""
    inside = clusters_N >= 0
    most = [
        np.unique(kinds_N[clusters_N == name], return_counts=True)[1].max() for name in np.unique(clusters_N[inside])
    ]
    return float(sum(most) / max(1, inside.sum()))


def place_by_stage(
    cohort: Cohort, name: str, latent_map: LatentMap, base_ND: Float32, num_cells: int
) -> dict[str, Any]:
    """Place one large patient on a fitted map with the stage, on two Ray CPUs."""
    settings = MapConfig.model_validate({"profile": name, "name": name, "backend": "cpu"})
    config = RunConfig(map=settings)
    plan = plan_fit(settings, cohort)
    inputs = {f"embeddings/{TRAIN}": "1", "labels": plan.labels_digest}
    record = Record("map", name, plan.identity, settings.identity(), inputs)
    publish(cohort.store, cohort.latent(ENCODER, name), latent_map.files(), record)
    with connect(config=RayConfig(num_cpus=2, object_store_mb=200)):
        run_map(config, cohort)  # the small patients; starts workers and compiles
        rng = np.random.default_rng([SEED, num_cells])
        near = base_ND[rng.integers(0, len(base_ND), (2, num_cells))]
        share = rng.random((num_cells, 1), np.float32) * np.float32(0.2)
        write_patient(cohort, LARGE, near[0] + share * (near[1] - near[0]), 10_000_000)
        started = time.perf_counter()
        run_map(config, cohort)
        seconds = time.perf_counter() - started
    workers = cohort.require(cohort.latent_cells(ENCODER, name, LARGE), "map").workers
    cohort.store.delete_folder(cohort.embeddings(ENCODER, LARGE))
    found = {"cells": num_cells, "wall_s": round(seconds, 2), "cells_per_wall_s": round(num_cells / seconds, 1)}
    print(f"stage, {name}: {found['cells_per_wall_s']} cells/s in one patient, {len(workers)} workers", flush=True)
    return {**found, "workers": len(workers)}


if __name__ == "__main__":
    main()
