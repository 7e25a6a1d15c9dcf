"""Checkpoints of a training run: tensors as safetensors, the rest as JSON, never pickle.

A checkpoint is two files, `step-<n>.safetensors` and `step-<n>.json`. Each is written atomically and the JSON, which
holds the digests of the tensors and of itself, comes last: a checkpoint without its JSON does not exist. Older ones are
removed only after a newer one is whole, so a full disk costs the new checkpoint and never the old.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import safetensors
import safetensors.torch
import torch

from ctc_ray.errors import MissingInputError, WeightsError
from ctc_ray.storage import Store

FORMAT: Final = 1
_PREFIX: Final = "step-"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and verified.

    Attributes:
        step: steps done.
        tensors: as `DinoTrainer.tensors` gave them.
        details: what the writer added (JSON values).
    """

    step: int
    tensors: dict[str, torch.Tensor]
    details: dict[str, Any]


class CheckpointFolder:
    """The checkpoints of one run in one folder of a store.

    Args:
        store: of the cohort.
        folder: path below it.
        identity: of the run; a checkpoint of another run is refused.
        keep: checkpoints that stay.
    """

    def __init__(self, store: Store, folder: str, *, identity: str, keep: int = 2) -> None:
        self.store = store
        self.folder = folder
        self.identity = identity
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, rising."""
        names = [path.rsplit("/", 1)[-1] for path in self.store.list_files(self.folder, suffix=".json")]
        numbers = [name.removeprefix(_PREFIX).removesuffix(".json") for name in names if name.startswith(_PREFIX)]
        return sorted(int(number) for number in numbers if number.isdigit())

    def save(self, step: int, tensors: Mapping[str, torch.Tensor], details: Mapping[str, Any]) -> None:
        """Write a checkpoint, then remove those beyond `keep`.

        Raises:
            OSError: it cannot be written (a full disk, say); earlier checkpoints are intact.
            WeightsError: a tensor is not finite, and every run that continued from it would fail; earlier ones are intact.
        """
        broken = sorted(name for name, value in tensors.items() if not bool(torch.isfinite(value).all()))
        if broken:
            raise WeightsError(
                f"{len(broken)} tensors are not finite at step {step} ({broken[0]}): lower pretrain.learning_rate "
                "(the checkpoint before is intact)"
            )
        data = safetensors.torch.save(dict(tensors))
        description = {
            "format": FORMAT,
            "step": step,
            "identity": self.identity,
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "details": dict(details),
        }
        description["description_sha256"] = _digest(description)
        self.store.write_bytes(self._path(step, "safetensors"), data)
        try:
            self.store.write_bytes(self._path(step, "json"), json.dumps(description).encode())
        except OSError:
            self.store.delete(self._path(step, "safetensors"))  # without their JSON they would only take the room
            raise
        for old in self.steps()[: -self.keep]:
            self.store.delete(self._path(old, "json"))
            self.store.delete(self._path(old, "safetensors"))

    def latest(self) -> Checkpoint | None:
        """Read the newest checkpoint; None where there is none.

        Raises:
            WeightsError: it is damaged or of another run.
        """
        steps = self.steps()
        return self.read(steps[-1]) if steps else None

    def read(self, step: int) -> Checkpoint:
        """Read and verify one checkpoint.

        Raises:
            WeightsError: it is damaged or of another run; the message says what to delete to go on from the one before.
        """
        where = self.store.describe(self._path(step, "json"))
        remedy = f"delete {where} to continue from the checkpoint before it"
        try:
            description = json.loads(self.store.read_bytes(self._path(step, "json")))
            # Checkpoints of earlier versions have no digest of their description.
            if description.pop("description_sha256", None) not in (None, _digest(description)):
                raise ValueError("its digest differs")
            expected, identity, details = description["sha256"], description["identity"], dict(description["details"])
            if description["format"] != FORMAT or description["step"] != step:
                raise ValueError(f"it says format {description['format']}, step {description['step']}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"checkpoint {where} is damaged ({error}): {remedy}") from error
        if identity != self.identity:
            raise WeightsError(
                f"checkpoint {where} belongs to another run (identity {identity}, this run is {self.identity}): "
                "use --force to start afresh, or restore the settings it was made with"
            )
        try:
            data = self.store.read_bytes(self._path(step, "safetensors"))
        except MissingInputError as error:
            raise WeightsError(f"checkpoint {where}: its tensors are gone: {remedy}") from error
        if hashlib.sha256(data).hexdigest() != expected:
            raise WeightsError(f"checkpoint {where}: its tensors are damaged (digest differs): {remedy}")
        try:
            tensors = safetensors.torch.load(data)
        except safetensors.SafetensorError as error:
            raise WeightsError(f"checkpoint {where}: its tensors are damaged ({error}): {remedy}") from error
        return Checkpoint(step, tensors, details)

    def clear(self) -> None:
        """Remove all checkpoints."""
        self.store.delete_folder(self.folder)

    def _path(self, step: int, suffix: str) -> str:
        return f"{self.folder}/{_PREFIX}{step:08d}.{suffix}"


def _digest(description: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
