"""Train the encoder that ships with the package, on phantom cells, with the Ray-free loop.

Run: python -m benchmarks.train_default_encoder --work FOLDER [--steps N] [--preset paper] [--publish]

Stopping and running again continues from the last checkpoint in FOLDER. Crops: all kinds of object evenly, from many
patients; a share has its channels permuted or varied (alike in all views), so that the encoder serves cells whose
channels mean something else. With `--publish` the result replaces `ctc_ray/pretrain/default_encoder`. `--preset paper` trains with the
reference's augmentations and intensity rule instead, all else alike (48 px, crops, steps, head, schedules), for
`benchmarks/representation.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage

from ctc_ray.phantom import CellKind, draw_crops
from ctc_ray.pretrain.checkpoint import CheckpointFolder
from ctc_ray.pretrain.encoder import DEFAULT_FOLDER, EncoderSpec, embedding_width, encode_encoder
from ctc_ray.pretrain.intensity import IntensityRule, constants_from_histogram, fraction_histogram
from ctc_ray.pretrain.monitor import StepMetrics
from ctc_ray.pretrain.precision import resolve_precision
from ctc_ray.pretrain.settings import MARKER, PAPER, DinoSettings, Preset
from ctc_ray.pretrain.trainer import DinoTrainer, ResidentCrops, train
from ctc_ray.records import digest_of
from ctc_ray.storage import Store

COMPRESSION = 3.0
PERMUTED_SHARE = 0.3


def training_crops(num: int, seed: int, *, varied_share: float = 0.0) -> npt.NDArray[np.uint8]:
    """Phantom crops (num, 3, 48, 48), kinds evenly, a share with permuted channels."""
    rng = np.random.default_rng(seed)
    parts, chunk = [], 1024
    for index in range(0, num, chunk):
        part, _ = draw_crops(
            min(chunk, num - index),
            seed=seed + index,
            kinds=dict.fromkeys(CellKind, 1.0),
            patient=f"default-{index // chunk:04d}",
        )
        parts.append(part)
    crops = np.concatenate(parts)
    permuted = rng.random(num) < PERMUTED_SHARE
    order = rng.permuted(np.tile(np.arange(crops.shape[1]), (num, 1)), axis=1)
    order[~permuted] = np.arange(crops.shape[1])
    shuffled = np.ascontiguousarray(np.take_along_axis(crops, order[:, :, None, None], axis=1))
    return varied(shuffled.astype(np.uint8), rng, varied_share)


def varied(crops_NCHW: npt.NDArray[np.uint8], rng: np.random.Generator, share: float) -> npt.NDArray[np.uint8]:
    """Vary the channels of a share of the crops, as if they came from other instruments; whole numbers of 8 bit again.

    A channel is taken from another crop, shown as relief or as its negative (as in bright field), or made brighter or dimmer.
    """
    out = crops_NCHW.copy()
    num, channels = out.shape[:2]
    chosen = rng.random(num) < share
    for channel in range(channels):
        foreign = chosen & (rng.random(num) < 0.4)
        out[foreign, channel] = crops_NCHW[rng.integers(0, num, foreign.sum()), channel]
        kind, gain = rng.random(num), np.exp2(rng.uniform(-2.0, 1.0, num))
        for index in np.flatnonzero(chosen):
            plane = out[index, channel].astype(np.float32)
            if kind[index] < 0.15:
                plane = plane.mean() + 4.0 * (plane - ndimage.gaussian_filter(plane, 1.5)) + 64.0
            elif kind[index] < 0.3:
                plane = plane.max() - plane + 3.0
            elif kind[index] < 0.65:
                plane = (plane - 3.0) * gain[index] + 3.0
            out[index, channel] = np.clip(np.round(plane), 0, 255)
    return out


def measured_rule(seed: int) -> IntensityRule:
    """Intensity constants of unpermuted phantom cells, kinds evenly."""
    crops, _ = draw_crops(4000, seed=seed, kinds=dict.fromkeys(CellKind, 1.0))
    return constants_from_histogram(fraction_histogram(crops), compression=COMPRESSION)


def write_encoder(trainer: DinoTrainer, folder: Path, provenance: dict[str, Any]) -> EncoderSpec:
    """Write the teacher's backbone as float16 weights."""
    backbone = trainer.teacher.backbone
    spec = EncoderSpec(
        architecture=trainer.settings.architecture,
        channels=trainer.settings.channels,
        input_size_px=trainer.settings.geometry.global_px,
        width=embedding_width(backbone),
        intensity=trainer.rule,
        provenance=provenance | {"steps": trainer.step},
    )
    files, stored = encode_encoder(backbone, spec, dtype=torch.float16)
    store = Store(folder)
    for name, data in files.items():
        store.write_bytes(name, data)
    return stored


