"""The processes that train one network together; a process alone is a world of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.distributed


class World(Protocol):
    """What the training loop needs of the processes that share its work; each calls in the same order."""

    @property
    def rank(self) -> int:
        """Number of this process, from 0; process 0 writes files."""

    @property
    def size(self) -> int:
        """Number of processes."""

    def average(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor, in place, by its mean over the processes."""

    def share(self, data: bytes, device: torch.device) -> bytes:
        """What process 0 gives, in every process."""


class Alone:
    """A world of one process."""

    rank = 0
    size = 1

    def average(self, tensors: Sequence[torch.Tensor]) -> None:
        """Leave the tensors as they are."""

    def share(self, data: bytes, device: torch.device) -> bytes:
        """Give the data back."""
        return data


class ProcessGroup:
    """The processes of torch's default process group, which must exist."""

    def __init__(self) -> None:
        self.rank = torch.distributed.get_rank()
        self.size = torch.distributed.get_world_size()

    def average(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its mean over the processes, all of them in one message."""
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        torch.distributed.all_reduce(flat)
        flat /= self.size
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))

    def share(self, data: bytes, device: torch.device) -> bytes:
        """What process 0 gives; the others' data are ignored."""
        length = torch.tensor([len(data)], dtype=torch.int64, device=device)
        torch.distributed.broadcast(length, src=0)
        if self.rank == 0:
            content = torch.from_numpy(np.frombuffer(data, np.uint8).copy()).to(device)
        else:
            content = torch.empty(int(length), dtype=torch.uint8, device=device)
        torch.distributed.broadcast(content, src=0)
        return content.cpu().numpy().tobytes()
