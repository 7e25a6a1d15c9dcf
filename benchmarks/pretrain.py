"""Speed of pretraining: crops a second of a step and its parts, beside a loop written as the reference does it.

    python -m benchmarks.pretrain [--device cuda] [--sections step views workers head]

No Ray. Sections: `step` (a full step split into its parts, forward and backward alone, the reference's loop, share of the
machine's matrix products, hours of 30,000 steps), `views` (augmentation alone beside PIL), `workers` (two one-thread processes
with gloo beside one; CPU only), `head` (full steps by batch and number of prototypes). Ways are asked in turn, round after round;
a rate is the median of its rounds, a ratio the median of the rounds' ratios. All on phantom cells at 48 px and views of 48
and 24 px. Prints tables and writes `benchmarks/results/pretrain.json` (`pretrain_cuda.json`); sections that are not measured
again stay in the file as they were.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.pretrain_reference import PilViews, ReferenceLoop
from benchmarks.segment_accuracy import hardware
from ctc_ray.phantom import draw_crops
from ctc_ray.pretrain.augment import Augment, MarkerAugment
from ctc_ray.pretrain.intensity import IntensityRule, to_fraction
from ctc_ray.pretrain.monitor import measure
from ctc_ray.pretrain.paper_augment import PaperAugment
from ctc_ray.pretrain.precision import resolve_precision
from ctc_ray.pretrain.settings import MARKER, PAPER, DinoSettings
from ctc_ray.pretrain.trainer import DinoTrainer, ResidentCrops, World
from ctc_ray.records import library_versions

RULE: Final = IntensityRule("constants", (0.0,) * 3, (0.6,) * 3, 10.0)
SECTIONS: Final = ("step", "views", "workers", "head")
PROTOTYPES: Final = (65_536, 4_096, 2_048)
BATCHES: Final = (16, 32, 64, 128)
SMALL_VIEWS: Final = replace(PAPER.geometry, global_px=48, local_px=24)
"""The reference's shares of a crop at the sizes of `marker`."""
RUN_STEPS: Final = 30_000
_NOMINAL_BF16: Final = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 FLOP/s of the SXM boards by their makers' data sheets."""

Run = Callable[[], object]
Crops = npt.NDArray[np.uint8]


def now(device: torch.device) -> float:
    """Seconds, after everything asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def alternate(ways: Mapping[str, Run], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each way in each round, all ways in turn; one round before the clock runs."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, run in ways.items():
            started = now(device)
            run()
            if number:
                seconds[name].append(now(device) - started)
    return seconds


def ratio(above: list[float], below: list[float]) -> float:
    """Median over the rounds of one way's seconds over another's."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def trainer_of(settings: DinoSettings, device: torch.device, world: World | None = None) -> DinoTrainer:
    """A trainer past its frozen first steps, so that the prototypes are updated too."""
    return DinoTrainer(replace(settings, freeze_fraction=0.0), RULE, device=device, world=world)


def split_step(trainer: DinoTrainer, source: ResidentCrops) -> dict[str, float]:
    """Seconds of the parts of one full step."""
    device, times = trainer.device, [now(trainer.device)]
    crops = source.batch(trainer.step)
    times.append(now(device))
    views = trainer.views_of(crops)
    times.append(now(device))
    values = trainer.schedules.at(trainer.step)
    passed = trainer.forward(views, values)
    loss = float(passed.loss.detach())
    times.append(now(device))
    trainer.backward(passed.loss)
    times.append(now(device))
    norm = trainer.update(passed, values)
    times.append(now(device))
    measure(
        step=1,
        loss=loss,
        values=values,
        gradient_norm=norm,
        probabilities_TBK=passed.probabilities,
        centre_K=trainer.loss.centre,
        features_BD=passed.teacher_features,
        num_crops=len(crops),
        seconds=1.0,
    )
    times.append(now(device))
    trainer.step += 1
    names = ("data", "augmentation", "forward", "backward", "optimiser, teacher and centre", "monitor")
    return {name: b - a for name, a, b in zip(names, times[:-1], times[1:], strict=True)}


def matrix_flops(device: torch.device, precision: str) -> float:
    """FLOP/s of a large square matrix product, the most that a step could have."""
    side = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = alternate({"product": lambda: left @ right}, 7, device)["product"]
    return 2.0 * side**3 / min(seconds)


