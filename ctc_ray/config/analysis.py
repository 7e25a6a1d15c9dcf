"""Settings of what is made of vectors: map, labels, classifiers, index, simulations, detection, comparison, report; and Ray's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ctc_ray.config.section import (
    Count,
    FaultName,
    Fraction,
    Name,
    Percent,
    Section,
    neutral,
    operational,
)

FAST_MAP: Mapping[str, Any] = {
    "umap_neighbors": 30,
    "placing_epochs": 30,
    "max_fit_cells": 20_000,
    "backend": "auto",
}
"""What `map.profile=fast` sets where nothing else is given; `benchmarks/latent_map.py` compares it with `paper`;
figures in `docs/latent_map.md`. Source of the 30 epochs: umap-learn's number for batches of more than 10,000 cells."""


class MapConfig(Section):
    """Latent map: PCA, UMAP, HDBSCAN."""

    name: Name = "map"
    """Folder below `latent/<encoder>/`."""
    encoder: Name = "dino"
    """Which embeddings."""
    profile: Literal["paper", "fast"] = operational("paper")
    """`paper`: the defaults below; `fast`: other defaults, for a million cells (see docs/latent_map.md). It acts only through
    the settings below, and settings that are given win over it."""
    pca_dim: Count = 32
    """Principal components. Source: paper, Methods."""
    umap_neighbors: Annotated[int, Field(ge=2)] = 200
    """Source: reference implementation."""
    umap_min_dist: Fraction = 0.8
    """Source: reference implementation."""
    umap_seed: int = 42
    """Seed of UMAP; makes it single-threaded."""
    hdbscan_min_cluster_size: Annotated[int, Field(ge=2)] = 15
    """Source: reference implementation."""
    hdbscan_min_samples: Count = 90
    """Source: reference implementation."""
    hdbscan_selection: Literal["leaf", "eom"] = "leaf"
    """Source: reference implementation."""
    hdbscan_epsilon: Annotated[float, Field(ge=0)] = 0.25
    """Source: reference implementation."""
    max_fit_cells: Count = 60_000
    """Cells at most that UMAP and HDBSCAN are fitted on (seeded sample); the rest are placed."""
    cluster_with: Literal["test_and_pool", "pool"] = "test_and_pool"
    """Cells that HDBSCAN sees: the reference clusters labelled test and unlabelled training cells together; `pool` leaves
    the test patients out."""
    placing_epochs: Annotated[int, Field(ge=1, le=1000)] = neutral(100)
    """Steps of gradient descent by which a new cell finds its place. Source: umap-learn, for batches of up to 10,000 cells."""
    backend: Literal["cpu", "cuml", "auto"] = neutral("cpu")
    """What fits UMAP: `cpu` umap-learn; `cuml` cuML on a GPU (extra `rapids`); `auto` cuML where both are there. Cells are placed
    by the same code in all three."""
    unit_cells: Count = operational(10_000)
    """Cells a unit of placing: what a killed run places again at most, per worker."""
    max_failure_fraction: Fraction = operational(0.1)
    """Patients whose embeddings cannot be placed are set aside; more than this share ends the stage."""
    compare_with: Name | None = operational(None)
    """Another map of the same encoder: how well the two agree is written to `agreement/<that map>/` beside this one."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_profile(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and given.get("profile") == "fast":
            return {**FAST_MAP, **given}
        return given


class LabelsConfig(Section):
    """Simulated expert and consensus."""

    reader: str = "simulated"
    """Name of the reader in the events."""
    per_patient: Count = 400
    """Cells at most that the simulated expert labels of one patient."""
    roles: tuple[str, ...] = ("train", "validation", "test")
    """Roles whose patients are labelled."""
    balanced: bool = True
    """Whether CTCs and others are drawn in about equal numbers, as in the paper's labelled set."""
    match_radius_px: Annotated[float, Field(gt=0)] = 12.0
    """How far a truth row may lie from the centroid of its cell."""
    seconds_per_cell: Annotated[float, Field(gt=0)] = 3.0
    """Source: paper, 100 cells in about five minutes."""
    error_rate: Fraction = 0.0
    """Share of answers that are flipped."""
    seed: int = 42
    """Seed of the draw."""


