"""Settings of what turns images into vectors: phantom, segmentation, import, roles, pretraining, embedding."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ctc_ray.config.section import (
    Count,
    Fraction,
    Name,
    Precision,
    ResizeRule,
    Section,
    operational,
)


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
    label_map: dict[str, Literal["ctc", "non_ctc", "unsure", "artefact"] | None] = Field(default_factory=dict)
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
