"""Pretraining written as the reference does it: per-image PIL transforms in a DataLoader, torch's own modules, plain loops.

What `benchmarks.pretrain` measures against. Values and order of the transforms are those in effect in the reference
(`create_dino_gym`, `data_augmentation`); views, model, head, loss and number format are this project's, so that only the way of
computing differs. Reading the three PNGs of a cell is left out, in the reference's favour.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from timm.utils.agc import adaptive_clip_grad
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from ctc_ray.pretrain.augment import ViewGeometry
from ctc_ray.pretrain.dino import DinoHead, DinoLoss, DinoNetwork, teacher_of
from ctc_ray.pretrain.encoder import build_backbone, embedding_width
from ctc_ray.pretrain.precision import autocast
from ctc_ray.pretrain.settings import DinoSettings

Transform = Callable[[Image.Image], torch.Tensor]


def to_network(image: torch.Tensor) -> torch.Tensor:
    """0..1 to -1..1."""
    return image.clamp(0.0, 1.0) * 2.0 - 1.0


def view_transform(
    size_px: int, scale: tuple[float, float], *, blur_probability: float, solarise_probability: float
) -> Transform:
    """The reference's transforms of one view, in its order."""
    compose: Transform = transforms.Compose(
        [
            transforms.RandomPerspective(0.2, p=0.5),
            transforms.RandomRotation(180),
            transforms.RandomInvert(0.3),
            transforms.RandomAdjustSharpness(2, 0.5),
            transforms.RandomAutocontrast(0.5),
            transforms.RandomEqualize(0.2),
            transforms.RandomResizedCrop(size_px, scale=scale),
            transforms.RandomHorizontalFlip(),
            transforms.RandomVerticalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.1, 0.4, 0.1, 0.1)], 0.8),
            transforms.RandomApply([transforms.GaussianBlur(11, (0.1, 5.0))], blur_probability),
            transforms.RandomSolarize(128, solarise_probability),
            transforms.ToTensor(),
            transforms.Lambda(to_network),
        ]
    )
    return compose


def view_transforms(geometry: ViewGeometry) -> list[Transform]:
    """Two global views and the local ones."""
    size, scale = geometry.global_px, geometry.global_scale
    views = [
        view_transform(size, scale, blur_probability=1.0, solarise_probability=0.0),
        view_transform(size, scale, blur_probability=0.1, solarise_probability=0.2),
    ]
    size, scale = geometry.local_px, geometry.local_scale
    local = view_transform(size, scale, blur_probability=0.5, solarise_probability=0.0)
    return views + [local] * geometry.num_local


class PilViews(Dataset[list[torch.Tensor]]):
    """Views of one cell at a time."""

    def __init__(self, crops_NCHW: npt.NDArray[np.uint8], geometry: ViewGeometry) -> None:
        self._crops = np.ascontiguousarray(crops_NCHW.transpose(0, 2, 3, 1))
        self._transforms = view_transforms(geometry)

    def __len__(self) -> int:
        """Number of cells."""
        return len(self._crops)

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        """All views of a cell, (C, S, S) float32 each."""
        image = Image.fromarray(self._crops[index])
        return [transform(image) for transform in self._transforms]


class ReferenceLoop:
    """Student, teacher and loader; one call is one step."""

    def __init__(
        self, settings: DinoSettings, crops_NCHW: npt.NDArray[np.uint8], device: torch.device, *, num_loaders: int
    ) -> None:
        self._settings, self._device = settings, device
        torch.manual_seed(settings.seed)
        backbone = build_backbone(settings.architecture, input_size_px=settings.geometry.global_px)
        head = DinoHead(
            embedding_width(backbone),
            hidden=settings.head_hidden,
            bottleneck=settings.head_bottleneck,
            prototypes=settings.prototypes,
        )
        self._student = DinoNetwork(backbone, head).to(device).train()
        self._teacher = teacher_of(self._student).train()
        self._loss = DinoLoss(settings.prototypes).to(device)
        self._optimizer = torch.optim.AdamW(self._student.parameters(), lr=settings.learning_rate)
        self._loader: DataLoader[Any] = DataLoader(
            PilViews(crops_NCHW, settings.geometry),
            batch_size=settings.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=num_loaders,
            persistent_workers=num_loaders > 0,
            pin_memory=device.type == "cuda",
        )
        self._batches = self._endless()

    def _endless(self) -> Iterator[list[torch.Tensor]]:
        for _ in itertools.count():
            yield from self._loader

    def step(self) -> None:
        """One update."""
        views = [view.to(self._device) for view in next(self._batches)]
        settings = self._settings
        with autocast(settings.precision, self._device):
            with torch.no_grad():
                (teacher_logits,), _ = self._teacher([torch.stack(views[:2])])
            logits, _ = self._student([torch.stack(views[:2]), torch.stack(views[2:])])
        teacher_logits = teacher_logits.float()
        probabilities = self._loss.teacher_probabilities(teacher_logits, settings.teacher_temperature)
        loss = self._loss(torch.cat([part.float() for part in logits]), probabilities)
        loss.item()  # the reference logs it
        self._optimizer.zero_grad()
        loss.backward()
        adaptive_clip_grad(self._student.parameters(), clip_factor=3.0)  # type: ignore[no-untyped-call]  # timm
        self._optimizer.step()
        with torch.no_grad():
            for kept, new in zip(self._teacher.parameters(), self._student.parameters(), strict=True):
                kept.data.mul_(settings.teacher_momentum).add_((1 - settings.teacher_momentum) * new.detach().data)
        self._loss.update_centre(teacher_logits)
