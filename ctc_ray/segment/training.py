"""The training loop of the segmenter, without Ray: resumable, seeded, on whatever device there is."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save

from ctc_ray.errors import StaleOutputError
from ctc_ray.segment.model import StarDist, native_bf16
from ctc_ray.segment.network import NetworkConfig, StarDistNetwork
from ctc_ray.segment.patches import Pair, PatchSampler
from ctc_ray.segment.scores import average_precision, optimise_thresholds
from ctc_ray.segment.targets import star_loss, star_targets
from ctc_ray.segment.weights import Thresholds, Weights, fingerprint_of, load_weights, save_folder, write_atomic

logger = logging.getLogger(__name__)
CHECKPOINT = "checkpoint.safetensors"
HISTORY = "history.jsonl"
PROVISIONAL = Thresholds(prob=0.5, nms=0.4)
"""Cuts for the progress figures, before the thresholds are chosen."""


@dataclass(frozen=True)
class Schedule:
    """How long and how a segmenter is trained.

    Source: stardist `Config2D` (Adam 3e-4, batches of 4 patches of 256x256). Departures: a learning rate that warms up
    and falls to zero over the last steps (the published one halves on plateaus over 40,000 steps or more), and a running
    mean of the weights, which is what is evaluated and saved.
    """

    steps: int = 4000
    batch_size: int = 4
    patch_px: int = 256
    learning_rate: float = 3e-4
    warmup_steps: int = 100
    decay_fraction: float = 0.3
    average_decay: float = 0.998
    foreground_fraction: float = 0.9
    scale_range: tuple[float, float] = (0.7, 1.4)
    checkpoint_steps: int = 250
    evaluate_steps: int = 500
    seed: int = 0

    def rate_at(self, step: int) -> float:
        """Learning rate of step 0, 1, ...: linear warm-up, constant, linear fall to zero over `decay_fraction`."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        left = (self.steps - step) / max(1.0, self.decay_fraction * self.steps)
        return self.learning_rate * min(warm, left, 1.0)


@dataclass
class TrainingState:
    """What a checkpoint holds: network, running mean of its weights, optimiser, next step."""

    network: StarDistNetwork
    average: StarDistNetwork
    optimiser: torch.optim.Adam
    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


def train(
    pairs: Sequence[Pair],
    held_out: Sequence[Pair],
    out: Path,
    *,
    schedule: Schedule,
    network: NetworkConfig,
    initial: str | Path | None = None,
    device: str | torch.device = "cpu",
    on_step: Callable[[int, float], None] | None = None,
) -> Thresholds:
    """Train a segmenter, or go on with the training that `out` holds.

    Args:
        pairs: images to learn from.
        held_out: images for the progress figures and the thresholds; no gradient comes from them.
        out: local folder: checkpoint, history (JSON lines: step, loss, rate, seconds, AP at IoU 0.5) and, at the end, the
            weight folder that `StarDist.load` reads.
        schedule: length, rates, seed.
        network: architecture.
        initial: weight folder to start from instead of random weights.
        device: where the network is trained; bfloat16 autocast where it is native.
        on_step: called after each step with the next step's number and the loss.

    Returns:
        Thresholds chosen on `held_out`.

    Raises:
        StaleOutputError: `out` holds a checkpoint of another schedule, architecture or data.
        WeightsError: `initial` cannot be read.
    """
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device(device)
    torch.manual_seed(schedule.seed)
    state = _new_state(network, initial, device)
    identity = _identity(schedule, network, pairs, initial)
    _restore(state, out, identity)
    sampler = PatchSampler(
        pairs,
        patch_px=schedule.patch_px,
        seed=schedule.seed,
        foreground_fraction=schedule.foreground_fraction,
        scale_range=schedule.scale_range,
    )
    started = time.monotonic()
    losses: list[float] = []
    for images, target_prob, target_dist in _batches(sampler, schedule, network, state.step, device):
        losses.append(_step(state, schedule, images, target_prob, target_dist))
        if on_step is not None:
            on_step(state.step, losses[-1])
        last = state.step == schedule.steps
        if last or state.step % schedule.evaluate_steps == 0:
            row = {"step": state.step, "loss": float(np.mean(losses)), "rate": schedule.rate_at(state.step - 1)}
            row |= {"seconds": time.monotonic() - started, "ap50": _progress(state, held_out)}
            state.history.append(row)
            losses.clear()
            logger.info("step %d: loss %.4f, AP50 %.3f on held-out images", state.step, row["loss"], row["ap50"])
        if last or state.step % schedule.checkpoint_steps == 0:
            save_checkpoint(state, out, identity)
            save_folder(state.average, PROVISIONAL, out / "latest")
    model = _as_model(state.average, PROVISIONAL)
    thresholds = optimise_thresholds(model, held_out)
    save_folder(state.average, thresholds, out)
    return thresholds


def _new_state(network: NetworkConfig, initial: str | Path | None, device: torch.device) -> TrainingState:
    trained, average = StarDistNetwork(network), StarDistNetwork(network)
    if initial is not None:
        trained.load_state_dict(load_weights(initial).network.state_dict())
    average.load_state_dict(trained.state_dict())
    trained.to(device).to(memory_format=torch.channels_last).train()
    average.to(device).to(memory_format=torch.channels_last).eval()
    return TrainingState(trained, average, torch.optim.Adam(trained.parameters(), lr=0.0, eps=1e-7))