def measure_step(
    settings: DinoSettings, crops: Crops, device: torch.device, *, rounds: int, loaders: int, compiled: bool
) -> Any:
    """Full steps, their parts, forward and backward alone, and the reference's loop; on request compiled steps too."""
    batch = settings.batch_size
    source = ResidentCrops(crops, batch_size=batch, seed=0, device=device)
    marker = trainer_of(settings, device)
    as_reference = replace(settings, preset="paper", geometry=SMALL_VIEWS, clip="agc")
    paper = trainer_of(as_reference, device)
    reference = ReferenceLoop(as_reference, crops, device, num_loaders=loaders)
    views, values = marker.views_of(source.batch(0)), marker.schedules.at(0)

    def forward_backward() -> None:
        marker.backward(marker.forward(views, values).loss)

    ways: dict[str, Run] = {
        "full step, marker": lambda: marker.train_step(source.batch(marker.step)),
        "forward and backward alone": forward_backward,
        "full step, paper": lambda: paper.train_step(source.batch(paper.step)),
        "reference's loop": reference.step,
    }
    if compiled:
        ways["full step, marker, torch.compile"], warmup_s = compiled_step(settings, source, device)
    seconds = alternate(ways, rounds, device)
    parts = [split_step(marker, source) for _ in range(rounds)]
    per_step = statistics.median(seconds["full step, marker"])
    report: dict[str, Any] = {"batch": batch, "prototypes": settings.prototypes, "precision": settings.precision}
    report |= {"loader_processes_of_reference": loaders}
    report |= {"crops_per_second": {name: batch / statistics.median(runs) for name, runs in seconds.items()}}
    report |= {
        "part_ms_per_crop": {name: 1e3 / batch * statistics.median(part[name] for part in parts) for name in parts[0]},
        "share_of_forward_backward": ratio(seconds["forward and backward alone"], seconds["full step, marker"]),
        "paper_over_reference": ratio(seconds["reference's loop"], seconds["full step, paper"]),
        "marker_over_reference": ratio(seconds["reference's loop"], seconds["full step, marker"]),
    }
    report |= share_of_peak(marker, source, per_step)
    if compiled:
        faster = ratio(seconds["full step, marker"], seconds["full step, marker, torch.compile"])
        report |= {"compile_warmup_s": warmup_s, "compiled_over_plain": faster}
    if device.type == "cuda":
        report["published_size"] = measure_published_size(crops, device, settings.precision)
    return report


def share_of_peak(trainer: DinoTrainer, source: ResidentCrops, seconds: float) -> dict[str, float]:
    """Arithmetic of a step that takes so many seconds, beside what the machine can do, and the time of a long run."""
    with FlopCounterMode(display=False) as counter:
        trainer.train_step(source.batch(trainer.step))
    flops = counter.get_total_flops()
    peak = matrix_flops(trainer.device, trainer.settings.precision)
    found = {"gflop_per_crop": flops / trainer.settings.batch_size / 1e9, "matrix_product_tflops": peak / 1e12}
    found |= {"share_of_matrix_product": flops / seconds / peak, "hours_of_30000_steps": RUN_STEPS * seconds / 3600}
    if trainer.device.type == "cuda":
        name = torch.cuda.get_device_name(trainer.device)
        for board, nominal in _NOMINAL_BF16.items():
            if board in name:
                found["share_of_nominal_bf16"] = flops / seconds / nominal
    return found


def compiled_step(settings: DinoSettings, source: ResidentCrops, device: torch.device) -> tuple[Run, float]:
    """A step whose backbones `torch.compile` has translated, and the seconds of its first."""
    trainer = trainer_of(settings, device)
    for network in (trainer.student, trainer.teacher):
        network.backbone.compile(dynamic=False)  # in place: the weights keep their names
    started = now(device)
    trainer.train_step(source.batch(trainer.step))
    return lambda: trainer.train_step(source.batch(trainer.step)), now(device) - started


def measure_published_size(crops: Crops, device: torch.device, precision: Any) -> dict[str, float]:
    """The `paper` preset as published: views of 256 and 85 px, 65,536 prototypes, batch 128."""
    trainer = trainer_of(replace(PAPER, precision=precision), device)
    source = ResidentCrops(crops, batch_size=PAPER.batch_size, seed=0, device=device)
    runs = alternate({"step": lambda: trainer.train_step(source.batch(trainer.step))}, 5, device)["step"]
    seconds = statistics.median(runs)
    return {"crops_per_second": PAPER.batch_size / seconds, "hours_of_30000_steps": RUN_STEPS * seconds / 3600}


def measure_views(crops: Crops, device: torch.device, rounds: int, batch: int) -> Any:
    """Views alone: batched, and PIL on one core."""
    geometry = SMALL_VIEWS
    fraction = to_fraction(crops[:batch]).to(device)
    generator = torch.Generator(device=device).manual_seed(0)
    batched: dict[str, Augment] = {"marker": MarkerAugment(RULE), "paper": PaperAugment(geometry)}
    pil = PilViews(crops, geometry)
    ways: dict[str, Run] = {
        name: lambda augment=augment: augment(fraction, generator)  # type: ignore[misc]  # bound early
        for name, augment in batched.items()
    }
    ways["PIL"] = lambda: [pil[index] for index in range(batch)]
    seconds = alternate(ways, rounds, device)
    return {
        "batch": batch,
        "crops_per_second": {name: batch / statistics.median(runs) for name, runs in seconds.items()},
        "marker_over_pil": ratio(seconds["PIL"], seconds["marker"]),
        "paper_over_pil": ratio(seconds["PIL"], seconds["paper"]),
    }


