"""One DINO step and the loop around it, without Ray.

Every random draw is a function of (seed, step, rank): a resumed run needs no generator state and is exactly the
uninterrupted one.

Shape letters: V views, B crops of this worker's batch, C channels, H rows, W columns, K prototypes.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812  (the name torch's own documentation uses)
from timm.utils.agc import adaptive_clip_grad
from torch import nn

from ctc_ray.errors import SchemaError, WeightsError
from ctc_ray.pretrain.augment import Augment, MarkerAugment, Views
from ctc_ray.pretrain.dino import DinoHead, DinoLoss, DinoNetwork, koleo, teacher_of, update_teacher
from ctc_ray.pretrain.encoder import build_backbone, embedding_width, load_strictly
from ctc_ray.pretrain.intensity import IntensityRule, full_scale_of
from ctc_ray.pretrain.monitor import StepMetrics, measure
from ctc_ray.pretrain.paper_augment import PaperAugment
from ctc_ray.pretrain.precision import autocast
from ctc_ray.pretrain.schedules import StepValues
from ctc_ray.pretrain.settings import DinoSettings
from ctc_ray.pretrain.unit_length import with_contiguous_attention

_AGC_EPS: Final = 1e-3
"""Source: reference `create_dino_gym`, adaptive clipping."""


def fold_seed(*parts: int | str) -> int:
    """A 63-bit seed from several numbers; neighbouring numbers give unrelated seeds."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class BatchSource(Protocol):
    """Where a worker's batches come from."""

    def batch(self, step: int) -> torch.Tensor:
        """Crops of a global step as fractions of full scale, (B, C, H, W) float32 on the training device."""


class ResidentCrops:
    """Crops held in memory, in an order that is a function of seed and step alone.

    Args:
        crops_NCHW: (N, C, H, W) uint8 or uint16 of this worker.
        batch_size: crops of this worker a step (B).
        seed: of the order.
        device: where the crops are held and batches are made.
        full_scale: count of full scale; None takes the dtype's maximum.

    Raises:
        SchemaError: fewer crops than a batch.
    """

    def __init__(
        self,
        crops_NCHW: npt.NDArray[Any],
        *,
        batch_size: int,
        seed: int,
        device: torch.device | None = None,
        full_scale: float | None = None,
    ) -> None:
        if len(crops_NCHW) < batch_size:
            raise SchemaError(
                f"{len(crops_NCHW)} pretraining crops are fewer than one batch of {batch_size} a worker: "
                "add patients to the role `pretrain`, or lower pretrain.batch_size or pretrain.num_workers"
            )
        self._scale = full_scale or full_scale_of(crops_NCHW.dtype)
        device = device or torch.device("cpu")
        # torch indexes no uint16; int32 holds the counts exactly.
        counts = crops_NCHW if crops_NCHW.dtype == np.uint8 else crops_NCHW.astype(np.int32)
        self._crops = torch.from_numpy(np.require(counts, requirements=("C", "W"))).to(device)
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches an epoch; the remainder of an epoch's order is dropped."""
        return len(self._crops) // self._batch_size

    def batch(self, step: int) -> torch.Tensor:
        """See `BatchSource`."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(fold_seed(self._seed, "order", epoch))
            self._order = torch.randperm(len(self._crops), generator=generator)
            self._epoch = epoch
        chosen = self._order[position * self._batch_size : (position + 1) * self._batch_size]
        return self._crops[chosen.to(self._crops.device)].float().div_(self._scale)


class StreamedCrops:
    """Batches from an endless iterator; their order is the stream's, and a resumed run starts its epoch again."""

    def __init__(self, batches: Iterator[torch.Tensor]) -> None:
        self._batches = batches

    def batch(self, step: int) -> torch.Tensor:
        """See `BatchSource`; the step is not used.

        Raises:
            SchemaError: the stream ended, which an endless one does only without a single whole batch.
        """
        try:
            return next(self._batches)
        except StopIteration:
            raise SchemaError(
                f"the stream of pretraining crops gave no batch at step {step}: "
                "there are fewer crops than one batch a worker; lower pretrain.batch_size"
            ) from None


@dataclass(frozen=True)
class World:
    """This worker among all.

    Attributes:
        rank: 0..size-1.
        size: number of workers.
        weight: crops of this worker over the workers' mean; 1 where the batch divides evenly.
    """

    rank: int = 0
    size: int = 1
    weight: float = 1.0

    def average(self, value: torch.Tensor) -> torch.Tensor:
        """Average a tensor over the crops of all workers, in place; each gives the mean over its own crops."""
        if self.size > 1:
            if self.weight != 1.0:
                value *= self.weight
            dist.all_reduce(value)
            value /= self.size
        return value


