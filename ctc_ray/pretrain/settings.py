"""Everything that a DINO run depends on, and the two presets.

A `DinoSettings` is what the kernel takes; `settings_of` makes one from a preset and a run's overrides.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Final, Literal

from ctc_ray.errors import ConfigError
from ctc_ray.pretrain.augment import ViewGeometry
from ctc_ray.pretrain.encoder import DEFAULT_ARCHITECTURE
from ctc_ray.pretrain.schedules import Schedules

if TYPE_CHECKING:
    from ctc_ray.config import PretrainConfig

Preset = Literal["marker", "paper"]
Clip = Literal["norm", "agc"]


@dataclass(frozen=True)
class DinoSettings:
    """Settings of one DINO run.

    Attributes:
        preset: which views are made.
        architecture: timm name of the backbone.
        channels: input channels C.
        input_px: crops are resized to this side before the views are cut (bilinear); the crop's own size leaves them.
        geometry: sizes of the views.
        steps: optimiser steps.
        batch_size: crops a step over all workers.
        prototypes: K, width of the last layer.
        head_hidden: width of the head's hidden layers.
        head_bottleneck: width before the prototypes.
        learning_rate: peak rate of AdamW.
        learning_rate_end: rate at the end of the schedule.
        weight_decay: of matrices at the first step.
        weight_decay_end: at the end of the schedule.
        teacher_momentum: of the moving average at the first step.
        teacher_momentum_end: at the end of the schedule.
        teacher_temperature_start: at the first step.
        teacher_temperature: after its warm-up.
        warmup_fraction: share of `steps` with a rising learning rate (and teacher temperature).
        freeze_fraction: share of `steps` in which the prototypes stay as they are.
        horizon_factor: length of the schedules over `steps`; 1 scales them to the run.
        clip: `norm` bounds the norm of the whole gradient, `agc` each unit's by its weights' norm.
        clip_factor: the bound.
        koleo_weight: weight of the term that drives the student's global features apart (`dino.koleo`); 0 leaves it out.
        seed: of weights, order and views.
        precision: `fp32` or `bf16` (autocast).
    """

    preset: Preset = "marker"
    architecture: str = DEFAULT_ARCHITECTURE
    channels: int = 3
    input_px: int = 48
    geometry: ViewGeometry = field(default_factory=ViewGeometry)
    steps: int = 1000
    batch_size: int = 64
    prototypes: int = 4096
    head_hidden: int = 1024
    head_bottleneck: int = 256
    learning_rate: float = 1e-3
    learning_rate_end: float = 1e-5
    weight_decay: float = 0.04
    weight_decay_end: float = 0.1
    teacher_momentum: float = 0.99
    teacher_momentum_end: float = 1.0
    teacher_temperature_start: float = 0.04
    teacher_temperature: float = 0.06
    warmup_fraction: float = 0.1
    freeze_fraction: float = 0.02
    horizon_factor: float = 1.0
    clip: Clip = "norm"
    clip_factor: float = 3.0
    koleo_weight: float = 0.02
    seed: int = 42
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        if self.batch_size < 2:
            raise ConfigError(f"batch_size is {self.batch_size}: batch statistics need at least 2 crops a worker")
        if self.geometry.local_px > self.geometry.global_px:
            raise ConfigError(
                f"local views ({self.geometry.local_px} px) are larger than global ones ({self.geometry.global_px} px)"
            )

    def schedules(self) -> Schedules:
        """The schedules of this run."""
        horizon = max(1, round(self.steps * self.horizon_factor))
        warmup = min(round(self.steps * self.warmup_fraction), horizon)
        return Schedules(
            num_steps=horizon,
            warmup_steps=warmup,
            learning_rate=self.learning_rate,
            learning_rate_end=self.learning_rate_end,
            weight_decay=self.weight_decay,
            weight_decay_end=self.weight_decay_end,
            teacher_momentum=self.teacher_momentum,
            teacher_momentum_end=self.teacher_momentum_end,
            teacher_temperature_start=self.teacher_temperature_start,
            teacher_temperature=self.teacher_temperature,
            teacher_temperature_warmup_steps=warmup,
            freeze_last_layer_steps=round(self.steps * self.freeze_fraction),
        )


_PAPER_STEPS: Final = 30_000
"""Source: paper, Methods: 30,000 iterations."""
_REFERENCE_STEPS: Final = 250 * 7_806
"""Source: reference `create_dino_gym`: no length is passed, so schedules are sized for 250 epochs of 999,285 // 128 steps."""

