"""What a training of the segmenter keeps on disk between two runs: one safetensors file and a history."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from ctc_ray.errors import StaleOutputError, WeightsError
from ctc_ray.segment.atomic_file import write_atomic
from ctc_ray.segment.network import StarDistNetwork
from ctc_ray.segment.training_world import World

CHECKPOINT = "checkpoint.safetensors"
HISTORY = "history.jsonl"
_LENGTH_BYTES = 8
"""A safetensors file begins with the length of its JSON header, a little-endian integer of this size."""


@dataclass
class TrainingState:
    """What a checkpoint holds: network, running mean of its weights, optimiser, steps done.

    Attributes:
        network: what is trained.
        average: running mean of its weights, what is evaluated and saved.
        optimiser: Adam, with its moments.
        step: steps done.
        history: rows of the progress figures; only process 0 of a world has them.
    """

    network: StarDistNetwork
    average: StarDistNetwork
    optimiser: torch.optim.Adam
    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


def save_checkpoint(state: TrainingState, out: Path, identity: str) -> None:
    """Write network, running mean, Adam's moments and the step into one safetensors file, atomically.

    Args:
        state: what to write.
        out: local folder; the history lies beside, as JSON lines.
        identity: of the training; another one refuses the checkpoint.
    """
    tensors = {f"network.{name}": value for name, value in state.network.state_dict().items()}
    tensors |= {f"average.{name}": value for name, value in state.average.state_dict().items()}
    for index, moments in state.optimiser.state_dict()["state"].items():
        tensors |= {f"adam.{index}.{name}": value for name, value in moments.items()}
    metadata = {"step": str(state.step), "identity": identity}
    write_atomic(out / CHECKPOINT, save({name: value.cpu().contiguous() for name, value in tensors.items()}, metadata))
    write_atomic(out / HISTORY, "".join(json.dumps(row) + "\n" for row in state.history).encode())


def restore(state: TrainingState, out: Path, identity: str, world: World, device: torch.device) -> None:
    """Take up the checkpoint in `out`, where there is one; process 0 reads it for all.

    Args:
        state: of a training that begins; changed in place.
        out: as for `save_checkpoint`.
        identity: of this training.
        world: the processes that train.
        device: for the messages between them.

    Raises:
        StaleOutputError: the checkpoint is of another training.
        WeightsError: it is damaged.
    """
    path = out / CHECKPOINT
    data = path.read_bytes() if world.rank == 0 and path.exists() else b""
    if world.rank == 0 and data:
        _check(data, path, identity)
    data = world.share(data, device)
    if not data:
        return
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise _damaged(path, error) from error
    state.network.load_state_dict(_part(tensors, "network."))
    state.average.load_state_dict(_part(tensors, "average."))
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in _part(tensors, "adam.").items():
        index, key = name.split(".", 1)
        moments.setdefault(int(index), {})[key] = value
    optimiser: dict[str, Any] = state.optimiser.state_dict()
    state.optimiser.load_state_dict(optimiser | {"state": moments})
    state.step = int(_metadata(data, path)["step"])
    if world.rank == 0 and (out / HISTORY).exists():
        rows = [json.loads(line) for line in (out / HISTORY).read_text().splitlines()]
        state.history = [row for row in rows if row["step"] <= state.step]


def steps_done(out: Path) -> int:
    """Steps of the checkpoint in a folder; 0 where there is none.

    Raises:
        WeightsError: it is damaged.
    """
    path = out / CHECKPOINT
    return int(_metadata(path.read_bytes(), path)["step"]) if path.exists() else 0


def _check(data: bytes, path: Path, identity: str) -> None:
    if _metadata(data, path).get("identity") != identity:
        raise StaleOutputError(
            f"{path} belongs to a training with another schedule, architecture, start or data; "
            "give another output folder, or delete this one to begin anew"
        )


def _metadata(data: bytes, path: Path) -> dict[str, str]:
    """What `save_checkpoint` noted beside the tensors; `safetensors.torch.load` gives the tensors alone."""
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    try:
        header = json.loads(data[_LENGTH_BYTES : _LENGTH_BYTES + length])
        metadata = dict(header["__metadata__"])
        int(metadata["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error
    return metadata


def _damaged(path: Path, error: Exception) -> WeightsError:
    return WeightsError(f"{path} is no checkpoint, or is damaged ({error}); delete it to begin anew")


def _part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