@dataclass(frozen=True)
class ForwardPass:
    """What a step's forward pass leaves for its update and its measures.

    Attributes:
        loss: scalar of this worker, with its graph.
        teacher_logits: (2, B, K) teacher logits of the global views, float32.
        probabilities: (2, B, K) the same, centred and sharpened.
        teacher_features: (2 B, D) features of the global views.
    """

    loss: torch.Tensor
    teacher_logits: torch.Tensor
    probabilities: torch.Tensor
    teacher_features: torch.Tensor


class DinoTrainer:
    """Student, teacher, loss and optimiser of a run, at one global step.

    Args:
        settings: of the run.
        rule: intensity rule of the encoder to be.
        device: where to compute.
        world: this worker among all; with more than one, `torch.distributed` is initialised.
        backbone_state: weights to start from; None starts from seeded random weights.

    Raises:
        ConfigError: the backbone cannot be built.
        WeightsError: `backbone_state` is of another architecture.
    """

    def __init__(
        self,
        settings: DinoSettings,
        rule: IntensityRule,
        *,
        device: torch.device | None = None,
        world: World | None = None,
        backbone_state: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.settings = settings
        self.rule = rule
        self.device = device or torch.device("cpu")
        self.world = world or World()
        self.step = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(fold_seed(settings.seed, "weights"))
            backbone = build_backbone(
                settings.architecture, channels=settings.channels, input_size_px=settings.geometry.global_px
            )
            head = DinoHead(
                embedding_width(backbone),
                hidden=settings.head_hidden,
                bottleneck=settings.head_bottleneck,
                prototypes=settings.prototypes,
            )
        if backbone_state is not None:
            load_strictly(backbone, dict(backbone_state), "the encoder to continue from")
        backbone = with_contiguous_attention(backbone)
        self.student = DinoNetwork(backbone, head).to(self.device).train()
        self.teacher = teacher_of(self.student).train()
        self.loss = DinoLoss(settings.prototypes).to(self.device)
        self.schedules = settings.schedules()
        self.augment: Augment = (
            MarkerAugment(rule, settings.geometry) if settings.preset == "marker" else PaperAugment(settings.geometry)
        )
        self.optimizer = torch.optim.AdamW(_parameter_groups(self.student), lr=0.0, betas=(0.9, 0.999), fused=True)
        self._forward: nn.Module = self.student
        if self.world.size > 1:
            # Buffers differ by rank only within a step: `_average_buffers` makes them equal after it.
            self._forward = nn.parallel.DistributedDataParallel(self.student, broadcast_buffers=False)

    def train_step(self, fraction_BCHW: torch.Tensor) -> StepMetrics:
        """Make one update from a batch of this worker.

        Args:
            fraction_BCHW: crops as fractions of full scale on the training device.

        Raises:
            WeightsError: the loss is not finite.
        """
        started = time.perf_counter()
        values = self.schedules.at(self.step)
        passed = self.forward(self.views_of(fraction_BCHW), values)
        mean_loss = float(self.world.average(passed.loss.detach().clone()))
        if not np.isfinite(mean_loss):
            raise WeightsError(
                f"the loss became {mean_loss} at step {self.step}: lower pretrain.learning_rate "
                "(the last checkpoint is intact; rerun to continue from it)"
            )
        self.backward(passed.loss)
        gradient_norm = self.update(passed, values)
        self.step += 1
        return measure(
            step=self.step,
            loss=mean_loss,
            values=values,
            gradient_norm=gradient_norm,
            probabilities_TBK=passed.probabilities,
            centre_K=self.loss.centre,
            features_BD=passed.teacher_features,
            num_crops=round(len(fraction_BCHW) / self.world.weight * self.world.size),
            seconds=time.perf_counter() - started,
        )

    def views_of(self, fraction_BCHW: torch.Tensor) -> Views:
        """Make this step's views; seeded by step and rank."""
        seed = fold_seed(self.settings.seed, "views", self.step, self.world.rank)
        torch.manual_seed(seed)  # for backbones with dropout
        generator = torch.Generator(device=self.device).manual_seed(seed)
        return self.augment(self._resized(fraction_BCHW), generator)

    def forward(self, views: Views, values: StepValues) -> ForwardPass:
        """Pass views through teacher and student and compare them."""
        with autocast(self.settings.precision, self.device):
            with torch.no_grad():
                (teacher_VBK,), teacher_features = self.teacher([views.global_views])
            sizes = [views.global_views] + ([views.local_views] if len(views.local_views) else [])
            logits, features = self._forward(sizes)
        teacher_VBK = teacher_VBK.float()
        probabilities = self.loss.teacher_probabilities(teacher_VBK, values.teacher_temperature)
        loss = self.loss(logits, probabilities)
        if self.settings.koleo_weight > 0:
            apart = torch.stack([koleo(view) for view in features.chunk(len(views.global_views))]).mean()
            loss = loss + self.settings.koleo_weight * apart
        return ForwardPass(loss, teacher_VBK, probabilities, teacher_features)

    def backward(self, loss: torch.Tensor) -> None:
        """Compute the student's gradients, averaged over the crops of all workers."""
        self.optimizer.zero_grad(set_to_none=True)
        # The workers' gradients are averaged evenly: the weight makes that the gradient of the whole batch.
        (loss if self.world.weight == 1.0 else loss * self.world.weight).backward()

    def update(self, passed: ForwardPass, values: StepValues) -> float:
        """Move student, teacher and centre by this step's gradients; returns their norm before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = values.learning_rate
            group["weight_decay"] = values.weight_decay if group["decayed"] else 0.0
        gradient_norm = self._clip()
        if not values.train_last_layer:
            self.student.head.prototypes.grad = None
        self.optimizer.step()
        update_teacher(self.teacher, self.student, values.teacher_momentum)
        self.loss.update_centre(passed.teacher_logits, self.world.average)
        self._average_buffers()
        return gradient_norm

    def _resized(self, fraction_BCHW: torch.Tensor) -> torch.Tensor:
        side = self.settings.input_px
        if self.settings.preset == "marker" or fraction_BCHW.shape[-1] == side:
            return fraction_BCHW
        return F.interpolate(fraction_BCHW, size=(side, side), mode="bilinear", align_corners=False)

    def _clip(self) -> float:
        parameters = [p for p in self.student.parameters() if p.grad is not None]
        if self.settings.clip == "norm":
            return float(nn.utils.clip_grad_norm_(parameters, self.settings.clip_factor))
        norm = float(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        adaptive_clip_grad(  # type: ignore[no-untyped-call]  # timm has no annotations there
            parameters, clip_factor=self.settings.clip_factor, eps=_AGC_EPS
        )
        return norm

    def _average_buffers(self) -> None:
        """Average batch statistics over the workers, so that all ranks hold one student and one teacher."""
        if self.world.size == 1:
            return
        buffers = [b for net in (self.student, self.teacher) for b in net.buffers() if b.is_floating_point()]
        if not buffers:
            return
        flat = self.world.average(torch.cat([b.reshape(-1) for b in buffers]))
        for buffer, part in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that the next step depends on, by name: student, teacher with buffers, centre, optimiser."""
        state = {f"student.{k}": v for k, v in self.student.state_dict().items()}
        state |= {f"teacher.{k}": v for k, v in self.teacher.state_dict().items()}
        state |= {f"loss.{k}": v for k, v in self.loss.state_dict().items()}
        for name, parameter in self.student.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                state[f"optimizer.{name}.{key}"] = torch.as_tensor(value)
        return {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}

    def load(self, tensors: Mapping[str, torch.Tensor], step: int) -> None:
        """Continue from what `tensors` gave at a step.

        Raises:
            WeightsError: tensors of another architecture or head.
        """
        where = f"the checkpoint of step {step}"
        load_strictly(self.student, _below(tensors, "student."), where)
        load_strictly(self.teacher, _below(tensors, "teacher."), where)
        load_strictly(self.loss, _below(tensors, "loss."), where)
        moments = _below(tensors, "optimizer.")
        for name, parameter in self.student.named_parameters():
            own = {key: value for key, value in _below(moments, f"{name}.").items() if "." not in key}
            if own:
                # A fused AdamW keeps its step counter, like the moments, beside the weights; and counts in place.
                self.optimizer.state[parameter] = {key: value.to(self.device, copy=True) for key, value in own.items()}
        self.step = step


def _below(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Matrices with weight decay; biases and 1-D parameters without. Source: reference `create_dino_gym`."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "decayed": True},
        {"params": [p for p in parameters if p.ndim <= 1], "decayed": False},
    ]


def train(
    trainer: DinoTrainer,
    source: BatchSource,
    *,
    checkpoint: Callable[[DinoTrainer], None] | None = None,
    checkpoint_every: int = 200,
    on_step: Callable[[StepMetrics], None] | None = None,
    until: int | None = None,
) -> None:
    """Train to the end of the settings' steps (or `until`), from wherever the trainer stands.

    Args:
        trainer: holds the state and is advanced.
        source: of this worker's batches.
        checkpoint: called every `checkpoint_every` steps and after the last.
        checkpoint_every: steps between checkpoints.
        on_step: receives each step's metrics.
        until: stop before this step (None: the run's length).
    """
    last = trainer.settings.steps if until is None else min(until, trainer.settings.steps)
    while trainer.step < last:
        metrics = trainer.train_step(source.batch(trainer.step))
        if on_step is not None:
            on_step(metrics)
        if checkpoint is not None and (trainer.step % checkpoint_every == 0 or trainer.step == trainer.settings.steps):
            checkpoint(trainer)
