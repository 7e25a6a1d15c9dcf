"""RunConfig: one frozen section per stage, read from YAML and `--set`, with the fingerprint that makes an identity.

Importing this module loads neither Ray nor Torch. Fields marked operational (actor counts, batch sizes, machine size) do not
change results and stay outside the identity of an output.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ctc_ray.errors import ConfigError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
Percent = Annotated[float, Field(ge=0.0, le=100.0)]
Name = Annotated[str, Field(pattern=r"^[^/\\\s._][^/\\]*$")]
Precision = Literal["auto", "fp32", "bf16"]
ResizeRule = Literal["exact", "crop-centre", "pad-zero", "pad-edge", "pad-reflect", "bilinear"]
FaultName = Literal[
    "short-cluster",
    "rounding",
    "unscored-clusters",
    "undefined-is-zero",
    "reseeding",
    "monte-carlo",
    "test-target",
    "fixed-target",
    "first-predictions",
]
"""A fault of the reference implementation that `simulate` can leave in; `ctc_ray.hil.settings.FAULTS` says what each does."""


def operational(default: Any, **constraints: Any) -> Any:
    """Declare a field that has no influence on results."""
    return Field(default, json_schema_extra={"operational": True}, **constraints)


def neutral(default: Any, **constraints: Any) -> Any:
    """Declare a field that is no part of an identity at its default, so that outputs made before it existed stay complete."""
    return Field(default, json_schema_extra={"neutral": True}, **constraints)


class Section(BaseModel):
    """A frozen group of settings; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)

    def identity(self) -> dict[str, Any]:
        """Settings that determine results, as JSON-like values."""
        values = self.model_dump(mode="json")
        for name, field in type(self).model_fields.items():
            extra = field.json_schema_extra
            if not isinstance(extra, dict):
                continue
            if extra.get("operational") or (extra.get("neutral") and getattr(self, name) == field.default):
                values.pop(name)
        return values


class PhantomConfig(Section):
    """Synthetic cartridges."""

    patients: Count = 8
    """Number of patients; ignored where `patient_ids` are given."""
    patient_ids: tuple[str, ...] = ()
    """Names of the patients; empty: P01, P02, ..."""
    fields: Count = 6
    """Fields a cartridge."""
    seed: int = 7
    """Same seed, same bytes."""
    profile: str = "demo"
    """`paper` (175 fields of 84 objects, CTCs as rare as in the paper) or `demo` (richer in CTCs)."""
    bit_depth: Literal[8, 16] = 8
    """8: as the archives of the paper; 16: 12-bit counts in uint16."""
    overlap_px: Annotated[int, Field(ge=0, le=200)] = 10
    """Overlap of adjacent fields."""
    masks: bool = False
    """Whether to write instance masks too."""