def _batches(
    sampler: PatchSampler, schedule: Schedule, network: NetworkConfig, first_step: int, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    for step in range(first_step, schedule.steps):
        drawn = [sampler.draw(step * schedule.batch_size + index) for index in range(schedule.batch_size)]
        targets = [star_targets(labels, n_rays=network.n_rays, grid=network.grid) for _, labels in drawn]
        images = torch.from_numpy(np.stack([image for image, _ in drawn]))[:, None]
        prob = torch.from_numpy(np.stack([prob for prob, _ in targets]))[:, None]
        dist = torch.from_numpy(np.stack([dist for _, dist in targets])).permute(0, 3, 1, 2)
        yield images.to(device, memory_format=torch.channels_last), prob.to(device), dist.to(device)


def _step(
    state: TrainingState, schedule: Schedule, images: torch.Tensor, target_prob: torch.Tensor, target_dist: torch.Tensor
) -> float:
    for group in state.optimiser.param_groups:
        group["lr"] = schedule.rate_at(state.step)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=native_bf16(images.device)):
        logits, dist = state.network(images)
    loss = star_loss(logits, dist, target_prob, target_dist)
    state.optimiser.zero_grad(set_to_none=True)
    loss.total.backward()
    torch.nn.utils.clip_grad_norm_(state.network.parameters(), 5.0)
    state.optimiser.step()
    state.step += 1
    # A running mean over all steps at first, so that the random start is forgotten.
    decay = min(schedule.average_decay, state.step / (state.step + 10.0))
    with torch.no_grad():
        for mean, value in zip(state.average.parameters(), state.network.parameters(), strict=True):
            mean.lerp_(value, 1.0 - decay)
    return float(loss.total.detach())


def _as_model(network: StarDistNetwork, thresholds: Thresholds) -> StarDist:
    frozen = StarDistNetwork(network.config)
    frozen.load_state_dict({name: value.float().cpu() for name, value in network.state_dict().items()})
    device = next(network.parameters()).device
    return StarDist(Weights(frozen, thresholds, fingerprint_of(network, thresholds), "training"), device=device)


def _progress(state: TrainingState, held_out: Sequence[Pair]) -> float:
    model = _as_model(state.average, PROVISIONAL)
    found = [model.predict(pair.image).labels for pair in held_out]
    return average_precision([pair.labels for pair in held_out], found, iou=0.5)


def _identity(schedule: Schedule, network: NetworkConfig, pairs: Sequence[Pair], initial: str | Path | None) -> str:
    settings = {
        key: value
        for key, value in asdict(schedule).items()
        if not key.endswith(("evaluate_steps", "checkpoint_steps"))
    }
    start = None if initial is None else load_weights(initial).fingerprint
    return json.dumps([settings, asdict(network), [pair.name for pair in pairs], start], sort_keys=True)


def save_checkpoint(state: TrainingState, out: Path, identity: str) -> None:
    """Write network, running mean, Adam's moments and the step into one safetensors file, atomically."""
    tensors = {f"network.{name}": value for name, value in state.network.state_dict().items()}
    tensors |= {f"average.{name}": value for name, value in state.average.state_dict().items()}
    for index, moments in state.optimiser.state_dict()["state"].items():
        tensors |= {f"adam.{index}.{name}": value for name, value in moments.items()}
    metadata = {"step": str(state.step), "identity": identity}
    write_atomic(out / CHECKPOINT, save({name: value.cpu().contiguous() for name, value in tensors.items()}, metadata))
    write_atomic(out / HISTORY, "".join(json.dumps(row) + "\n" for row in state.history).encode())


def _restore(state: TrainingState, out: Path, identity: str) -> None:
    path = out / CHECKPOINT
    if not path.exists():
        return
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("identity") != identity:
            raise StaleOutputError(
                f"{path} belongs to a training with another schedule, architecture, start or data; "
                "give another output folder, or delete this one to begin anew"
            )
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    state.network.load_state_dict(_part(tensors, "network."))
    state.average.load_state_dict(_part(tensors, "average."))
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in _part(tensors, "adam.").items():
        index, key = name.split(".", 1)
        moments.setdefault(int(index), {})[key] = value
    optimiser: dict[str, Any] = state.optimiser.state_dict()
    state.optimiser.load_state_dict(optimiser | {"state": moments})
    state.step = int(metadata["step"])
    if (out / HISTORY).exists():
        rows = [json.loads(line) for line in (out / HISTORY).read_text().splitlines()]
        state.history = [row for row in rows if row["step"] <= state.step]


def _part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def steps_left(out: Path, schedule: Schedule) -> int:
    """Steps that a training in `out` still needs, for progress and `--dry-run`."""
    path = out / CHECKPOINT
    if not path.exists():
        return schedule.steps
    with safe_open(path, framework="pt") as file:
        return max(0, schedule.steps - int((file.metadata() or {}).get("step", 0)))
