"""The training loop of the segmenter, without Ray: resumable, seeded, on whatever device there is."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ctc_ray.errors import ConfigError, WeightsError
from ctc_ray.segment.model import StarDist, resolve_precision
from ctc_ray.segment.network import NetworkConfig, StarDistNetwork
from ctc_ray.segment.patches import PatchSampler
from ctc_ray.segment.scores import average_precision, optimise_thresholds
from ctc_ray.segment.targets import star_loss, star_targets
from ctc_ray.segment.training_checkpoint import TrainingState, restore, save_checkpoint
from ctc_ray.segment.training_images import Pair
from ctc_ray.segment.training_world import Alone, World
from ctc_ray.segment.weights import Thresholds, Weights, fingerprint_of, load_weights, save_folder

logger = logging.getLogger(__name__)
PROVISIONAL = Thresholds(prob=0.5, nms=0.4)
"""Cuts for the progress figures, before the thresholds are chosen."""
_MAX_GRADIENT_NORM = 5.0
_BESIDE_IDENTITY = ("evaluate_steps", "checkpoint_steps")


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
    precision: str = "auto"

    def rate_at(self, step: int) -> float:
        """Learning rate of step 0, 1, ...: linear warm-up, constant, linear fall to zero over `decay_fraction`."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        left = (self.steps - step) / max(1.0, self.decay_fraction * self.steps)
        return self.learning_rate * min(warm, left, 1.0)

    def identity(self) -> dict[str, Any]:
        """What determines the result, as JSON-like values."""
        values = {key: value for key, value in asdict(self).items() if key not in _BESIDE_IDENTITY}
        # Checkpoints from before this setting do not name it, and are of this kind.
        return values if self.precision != "auto" else {k: v for k, v in values.items() if k != "precision"}


def train(
    pairs: Sequence[Pair],
    held_out: Sequence[Pair],
    out: Path,
    *,
    schedule: Schedule,
    network: NetworkConfig,
    initial: str | Path | None = None,
    device: str | torch.device = "cpu",
    world: World | None = None,
    on_step: Callable[[int, float], None] | None = None,
    on_checkpoint: Callable[[int], None] | None = None,
) -> Thresholds:
    """Train a segmenter, or go on with the training that `out` holds.

    Args:
        pairs: images to learn from.
        held_out: images for the progress figures and the thresholds; no gradient comes from them. Only process 0 of a
            world looks at them.
        out: local folder: checkpoint, history (JSON lines: step, loss, rate, seconds of training, AP at IoU 0.5) and, at
            the end, the weight folder that `StarDist.load` reads. Process 0 writes.
        schedule: length, rates, seed, precision.
        network: architecture.
        initial: weight folder to start from instead of random weights.
        device: where the network is trained.
        world: processes that share each batch; None is this process alone. N processes with N equal shares of a batch
            take the step that one process takes with the whole batch, up to rounding.
        on_step: called after each step with the number of steps done and the loss.
        on_checkpoint: called by every process after a checkpoint with the number of steps done.

    Returns:
        Thresholds chosen on `held_out`.

    Raises:
        ConfigError: the batch does not divide among the processes, or the precision is unknown.
        StaleOutputError: `out` holds a checkpoint of another schedule, architecture or data.
        WeightsError: `initial` or the checkpoint cannot be read, or the loss is not finite.
    """
    world, device = world or Alone(), torch.device(device)
    if schedule.batch_size % world.size:
        raise ConfigError(f"a batch of {schedule.batch_size} patches does not divide among {world.size} processes")
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(schedule.seed)
    state = _new_state(network, initial, device)
    identity = _identity(schedule, network, pairs, initial)
    restore(state, out, identity, world, device)
    clock = _Clock(state.history)
    losses: list[float] = []
    for batch in _batches(pairs, schedule, network, state.step, world, device):
        losses.append(_step(state, schedule, batch, world))
        if on_step is not None:
            on_step(state.step, losses[-1])
        last = state.step == schedule.steps
        if last or state.step % schedule.evaluate_steps == 0:
            if world.rank == 0:
                state.history.append(_measure(state, schedule, losses, clock, held_out))
            losses.clear()
        if last or state.step % schedule.checkpoint_steps == 0:
            if world.rank == 0:
                save_checkpoint(state, out, identity)
                save_folder(state.average, PROVISIONAL, out / "latest")
            if on_checkpoint is not None:
                on_checkpoint(state.step)
    return _finish(state, out, held_out, world, device)


def _finish(
    state: TrainingState, out: Path, held_out: Sequence[Pair], world: World, device: torch.device
) -> Thresholds:
    chosen = b""
    if world.rank == 0:
        thresholds = optimise_thresholds(_as_model(state.average, PROVISIONAL), held_out)
        save_folder(state.average, thresholds, out)
        chosen = json.dumps(asdict(thresholds)).encode()
    return Thresholds(**json.loads(world.share(chosen, device)))


class _Clock:
    """Seconds of training, those of earlier runs included."""

    def __init__(self, history: list[dict[str, float]]) -> None:
        self._before = history[-1]["seconds"] if history else 0.0
        self._started = time.monotonic()

    def seconds(self) -> float:
        return self._before + time.monotonic() - self._started