class SegmentConfig(Section):
    """StarDist segmentation of cartridge fields into crops."""

    weights: str | None = None
    """Folder or registered name of StarDist weights; null: the shipped default."""
    precision: Precision = "auto"
    """`auto` is resolved once per cohort and recorded there."""
    layout: Literal["auto", "cellsearch", "folder"] = "auto"
    """`cellsearch`: four-page TIFFs with an event xml; `folder`: ordinary TIFF or PNG fields."""
    channel_map: dict[str, int | None] | None = None
    """Channel -> page or colour index of an image, from 0; null for a channel gives zeros. Null for the whole: as the xml
    names the filters, else DAPI 0, CK 2, CD45 3."""
    contrast: Literal["raw", "unstretched"] = "raw"
    """`raw`: counts as in the file, as the reference; `unstretched`: 12-bit counts restored from the limits in tags 755, 756."""
    frame_order: Literal["auto", "top", "bottom"] = "auto"
    """From which row of the grid frames count; `auto`: from the bottom in CellTracks-XP archives of 140 frames."""
    prob_threshold: Fraction | None = None
    """Null: the threshold stored with the weights."""
    nms_threshold: Fraction | None = None
    """Null: the threshold stored with the weights."""
    normalize_percentiles: tuple[float, float] = (1.0, 99.8)
    """Percentiles of the CK page that become 0 and 1. Source: StarDist's published examples."""
    pixel_size_um: Annotated[float, Field(gt=0)] = 0.64
    """Edge of a pixel in the sample plane."""
    duplicate_radius_px: Annotated[float, Field(ge=0)] = 10.0
    """Detections of different fields nearer than this are one physical cell."""
    measure_overlap: bool = True
    """Whether the overlap of adjacent fields is measured from their pixels; else they are taken to abut."""
    max_candidates: Count = 200_000
    """Cap on candidates before non-maximum suppression (which never returns on saturated fields)."""
    skip_background: bool = True
    """Whether the network leaves out empty parts of a field: quicker; an object that hardly rises above the noise may be lost."""
    max_failure_fraction: Fraction = operational(0.1)
    """Share of a run's fields that may fail before the stage does."""
    num_network_actors: Count = operational(1)
    """StarDist actors."""
    num_network_threads: Count = operational(1)
    """Threads of one StarDist actor."""
    num_instance_actors: Count = operational(1)
    """Actors for non-maximum suppression and crops."""
    use_gpu: bool = operational(default=False)
    """Whether StarDist actors get GPUs."""
    gpus_per_actor: Annotated[float, Field(gt=0.0, le=1.0)] = operational(1.0)
    """With `use_gpu`: GPUs of a StarDist actor; a fraction lets several actors, also those that embed, share one."""


class TrainSegmenterConfig(Section):
    """Training of a StarDist network."""

    steps: Count = 10_000
    """Optimiser steps."""
    batch_size: Count = 4
    """Patches a step."""
    patch_size_px: Annotated[int, Field(ge=64, multiple_of=16)] = 256
    """Side of a training patch."""
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    """Adam's highest learning rate. Source: StarDist defaults."""
    warmup_steps: Count = 100
    """Steps until the highest rate is reached."""
    decay_fraction: Fraction = 0.3
    """Share of the steps, at the end, over which the rate falls to zero."""
    held_out_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of the images that no gradient comes from: progress figures and thresholds."""
    initial: str | None = None
    """Folder or registered name of weights to start from; null: random weights."""
    n_rays: Annotated[int, Field(ge=3)] = 32
    """Rays of a polygon."""
    n_filter_base: Count = 32
    """Filters of the first level; the other layers follow from it."""
    page: Annotated[int, Field(ge=0)] = 2
    """Page taken of an image that has several; 2 is CK in a CellSearch field."""
    mask_suffix: str = "_ck"
    """Text that a mask may have behind its image's stem; `_ck` as `ctc-ray phantom` writes them."""
    empty_masks: Literal["set_aside", "background"] = "set_aside"
    """What a mask without objects says: that somebody forgot them, or that the image shows none."""
    precision: Precision = "auto"
    """`auto` takes bf16 where the hardware multiplies it."""
    seed: int = 0
    """Seed of weights, patches and augmentation."""
    checkpoint_every: Count = operational(500)
    """Steps between checkpoints."""
    max_failure_fraction: Fraction = operational(0.1)
    """Share of the images that may be unusable before the command fails."""
    num_workers: Count = operational(1)
    """Training processes that share each batch; the gradient is the batch's, whatever their number."""
    num_threads: Count | None = operational(None)
    """Threads of one worker on a CPU; null: the processors of the smallest machine over the workers."""
    use_gpu: bool | None = operational(None)
    """Whether each worker gets a GPU; null: where there are enough."""
    max_failures: Annotated[int, Field(ge=0)] = operational(2)
    """Restarts after a lost worker."""