def run_settings(preset: Preset, arguments: argparse.Namespace, device: torch.device) -> DinoSettings:
    """Settings of the run: those of `marker`, and for `paper` the same with its views, at our sizes, in place of ours."""
    px = {"global_px": MARKER.geometry.global_px, "local_px": MARKER.geometry.local_px}
    return dataclasses.replace(
        MARKER,
        preset=preset,
        input_px=MARKER.input_px,
        geometry=MARKER.geometry if preset == "marker" else dataclasses.replace(PAPER.geometry, **px),
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        prototypes=2048,
        head_hidden=512,
        head_bottleneck=128,
        seed=arguments.seed,
        precision=resolve_precision("auto", device),
    )


def main(argv: list[str] | None = None) -> None:
    """Train, keep checkpoints and metrics in the work folder, write the encoder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--preset", choices=("marker", "paper"), default="marker")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--crops", type=int, default=26_000)
    parser.add_argument("--varied-share", type=float, default=0.0, help="crops whose channels are varied one by one")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--snapshot-every", type=int, default=100)
    parser.add_argument("--stop-at", type=int, default=None, help="stop before this step, and go on another time")
    parser.add_argument("--compile", action="store_true", help="torch.compile both backbones; needs a C++ compiler")
    parser.add_argument("--publish", action="store_true")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    arguments.work.mkdir(parents=True, exist_ok=True)
    settings = run_settings(arguments.preset, arguments, device)
    started = time.perf_counter()
    rule = measured_rule(arguments.seed) if arguments.preset == "marker" else IntensityRule("reference")
    crops = training_crops(arguments.crops, arguments.seed, varied_share=arguments.varied_share)
    print(f"{len(crops)} crops in {time.perf_counter() - started:.0f} s; {rule}", flush=True)
    trainer = DinoTrainer(settings, rule, device=device)
    source = ResidentCrops(crops, batch_size=settings.batch_size, seed=settings.seed, device=device)
    identity = digest_of(json.loads(json.dumps(dataclasses.asdict(settings))) | {"rule": rule.to_json()})
    folder = CheckpointFolder(Store(arguments.work), "checkpoints", identity=identity)
    found = folder.latest()
    if found is not None:
        trainer.load(found.tensors, found.step)
        print(f"continuing at step {found.step}", flush=True)
    if arguments.compile:
        trainer.student.backbone.compile(dynamic=False)
        trainer.teacher.backbone.compile(dynamic=False)
    provenance = {
        "made_by": "benchmarks/train_default_encoder.py",
        "data": f"{arguments.crops} phantom crops, all kinds evenly, {PERMUTED_SHARE:.0%} with permuted channels, "
        f"{arguments.varied_share:.0%} with channels of other crops, relief, negatives or other gains",
        "settings": dataclasses.asdict(settings),
    }

    def checkpoint(at: DinoTrainer) -> None:
        folder.save(at.step, at.tensors(), {})
        write_encoder(at, arguments.work / f"encoder-{at.step:06d}", provenance)

    def report(metrics: StepMetrics) -> None:
        with (arguments.work / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics.to_json()) + "\n")
        if metrics.step % 25 == 0:
            print(
                f"{metrics.step} loss {metrics.loss:.3f} teacher {metrics.teacher_entropy:.2f} marginal "
                f"{metrics.marginal_entropy:.2f} rank {metrics.feature_rank:.1f} grad {metrics.gradient_norm:.2f} "
                f"{metrics.crops_per_second:.1f}/s",
                flush=True,
            )

    train(
        trainer,
        source,
        checkpoint=checkpoint,
        checkpoint_every=arguments.snapshot_every,
        on_step=report,
        until=arguments.stop_at,
    )
    stored = write_encoder(trainer, DEFAULT_FOLDER if arguments.publish else arguments.work / "encoder", provenance)
    print(f"encoder {stored.fingerprint} after {trainer.step} steps in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