def _new_state(network: NetworkConfig, initial: str | Path | None, device: torch.device) -> TrainingState:
    trained, average = StarDistNetwork(network), StarDistNetwork(network)
    if initial is not None:
        weights = load_weights(initial)
        if weights.network.config != network:
            raise WeightsError(
                f"the weights to start from, {initial}, are of another architecture: {weights.network.config}, "
                f"and not {network}; leave train_segmenter.n_rays and n_filter_base at theirs"
            )
        trained.load_state_dict(weights.network.state_dict())
    average.load_state_dict(trained.state_dict())
    trained.to(device).to(memory_format=torch.channels_last).train()
    average.to(device).to(memory_format=torch.channels_last).eval()
    return TrainingState(trained, average, torch.optim.Adam(trained.parameters(), lr=0.0, eps=1e-7))


_Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _batches(
    pairs: Sequence[Pair],
    schedule: Schedule,
    network: NetworkConfig,
    first_step: int,
    world: World,
    device: torch.device,
) -> Iterator[_Batch]:
    """This process's share of each batch: images, target probabilities, target distances."""
    sampler = PatchSampler(
        pairs,
        patch_px=schedule.patch_px,
        seed=schedule.seed,
        foreground_fraction=schedule.foreground_fraction,
        scale_range=schedule.scale_range,
    )
    share = schedule.batch_size // world.size
    for step in range(first_step, schedule.steps):
        first = step * schedule.batch_size + world.rank * share
        drawn = [sampler.draw(first + index) for index in range(share)]
        targets = [star_targets(labels, n_rays=network.n_rays, grid=network.grid) for _, labels in drawn]
        images = torch.from_numpy(np.stack([image for image, _ in drawn]))[:, None]
        prob = torch.from_numpy(np.stack([prob for prob, _ in targets]))[:, None]
        dist = torch.from_numpy(np.stack([dist for _, dist in targets])).permute(0, 3, 1, 2)
        yield images.to(device, memory_format=torch.channels_last), prob.to(device), dist.to(device)


def _step(state: TrainingState, schedule: Schedule, batch: _Batch, world: World) -> float:
    """One step of Adam on the gradient of the whole batch; returns its loss."""
    images, target_prob, target_dist = batch
    for group in state.optimiser.param_groups:
        group["lr"] = schedule.rate_at(state.step)
    # The loss divides by this mean; with the share's own, the mean of gradients would not be the batch's gradient.
    foreground = target_prob.mean()
    world.average([foreground])
    half = resolve_precision(schedule.precision, images.device) == "bf16"
    with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
        logits, dist = state.network(images)
    loss = star_loss(logits, dist, target_prob, target_dist, foreground_mean=foreground)
    state.optimiser.zero_grad(set_to_none=True)
    loss.total.backward()
    total = loss.total.detach().clone()
    world.average([value.grad for value in state.network.parameters() if value.grad is not None] + [total])
    if not math.isfinite(float(total)):
        raise WeightsError(
            f"the loss of step {state.step + 1} is {float(total)}: lower train_segmenter.learning_rate, or look for "
            "images with extreme values; the last checkpoint is from before"
        )
    torch.nn.utils.clip_grad_norm_(state.network.parameters(), _MAX_GRADIENT_NORM)
    state.optimiser.step()
    state.step += 1
    # A running mean over all steps at first, so that the random start is forgotten.
    decay = min(schedule.average_decay, state.step / (state.step + 10.0))
    with torch.no_grad():
        for mean, value in zip(state.average.parameters(), state.network.parameters(), strict=True):
            mean.lerp_(value, 1.0 - decay)
    return float(total)


def _as_model(network: StarDistNetwork, thresholds: Thresholds) -> StarDist:
    frozen = StarDistNetwork(network.config)
    frozen.load_state_dict({name: value.float().cpu() for name, value in network.state_dict().items()})
    device = next(network.parameters()).device
    return StarDist(Weights(frozen, thresholds, fingerprint_of(network, thresholds), "training"), device=device)


def _measure(
    state: TrainingState, schedule: Schedule, losses: Sequence[float], clock: _Clock, held_out: Sequence[Pair]
) -> dict[str, float]:
    """A row of the history."""
    model = _as_model(state.average, PROVISIONAL)
    found = [model.predict(pair.image).labels for pair in held_out]
    ap50 = average_precision([pair.labels for pair in held_out], found, iou=0.5)
    loss = float(np.mean(losses))
    logger.info("step %d: loss %.4f, AP50 %.3f on held-out images", state.step, loss, ap50)
    rate = schedule.rate_at(state.step - 1)
    return {"step": state.step, "loss": loss, "rate": rate, "seconds": clock.seconds(), "ap50": ap50}


def _identity(schedule: Schedule, network: NetworkConfig, pairs: Sequence[Pair], initial: str | Path | None) -> str:
    start = None if initial is None else load_weights(initial).fingerprint
    return json.dumps([schedule.identity(), asdict(network), [pair.name for pair in pairs], start], sort_keys=True)