class ImportCropsConfig(Section):
    """Import of single-cell images that another program cut out."""

    path_columns: Annotated[tuple[str, ...], Field(min_length=1)] = ("dapi_path", "ck_path", "cd45_path")
    """Columns of a table that hold the image files, one channel each, in the order of the crop's channels."""
    pixels: str = "pixels"
    """Array of an npz file, or column of a Parquet file, that holds the crops."""
    layout: Literal["auto", "channels_first", "channels_last"] = "auto"
    """Order of the axes of a crop in an array; `auto`: the one axis of 3 or 4 is that of the channels."""
    shape: tuple[Count, Count, Count] | None = None
    """Shape of a crop in a Parquet column that does not tell it, in the order of `layout`."""
    dtype: Literal["uint8", "uint16", "int32", "float32", "float64"] | None = None
    """Number type of the bytes of a Parquet column that does not tell it."""
    channel_order: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Which channel of the source, from 0, becomes DAPI, CK, CD45 (and a fourth); null: as they come."""
    patient_column: str | None = None
    """Null: `patient` or, as in the reference's tables, `case`."""
    patient: str | None = None
    """Patient of all rows where the source has no such column; null: the name of each file without its suffix."""
    id_column: str | None = None
    """Column of names unique within a patient; null: `source_id` where there is one, else the image paths, or file and row."""
    label_column: str | None = None
    """Null: `label` where there is one."""
    label_map: dict[str, Literal["ctc", "non_ctc", "unsure", "artefact"] | None] = {}
    """Value of the label column -> label, null for none; `*` stands for all values not named. Beside it hold the labels' own names, and the
    reference's codes: 1 ctc, 0 non_ctc, 10 none."""
    reader: str = "imported"
    """Who gave the labels."""
    resize: Annotated[tuple[ResizeRule, ...], Field(min_length=1)] = ("exact",)
    """Named rules, applied one after the other, that bring a crop to 48 x 48; see docs/import.md."""
    bits: Literal[8, 12, 16] | None = None
    """Bits of a count; null: 8 or 16, as the source stores it. Crops with a higher count are set aside."""
    float_maximum: Annotated[float, Field(gt=0)] | None = None
    """Value of a floating-point image that becomes the highest count of `bits`; null: such images are refused."""
    image_root: str | None = operational(None)
    """Folder or URI from which the paths of a table are relative; null: the table's own folder."""
    max_failure_fraction: Fraction = operational(0.1)
    """Share of the rows that may be set aside before the stage fails."""
    num_actors: Count = operational(2)
    """Importing actors, one processor each."""
    unit_cells: Count = operational(2000)
    """Rows a unit of work: what a killed run reads again at most, per actor."""

    @field_validator("resize", mode="before")
    @classmethod
    def _one_rule(cls, rules: Any) -> Any:
        return (rules,) if isinstance(rules, str) else rules

    @field_validator("label_map", mode="before")
    @classmethod
    def _text_keys(cls, label_map: Any) -> Any:
        return {str(key): value for key, value in label_map.items()} if isinstance(label_map, dict) else label_map

    @model_validator(mode="after")
    def _bits_of_floats(self) -> ImportCropsConfig:
        if self.float_maximum is not None and self.bits is None:
            raise ValueError("float_maximum needs bits too: the highest count that it stands for")
        return self


class SplitConfig(Section):
    """Roles of patients."""

    seed: int = 42
    """Seed of the assignment."""
    pretrain: Annotated[float, Field(ge=0)] = 60
    """Weight of the role. Source: paper, 60/10/10/10 of 90 patients."""
    train: Annotated[float, Field(ge=0)] = 10
    """Weight of the role."""
    validation: Annotated[float, Field(ge=0)] = 5
    """Weight of the role; the paper has none."""
    test: Annotated[float, Field(ge=0)] = 10
    """Weight of the role."""
    final: Annotated[float, Field(ge=0)] = 10
    """Weight of the role."""

    @model_validator(mode="after")
    def _some_weight(self) -> SplitConfig:
        if self.pretrain + self.train + self.validation + self.test + self.final <= 0:
            raise ValueError("at least one role needs a weight above zero")
        return self