class TrainConfig(Section):
    """Classifier on PCA features."""

    name: Name = "svm"
    """Folder below `classifiers/`."""
    encoder: Name = "dino"
    """Which embeddings."""
    map: Name = "map"
    """Which latent map (its PCA and its clusters)."""
    svm_c: Annotated[float, Field(gt=0)] = 1.0
    """Source: reference implementation."""
    calibration_folds: Annotated[int, Field(ge=2)] = 5
    """Folds of the probability calibration."""
    seed: int = 42
    """Seed of the folds."""
    undefined: Literal["null", "paper"] = neutral("null")
    """What `metrics.parquet` holds where F1, recall or precision has no value: `null` and a reason, or as the `paper`, 0 for a
    division by zero and 1 for a cluster in which neither truth nor prediction holds a CTC."""
    compare_models: bool = operational(default=False)
    """Whether to write `model_comparison.parquet` too: SVM, logistic regression and nearest neighbours, tuned and not."""

    @field_validator("undefined", mode="before")
    @classmethod
    def _null_of_yaml(cls, undefined: Any) -> Any:
        return "null" if undefined is None else undefined


class FilterNoiseConfig(Section):
    """Noise filter: cells that are artefacts, told from all others."""

    name: Name = "svm"
    """Folder below `classifiers/`; the filter lies in its folder `noise`."""
    encoder: Name = "dino"
    """Which embeddings."""
    per_class: Annotated[int, Field(ge=10)] = 400
    """Artefacts, and as many other cells, that it is trained on at most. Source: reference implementation."""
    pca_dim: Count = 32
    """Principal components, fitted on these cells. Source: reference implementation."""
    svm_c: Annotated[float, Field(gt=0)] = 1.0
    """Source: reference implementation."""
    calibration_folds: Annotated[int, Field(ge=2)] = 5
    """Folds of the probability calibration."""
    seed: int = 42
    """Seed of the draw and of the folds."""
    unit_cells: Count = operational(50_000)
    """Cells a unit of work: what a killed run scores again at most, per worker."""
    max_failure_fraction: Fraction = operational(0.1)
    """Patients whose embeddings cannot be scored are set aside; more than this share ends the stage."""


class IndexConfig(Section):
    """FAISS index."""

    encoder: Name = "dino"
    """Which embeddings."""
    metric: Literal["cosine", "l2"] = "cosine"
    """Cosine: vectors are normalised and compared by inner product."""
    num_threads: Count = operational(2)
    """Threads of a search."""
    kind: Literal["auto", "flat", "ivf", "hnsw"] = operational("auto")
    """`flat` compares with every vector; `ivf` with those of the nearest lists; `hnsw` walks a graph (built by one task). `auto`:
    flat up to `exact_below` cells, then ivf, and hnsw where ivf would have to read too many lists for `target_recall`."""
    exact_below: Count = operational(60_000)
    """Cells up to which a flat index, which is exact, answers a single query well within 5 ms (`benchmarks/index.py --sizes`)."""
    target_recall: Annotated[float, Field(gt=0, lt=1)] = operational(0.99)
    """Recall of the nearest ten against the exact answer, which the number of lists read is chosen for on the data."""
    device: Literal["auto", "cpu"] = operational("auto")
    """`auto`: batches without a filter are searched exactly on a GPU where FAISS sees one."""
    max_failure_fraction: Fraction = operational(0.1)
    """Patients whose embeddings cannot be read are set aside; more than this share ends the stage."""


