"""`ctc-ray train-segmenter IMAGES MASKS`: from images and masks to a weight folder, with Ray Train or without."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ctc_ray.config import RunConfig, TrainSegmenterConfig
from ctc_ray.errors import MissingInputError, ResourceError, TooManyFailuresError
from ctc_ray.progress import Progress, Task
from ctc_ray.records import FailureRow, write_failures
from ctc_ray.segment.network import NetworkConfig
from ctc_ray.segment.patches import split_pairs
from ctc_ray.segment.training import Schedule, train
from ctc_ray.segment.training_checkpoint import steps_done
from ctc_ray.segment.training_images import Pair, PairFiles, find_pairs, read_usable_pairs
from ctc_ray.segment.weights import Thresholds, load_weights
from ctc_ray.storage import Store

STAGE = "train-segmenter"
STATE_FOLDER = ".ray"
"""Below the output folder: progress, errors and Ray's own notes of a training under way."""
_FileAndPair = tuple[PairFiles, Pair]


@dataclass(frozen=True)
class TrainedSegmenter:
    """What a training gave.

    Attributes:
        out: weight folder, readable by `StarDist.load`.
        steps: optimiser steps of the whole training.
        steps_now: those done by this call.
        images: images that were learned from.
        held_out: images for progress and thresholds.
        set_aside: images that could not be used; `failures/train-segmenter/images.parquet` in `out` says why.
        thresholds: chosen on the held-out images.
        seconds: of this call.
    """

    out: Path
    steps: int
    steps_now: int
    images: int
    held_out: int
    set_aside: int
    thresholds: Thresholds
    seconds: float


def run_train_segmenter(
    config: RunConfig, images: Path, masks: Path, out: Path, *, progress: Progress, local: bool = False
) -> TrainedSegmenter:
    """Train a StarDist network, or go on with the training that `out` holds.

    Args:
        config: all settings; `train_segmenter` is used.
        images: folder of single-channel PNG or TIFF images, or of phantom cartridges; see `find_pairs`.
        masks: folder of label images (0 background) with the same stems.
        out: folder for checkpoint, history and, at the end, the weights. With Ray on several machines, all of them must
            see the three folders.
        progress: where to report.
        local: train in this process; else with Ray Train, to which the caller is connected.

    Raises:
        MissingInputError: a folder holds no images, a mask is missing, or nothing is left to learn from.
        SchemaError: two images have one name.
        TooManyFailuresError: more images than `max_failure_fraction` cannot be used.
        ConfigError: the batch does not divide among the workers.
        ResourceError: the cluster is too small, or workers kept failing.
        StaleOutputError: `out` holds a training with other settings or data.
        WeightsError: the weights to start from cannot be read, or the loss is not finite.
    """
    started = time.monotonic()
    section = config.train_segmenter
    out = out.absolute()
    kept, held_out, failures = _read(section, images.absolute(), masks.absolute(), out, progress)
    done = steps_done(out)
    train_where = _train_here if local else _train_on_cluster
    with progress.task("train segmenter", total=section.steps) as task:
        task.advance(done)
        thresholds = train_where(section, kept, held_out, out, task)
    return TrainedSegmenter(
        out=out,
        steps=section.steps,
        steps_now=section.steps - done,
        images=len(kept),
        held_out=len(held_out),
        set_aside=len(failures),
        thresholds=thresholds,
        seconds=time.monotonic() - started,
    )


def _read(
    section: TrainSegmenterConfig, images: Path, masks: Path, out: Path, progress: Progress
) -> tuple[list[_FileAndPair], list[_FileAndPair], list[FailureRow]]:
    """The usable pairs, to learn from and held out, and what is wrong with the others."""
    files = find_pairs(images, masks, mask_suffix=section.mask_suffix)
    usable, failures = read_usable_pairs(files, page=section.page, allow_empty=section.empty_masks == "background")
    write_failures(Store(out), STAGE, "images", failures)
    for row in failures:
        progress.say(f"  set aside: {row.message}")
    if len(failures) > section.max_failure_fraction * len(files):
        raise TooManyFailuresError(
            f"{len(failures)} of {len(files)} images cannot be used, more than train_segmenter.max_failure_fraction "
            f"{section.max_failure_fraction:g} allows. The first: {failures[0].message}. All are listed in "
            f"{out}/failures/{STAGE}/"
        )
    kept, held_out = split_pairs(usable, fraction=section.held_out_fraction, seed=section.seed)
    for what, part in (("to learn from", kept), ("held out", held_out)):
        if not any(pair.labels.any() for _, pair in part):
            raise MissingInputError(f"none of the {len(part)} images {what} in {images} has an object in its mask")
    return kept, held_out, failures


def _train_here(
    section: TrainSegmenterConfig,
    kept: Sequence[_FileAndPair],
    held_out: Sequence[_FileAndPair],
    out: Path,
    task: Task,
) -> Thresholds:
    available = torch.cuda.is_available()
    if section.use_gpu and not available:
        raise ResourceError("train_segmenter.use_gpu is true and torch finds no GPU here: set it to false")
    if section.num_threads is not None:
        torch.set_num_threads(section.num_threads)
    return train(
        [pair for _, pair in kept],
        [pair for _, pair in held_out],
        out,
        schedule=schedule_of(section),
        network=network_of(section),
        initial=section.initial,
        device="cuda" if available and section.use_gpu is not False else "cpu",
        on_step=lambda step, loss: task.advance(note=f"step {step}, loss {loss:.3f}"),
    )


def _train_on_cluster(
    section: TrainSegmenterConfig,
    kept: Sequence[_FileAndPair],
    held_out: Sequence[_FileAndPair],
    out: Path,
    task: Task,
) -> Thresholds:
    # Only here: a training without Ray needs none of it.
    from ctc_ray.segment.training_launch import check_resources, fit, threads_of_worker
    from ctc_ray.segment.training_worker import TrainingPlan

    check_resources(section)
    plan = TrainingPlan(
        pairs=tuple(files for files, _ in kept),
        held_out=tuple(files for files, _ in held_out),
        page=section.page,
        out=out,
        state=out / STATE_FOLDER,
        schedule=schedule_of(section),
        network=network_of(section),
        initial=section.initial,
        num_threads=threads_of_worker(section),
    )
    fit(plan, section, task)
    return load_weights(out).thresholds


def network_of(section: TrainSegmenterConfig) -> NetworkConfig:
    """The architecture for a configuration."""
    return NetworkConfig(
        n_rays=section.n_rays, unet_n_filter_base=section.n_filter_base, net_conv_after_unet=4 * section.n_filter_base
    )


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
        precision=section.precision,
    )