class PretrainConfig(Section):
    """DINO pretraining of the encoder; a null hyper-parameter takes the preset's value."""

    encoder_id: Name = "dino"
    """Folder below `encoders/`."""
    preset: Literal["marker", "paper"] = "marker"
    """Views and hyper-parameters: `marker` keeps the identity of the channels, `paper` repeats the reference."""
    init: Literal["default", "random"] = "default"
    """Start from the shipped encoder (whose architecture must be the one named) or from seeded random weights."""
    architecture: str = "xcit_nano_12_p8"
    """timm name of the backbone."""
    image_size_px: Count | None = None
    """Side of a global view; `marker` has 48, `paper` 256."""
    local_size_px: Count | None = None
    """Side of a local view; `marker` has 24, `paper` 85."""
    num_local_views: Annotated[int, Field(ge=0)] | None = None
    """Local views a crop; both presets have 5."""
    steps: Count | None = None
    """Optimiser steps, to which schedules are scaled; `marker` has 1,000, `paper` 30,000."""
    batch_size: Count | None = None
    """Crops a step over all workers; `marker` has 64, `paper` 128."""
    prototypes: Count | None = None
    """Width of the head's last layer; `marker` has 4,096, `paper` 65,536."""
    head_hidden: Count | None = None
    """Width of the head's hidden layers; `marker` has 1,024, `paper` 2,048."""
    head_bottleneck: Count | None = None
    """Width before the last layer; both presets have 256."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak rate of AdamW; both presets have 1e-3, and `marker` a tenth of it where it continues from the shipped encoder."""
    teacher_momentum: Fraction | None = None
    """Moving average of the teacher at the first step; `marker` has 0.99 (rising to 1), `paper` 0.995."""
    precision: Precision = "auto"
    """`auto` takes bf16 where the hardware multiplies it."""
    intensity_percentiles: tuple[float, float] = (1.0, 99.8)
    """Percentiles of the pretraining pixels that the intensity constants map to 0 and 1."""
    intensity_compression: Annotated[float, Field(ge=0)] = 3.0
    """k of asinh(k u) / asinh(k), applied to the scaled light u; 0 is linear."""
    full_scale: Annotated[float, Field(gt=0)] | None = None
    """Count of a saturated pixel; null: 255 for 8 bit, 4,095 for 16 bit (12-bit cameras store their counts so)."""
    seed: int = 42
    """Seed of weights, order and views."""
    num_workers: Count = operational(2)
    """Training processes that share each batch. A run may be continued with another number: views, order and batch statistics are
    drawn per worker, so that runs equal each other exactly on one worker only."""
    min_workers: Count = operational(1)
    """The fewest workers with which a run starts, or goes on where the cluster lost room for the others."""
    data: Literal["auto", "resident", "streaming"] = "auto"
    """`resident`: each worker holds its share of the crops on its device, and a resumed run equals an uninterrupted one;
    `streaming`: Ray Data streams them, and a resumed run starts its epoch again; `auto`: resident where a worker's share is
    at most `resident_gb`."""
    resident_gb: Annotated[float, Field(gt=0)] = operational(8.0)
    """Largest share of the crops, in GB, that `auto` keeps on a worker's device: a million 8-bit crops have 7 GB."""
    koleo_weight: Annotated[float, Field(ge=0)] | None = None
    """Weight of the term that drives features apart; `marker` has 0.02, `paper` 0."""
    checkpoint_every: Count = operational(200)
    """Steps between checkpoints."""
    max_failures: Annotated[int, Field(ge=0)] = operational(2)
    """Restarts after a lost worker."""
    use_gpu: bool = operational(default=False)
    """Whether each worker gets a GPU."""


class EmbedConfig(Section):
    """Embedding of crops."""

    encoder: Name = "dino"
    """Id below `encoders/`, or `default` for the shipped encoder."""
    precision: Precision = "auto"
    """`auto` is resolved once per cohort and recorded there."""
    intensity: Literal["encoder", "reference", "minmax"] = "encoder"
    """Intensity rule: the encoder's own, full scale to -1..1, or the range of each crop and channel (the paper's text)."""
    full_scale: Annotated[float, Field(gt=0)] | None = None
    """Count of a saturated pixel; null: 255 for 8 bit, 4,095 for 16 bit (12-bit cameras store their counts so)."""
    batch_size: Count | None = operational(None)
    """Crops a forward pass; null: 64 on a processor, 1,024 on a GPU."""
    num_actors: Count = operational(2)
    """Embedding actors at most."""
    num_threads: Count = operational(1)
    """Threads of one actor."""
    unit_cells: Count = operational(1000)
    """Cells a unit of work (at most 32 MiB of pixels): what a killed run computes again at most, per actor."""
    use_gpu: bool = operational(default=False)
    """Whether each actor gets a GPU."""
    gpus_per_actor: Annotated[float, Field(gt=0.0, le=1.0)] = operational(1.0)
    """Share of a GPU that each actor gets, where `use_gpu`."""