class HilConfig(Section):
    """Human-in-the-loop simulations."""

    name: Name = "paper"
    """Folder below `simulations/`."""
    encoder: Name = "dino"
    """Which embeddings."""
    map: Name = "map"
    """Which latent map; it stays as it is through all loops."""
    scenarios: Annotated[tuple[str, ...], Field(min_length=1)] = ("limited-global",)
    """Scenarios to run: `limited-global`, `limited-local`, `rare-positive`."""
    strategies: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "random",
        "cluster-f1",
        "margin",
        "uncertainty-ensemble",
    )
    """Strategies to compare: the baseline, the paper's, the plainest of the literature, and the one that `docs/hil_study.md` recommends."""
    main_clusters: tuple[int, ...] = ()
    """Main clusters of `limited-local` and regions of `rare-positive`; empty: every cluster of the training set but the background, and the
    weakest one of the moment."""
    seeds: Literal["paper"] | Count = "paper"
    """`paper` (164, 29, 7, 190, 71), or a number of seeds: 0, 1, 2, ..."""
    mode: Literal["faithful", "corrected"] = "corrected"
    """`faithful` repeats the faults of the reference."""
    faults: tuple[FaultName, ...] = neutral(())
    """Faults of the reference that corrected mode leaves in, to see what each one does; faithful mode has all of them."""
    initial: Annotated[int, Field(ge=2)] = 100
    """Labels before the first loop. Source: paper."""
    per_loop: Count = 100
    """Labels a loop. Source: paper."""
    loops: Count = 4
    """Source: paper."""
    mc_splits: Count = 100
    """Monte-Carlo splits that score the clusters. Source: reference implementation."""
    flip_rate: Fraction = 0.0
    """Share of the simulated expert's answers that are wrong."""
    flip_rates: tuple[Fraction, ...] = neutral(())
    """Several such shares to sweep over; the results then have a column `flip_rate`. Empty: `flip_rate` alone."""
    held_back: Fraction = neutral(0.5)
    """Share of the training cells that `rare-positive` hides, to be found again."""
    seconds_per_cell: Annotated[float, Field(gt=0)] = neutral(3.0)
    """What a look at a cell takes. Source: paper, 100 cells in 5 minutes."""
    budget_s: Annotated[float, Field(gt=0)] = neutral(300.0)
    """Time of the expert in a loop of `rare-positive`. Source: paper."""
    drop_after: Count | None = neutral(None)
    """Seeds after which arms that are clearly behind the best one of their setting get no more; None: every arm gets all seeds."""
    max_concurrent: Count = operational(2)
    """Trials at a time, one processor each; raise it on a cluster."""

    @field_validator("faults", mode="after")
    @classmethod
    def _in_one_order(cls, faults: tuple[FaultName, ...]) -> tuple[FaultName, ...]:
        return tuple(sorted(set(faults)))

    @model_validator(mode="after")
    def _faults_are_of_corrected_mode(self) -> HilConfig:
        if self.mode == "faithful" and self.faults:
            raise ValueError(
                f"faithful mode has every fault: leave out {', '.join(self.faults)}, or set mode: corrected"
            )
        return self

    @field_validator("seeds", mode="before")
    @classmethod
    def _known_seeds(cls, seeds: Any) -> Any:
        if isinstance(seeds, str) and seeds.isdigit():
            return int(seeds)
        if isinstance(seeds, str) and seeds != "paper":
            raise ValueError("write `paper`, or a number of seeds above zero")
        return seeds


class DetectConfig(Section):
    """Candidates of new patients."""

    name: Name = "final"
    """Folder below `detections/`."""
    classifier: Name = "svm"
    """Which classifier."""
    threshold: Fraction = 0.5
    """Calibrated probability from which a cell is a candidate. Source: paper."""
    roles: tuple[str, ...] = operational(("final",))
    """Roles whose patients are searched where none are named; each patient is a unit of its own."""
    max_failure_fraction: Fraction = operational(0.5)
    """Share of a run's patients that may be set aside before the stage fails."""


class CompareConfig(Section):
    """Comparison with CellSearch's events."""

    name: Name = "final"
    """Which detection run."""
    tolerance_px: Annotated[float, Field(gt=0)] = 30.0
    """Centres nearer than this in each axis can be one object. Source: ACCEPT's rule."""
    min_overlap: Fraction = 0.75
    """Share of either box that the intersection must cover. Source: ACCEPT's rule."""
    truth_radius_px: Annotated[float, Field(gt=0)] = 12.0
    """How far a row of `truth.parquet` (optional, beside the patients' folders) may lie from the centroid of its cell."""
    max_failure_fraction: Fraction = operational(0.5)
    """Share of a run's patients that may be set aside before the stage fails."""


class ReportConfig(Section):
    """The HTML report."""

    name: Name = "report"
    """Folder below `reports/`."""
    gallery_cells: Count = 48
    """Candidates shown."""
    cluster_examples: Count = 6
    """Cells shown of each cluster."""
    contrast_percentiles: tuple[Percent, Percent] = (5.0, 99.8)
    """Percentiles of the cohort's pixels that are drawn black and white, one pair of values a channel for all cells."""
    gamma: Annotated[float, Field(gt=0.0, le=2.0)] = 0.6
    """Power of the grey curve of all cells; below 1 dim signal shows beside bright."""
    max_map_points: Count = 20_000
    """Points drawn of the latent map (seeded sample)."""
    title: str = "Circulating tumor cells"
    """Title of the page."""

    @model_validator(mode="after")
    def _ordered_percentiles(self) -> ReportConfig:
        low, high = self.contrast_percentiles
        if low >= high:
            raise ValueError(f"contrast_percentiles must rise, not {low:g} to {high:g}")
        return self


class RayConfig(Section):
    """How to reach Ray; never part of an identity."""

    num_cpus: Count | None = None
    """Logical CPUs of a local cluster; null: the machine's, and at least four (stages hold a reader beside their pools)."""
    object_store_mb: Count = 512
    """Object store of a local cluster."""