def _worker(rank: int, rendezvous: str, out: str, settings: DinoSettings, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    crops, _ = draw_crops(2 * settings.batch_size, seed=rank, patient="speed")
    device, batch = torch.device("cpu"), settings.batch_size
    source = ResidentCrops(crops, batch_size=batch, seed=0)
    alone, together = trainer_of(settings, device), trainer_of(settings, device, World(rank, 2))

    def one() -> None:
        if rank == 0:
            alone.train_step(source.batch(alone.step))

    ways: dict[str, Run] = {
        "one": one,
        "two, a batch each": lambda: together.train_step(source.batch(together.step)),
        "two, half a batch each": lambda: together.train_step(source.batch(together.step)[: batch // 2]),
    }
    # The other process sleeps at the barrier while one works.
    seconds = alternate({name: lambda run=run: (run(), dist.barrier()) for name, run in ways.items()}, rounds, device)  # type: ignore[misc]  # bound early
    if rank == 0:
        Path(out).write_text(json.dumps(seconds))
    dist.destroy_process_group()


def measure_workers(settings: DinoSettings, rounds: int) -> Any:
    """Two one-thread processes with gloo, beside one."""
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/seconds.json"
        spawn(_worker, args=(f"{folder}/rendezvous", out, settings, rounds), nprocs=2)
        seconds = json.loads(Path(out).read_text())
    batch = settings.batch_size
    crops = {"one": batch, "two, a batch each": 2 * batch, "two, half a batch each": batch}
    return {
        "batch": batch,
        "prototypes": settings.prototypes,
        "crops_per_second": {name: crops[name] / statistics.median(runs) for name, runs in seconds.items()},
        "two_over_one": 2.0 * ratio(seconds["one"], seconds["two, a batch each"]),
        "two_over_one_same_batch": ratio(seconds["one"], seconds["two, half a batch each"]),
    }


def measure_head(settings: DinoSettings, crops: Crops, device: torch.device, rounds: int) -> Any:
    """Full steps by batch and prototypes."""
    trainers = {number: trainer_of(replace(settings, prototypes=number), device) for number in PROTOTYPES}
    rows = []
    for batch in BATCHES:
        source = ResidentCrops(crops, batch_size=batch, seed=0, device=device)
        ways: dict[str, Run] = {
            str(number): lambda trainer=trainer, source=source: trainer.train_step(source.batch(trainer.step))  # type: ignore[misc]  # bound early
            for number, trainer in trainers.items()
        }
        seconds = alternate(ways, rounds, device)
        for number in PROTOTYPES:
            own = seconds[str(number)]
            row = {"batch": batch, "prototypes": number, "crops_per_second": batch / statistics.median(own)}
            rows.append(row | {"seconds_over_2048": ratio(own, seconds["2048"])})
            print(
                "  batch {batch:4} prototypes {prototypes:6} {crops_per_second:8.1f} crops/s".format(**row), flush=True
            )
    return {"hidden": settings.head_hidden, "rows": rows}


def show(section: str, report: Mapping[str, Any]) -> None:
    """Print a section's figures, one a line."""
    print(section)
    for name, value in report.items():
        if isinstance(value, Mapping):
            print(f"  {name}")
            for key, figure in value.items():
                print(f"    {key:32} {figure:10.3f}")
        elif not isinstance(value, list):
            print(f"  {name:34} {value:10.3f}" if isinstance(value, float) else f"  {name:34} {value!s:>10}")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=SECTIONS)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prototypes", type=int, default=MARKER.prototypes)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--loaders", type=int, default=None, help="of the reference's loop; 0 on CPU, 3 on CUDA")
    parser.add_argument("--compile", action="store_true", help="measure steps under torch.compile too")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    precision = resolve_precision("auto", device)
    settings = replace(MARKER, batch_size=arguments.batch, prototypes=arguments.prototypes, precision=precision)
    drawn, _ = draw_crops(max(512, 2 * arguments.batch), seed=0, patient="speed")
    crops = drawn.astype(np.uint8, copy=False)
    loaders = arguments.loaders if arguments.loaders is not None else (3 if device.type == "cuda" else 0)
    measures: dict[str, Run] = {
        "step": lambda: measure_step(
            settings, crops, device, rounds=arguments.rounds, loaders=loaders, compiled=arguments.compile
        ),
        "views": lambda: measure_views(crops, device, arguments.rounds, arguments.batch),
        "workers": lambda: measure_workers(settings, arguments.rounds),
        "head": lambda: measure_head(settings, crops, device, min(arguments.rounds, 3)),
    }
    out = arguments.out or Path(__file__).parent / "results" / f"pretrain{'_cuda' * (device.type == 'cuda')}.json"
    report = json.loads(out.read_text()) if out.is_file() else {}
    for section in arguments.sections:
        if section == "workers" and device.type == "cuda":
            continue  # one process per GPU; there is one GPU
        found: Any = measures[section]()
        report[section] = found | {"threads": arguments.threads, "rounds": arguments.rounds}
        show(section, report[section])
        about = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
        report |= {"versions": library_versions(), "hardware": hardware() | about}
        out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