FAST_MAP: Mapping[str, Any] = {
    "umap_neighbors": 30,
    "placing_epochs": 30,
    "max_fit_cells": 20_000,
    "backend": "auto",
}
"""What `map.profile=fast` sets where nothing else is given; `benchmarks/latent_map.py` compares it with `paper`
(no figure is recorded yet).
Source of the 30 epochs: umap-learn's number for batches of more than 10,000 cells."""


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


class RunConfig(Section):
    """All settings of a run."""

    phantom: PhantomConfig = PhantomConfig()
    segment: SegmentConfig = SegmentConfig()
    train_segmenter: TrainSegmenterConfig = TrainSegmenterConfig()
    import_crops: ImportCropsConfig = ImportCropsConfig()
    split: SplitConfig = SplitConfig()
    pretrain: PretrainConfig = PretrainConfig()
    embed: EmbedConfig = EmbedConfig()
    map: MapConfig = MapConfig()
    labels: LabelsConfig = LabelsConfig()
    train: TrainConfig = TrainConfig()
    filter_noise: FilterNoiseConfig = FilterNoiseConfig()
    index: IndexConfig = IndexConfig()
    hil: HilConfig = HilConfig()
    detect: DetectConfig = DetectConfig()
    compare: CompareConfig = CompareConfig()
    report: ReportConfig = ReportConfig()
    ray: RayConfig = RayConfig()


def load_config(file: str | Path | None = None, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a configuration.

    Args:
        file: YAML with any of the sections; None for the defaults.
        overrides: `section.field=value`, the value in YAML; they win over the file.

    Raises:
        ConfigError: the file cannot be read, a key is unknown (the message names the nearest valid one), or a value is wrong.
    """
    values: dict[str, Any] = {}
    where = "the defaults"
    if file is not None:
        where = str(file)
        values = _read_yaml(Path(file))
    for override in overrides:
        _apply_override(values, override)
    _refuse_unknown(values, where)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{where}: {key} = {first.get('input')!r} is wrong: {first['msg']}") from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} must hold sections (for example `segment:`), not a {type(loaded).__name__}")
    return {str(key): value for key, value in loaded.items()}


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    section, dot, name = key.strip().partition(".")
    if not separator or not dot or not name:
        raise ConfigError(
            f"--set {override!r}: write it as section.field=value, for example --set segment.precision=fp32"
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: {text!r} is not a YAML value") from error
    group = values.setdefault(section, {})
    if not isinstance(group, dict):
        raise ConfigError(f"--set {override!r}: {section} is not a section")
    group[name] = value


def _refuse_unknown(values: Mapping[str, Any], where: str) -> None:
    sections = RunConfig.model_fields
    for section, group in values.items():
        if section not in sections:
            raise ConfigError(f"{where}: unknown section {section!r}{_nearest(section, sections)}")
        kind = sections[section].annotation
        if not isinstance(group, Mapping):
            raise ConfigError(f"{where}: section {section!r} must hold settings, not {group!r}")
        fields = kind.model_fields if isinstance(kind, type) and issubclass(kind, Section) else get_args(kind)
        for name in group:
            if name not in fields:
                raise ConfigError(f"{where}: unknown key {section}.{name}{_nearest(str(name), fields)}")


def _nearest(name: str, valid: Iterable[str]) -> str:
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f": did you mean {close[0]!r}?" if close else f"; valid are {', '.join(names)}"