MARKER: Final = DinoSettings()
"""Views that keep the identity of the channels; native 48 px; schedules scaled to the run."""

PAPER: Final = DinoSettings(
    preset="paper",
    input_px=224,  # reference: three 8-bit PNGs, bilinear 48 -> 224
    geometry=ViewGeometry(
        global_px=256,  # reference `create_dino_gym`: global crop size
        local_px=85,  # reference: 256 // 3
        num_local=5,  # reference: 5 local views
        global_scale=(0.5, 1.0),  # reference `data_augmentation`
        local_scale=(0.1, 0.5),  # reference `data_augmentation`
    ),
    steps=_PAPER_STEPS,
    batch_size=128,  # reference: loader batch
    prototypes=65_536,  # reference: head 256 -> 65,536
    head_hidden=2048,  # reference: head 128 -> 2048 -> 2048 -> 256
    head_bottleneck=256,  # reference: the same
    learning_rate=1e-3,  # reference: overrides the linear-scaling default of 2.5e-4
    learning_rate_end=1e-6,  # reference: end of the cosine
    weight_decay=0.04,  # reference: cosine from 0.04
    weight_decay_end=0.4,  # reference: to 0.4
    teacher_momentum=0.995,  # reference: constant
    teacher_momentum_end=0.995,  # reference: the same
    teacher_temperature_start=0.04,  # reference: the 10-epoch warm-up has zero slope
    teacher_temperature=0.04,  # reference: the same
    warmup_fraction=2 * 7_806 / _PAPER_STEPS,  # reference: 2 epochs
    freeze_fraction=7_806 / _PAPER_STEPS,  # reference: 1 epoch
    horizon_factor=_REFERENCE_STEPS / _PAPER_STEPS,  # in effect a constant rate after the warm-up
    clip="agc",  # reference: unit-wise adaptive clipping, not DINO's norm of 3
    clip_factor=3.0,  # reference: factor of the adaptive clipping; its eps of 1e-3 stands in `trainer`
    koleo_weight=0.0,  # reference: DINO's loss alone
)
"""The values in effect in the reference.

Values that the presets share are the reference's too: betas of AdamW, no decay of biases and 1-D parameters, student temperature
0.1, centre momentum 0.9 (`dino`, `trainer`). For views at the crop's own 48 px: `replace(PAPER, input_px=48,
geometry=replace(PAPER.geometry, global_px=48, local_px=24))`; see `PaperAugment` for what scales.

Departures: random or shipped weights in place of ImageNet's, which are on the network; bf16 in place of fp16 with a
loss scaler; no gradient checkpointing, which updated the student's batch statistics twice a step.
"""

CONTINUED_RATE: Final = 0.1
"""Share of `marker`'s learning rate when a run continues from the shipped encoder: its head starts afresh, and at the full rate
the first steps towards a random head would undo what the backbone knows."""

PRESETS: Final[dict[Preset, DinoSettings]] = {"marker": MARKER, "paper": PAPER}


def settings_of(config: PretrainConfig, *, channels: int, precision: Literal["fp32", "bf16"]) -> DinoSettings:
    """Settings of a run: its preset, with every value that the configuration names.

    Args:
        config: section `pretrain`; a null leaves the preset's value.
        channels: channels C of the crops.
        precision: what `auto` resolved to.
    """
    base = PRESETS[config.preset]
    geometry = replace(
        base.geometry,
        global_px=config.image_size_px or base.geometry.global_px,
        local_px=config.local_size_px or base.geometry.local_px,
        num_local=base.geometry.num_local if config.num_local_views is None else config.num_local_views,
    )
    # A run at another size than the preset's cuts its views from the crop as it is.
    input_px = base.input_px if geometry.global_px == base.geometry.global_px else geometry.global_px
    own = {f.name for f in fields(DinoSettings)} - {"preset", "geometry", "channels", "precision", "input_px"}
    given = {name: value for name, value in config.model_dump().items() if name in own and value is not None}
    if config.preset == "marker" and config.init == "default":
        given.setdefault("learning_rate", base.learning_rate * CONTINUED_RATE)
    return replace(base, geometry=geometry, input_px=input_px, channels=channels, precision=precision, **given)
