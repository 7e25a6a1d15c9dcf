"""`ctc-ray train-segmenter IMAGES MASKS`: from folders of images and masks to a weight folder."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ctc_ray.config import RunConfig, TrainSegmenterConfig
from ctc_ray.progress import Progress
from ctc_ray.segment.network import NetworkConfig
from ctc_ray.segment.patches import split_pairs
from ctc_ray.segment.training_images import read_pairs
from ctc_ray.segment.training import Schedule, train
from ctc_ray.segment.training_checkpoint import steps_done
from ctc_ray.segment.weights import Thresholds


@dataclass(frozen=True)
class TrainedSegmenter:
    """What a training gave.

    Attributes:
        out: weight folder, readable by `StarDist.load`.
        steps: optimiser steps of the whole training.
        steps_now: those done by this call.
        images: images that were learned from.
        held_out: images for progress and thresholds.
        thresholds: chosen on the held-out images.
        seconds: of this call.
    """

    out: Path
    steps: int
    steps_now: int
    images: int
    held_out: int
    thresholds: Thresholds
    seconds: float


def run_train_segmenter(
    config: RunConfig, images: Path, masks: Path, out: Path, *, progress: Progress
) -> TrainedSegmenter:
    """Train a StarDist network, or go on with the training that `out` holds.

    Args:
        config: all settings; `train_segmenter` is used.
        images: folder of single-channel PNG or TIFF images.
        masks: folder of label images (0 background) with the same stems.
        out: folder for checkpoint, history and, at the end, the weights.
        progress: where to report.

    Raises:
        MissingInputError: a folder holds no images, or a mask is missing.
        CartridgeError: an image or mask cannot be read.
        StaleOutputError: `out` holds a training with other settings or data.
        WeightsError: the weights to start from cannot be read.
    """
    started = time.monotonic()
    section = config.train_segmenter
    kept, held_out = split_pairs(read_pairs(images, masks), fraction=section.held_out_fraction, seed=section.seed)
    schedule = schedule_of(section)
    left = schedule.steps - steps_done(out)
    network = NetworkConfig(
        n_rays=section.n_rays, unet_n_filter_base=section.n_filter_base, net_conv_after_unet=4 * section.n_filter_base
    )
    with progress.task("train segmenter", total=left) as task:
        thresholds = train(
            kept,
            held_out,
            out,
            schedule=schedule,
            network=network,
            initial=section.initial,
            device="cuda" if torch.cuda.is_available() else "cpu",
            on_step=lambda step, loss: task.advance(note=f"step {step}, loss {loss:.3f}"),
        )
    return TrainedSegmenter(out, schedule.steps, left, len(kept), len(held_out), thresholds, time.monotonic() - started)


def schedule_of(section: TrainSegmenterConfig) -> Schedule:
    """The training loop's schedule for a configuration."""
    return Schedule(
        steps=section.steps,
        batch_size=section.batch_size,
        patch_px=section.patch_size_px,
        learning_rate=section.learning_rate,
        warmup_steps=section.warmup_steps,
        decay_fraction=section.decay_fraction,
        checkpoint_steps=section.checkpoint_every,
        evaluate_steps=section.checkpoint_every,
        seed=section.seed,
    )
