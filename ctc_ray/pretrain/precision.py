"""Which number format a machine should compute in."""

from __future__ import annotations

import contextlib
from typing import Literal

import torch

Resolved = Literal["fp32", "bf16"]


def resolve_precision(precision: Literal["auto", "fp32", "bf16"], device: torch.device) -> Resolved:
    """What `auto` means on a device: bf16 where the hardware multiplies it, fp32 elsewhere."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"


def autocast(precision: Resolved, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Context in which matrix products run in the resolved precision."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def default_device(use_gpu: bool | None = None) -> torch.device:
    """The GPU where there is one (or where asked for), else the processor."""
    wanted = torch.cuda.is_available() if use_gpu is None else use_gpu
    return torch.device("cuda" if wanted else "cpu")
