"""Measure the pretraining cells before training: intensities per channel, and what `auto` means on the workers."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import ray

from ctc_ray.config import PretrainConfig
from ctc_ray.errors import CtcRayError, SchemaError, named_error
from ctc_ray.pretrain.intensity import check_counts, fraction_histogram, stored_full_scale
from ctc_ray.pretrain.precision import Resolved, default_device, resolve_precision
from ctc_ray.pretrain.slices import SLICE_ROWS, read_slice, slices_of
from ctc_ray.progress import Progress
from ctc_ray.schema import unpack_pixels
from ctc_ray.storage import Store


def worker_precision(precision: Literal["auto", "fp32", "bf16"], *, use_gpu: bool) -> Resolved:
    """The configured precision, or what `auto` means on a worker of the kind that computes."""
    if precision != "auto":
        return precision
    if len(ray.nodes()) == 1:  # type: ignore[no-untyped-call]  # Ray has no annotations there
        return _resolve_here(use_gpu)
    resolve = ray.remote(num_cpus=1, num_gpus=1 if use_gpu else 0)(_resolve_here)
    resolved: Resolved = ray.get(resolve.remote(use_gpu))
    return resolved


def _resolve_here(use_gpu: bool) -> Resolved:
    return resolve_precision("auto", default_device(use_gpu))


def measure_intensities(
    section: PretrainConfig, store: Store, shards: dict[str, int], progress: Progress
) -> tuple[npt.NDArray[np.int64], np.dtype[Any]]:
    """Histogram of all pretraining pixels per channel, summed shard by shard from Ray tasks, and the crops' dtype.

    Args:
        section: its `full_scale` is used.
        store: of the cohort.
        shards: path -> rows.
        progress: where to show it.

    Returns:
        (C, 4096) int64 counts over fractions of full scale, and uint8 or uint16.

    Raises:
        SchemaError: no cells, cells of two kinds, a damaged shard, or counts above full scale.
    """
    measure = ray.remote(num_cpus=1)(_measure_shard)
    tasks = [measure.remote(store, shard, rows, section.full_scale) for shard, rows in shards.items() if rows]
    total: Any = None
    dtypes: set[str] = set()
    with progress.task("pretrain: measure intensities", total=len(tasks)) as task:
        while tasks:
            (done,), tasks = ray.wait(tasks, num_returns=1)
            counts, dtype = _outcome(ray.get(done))
            if total is not None and total.shape != counts.shape:
                raise SchemaError(
                    f"pretraining patients have {len(total)} and {len(counts)} channels: segment them with one channel map"
                )
            total = counts if total is None else total + counts
            dtypes.add(dtype)
            task.advance()
    if total is None:
        raise SchemaError("the pretraining patients have no cells: check what segmentation found")
    if len(dtypes) > 1:
        raise SchemaError("pretraining patients have 8- and 16-bit crops: give the role to patients of one kind")
    return total, np.dtype(dtypes.pop())


def _measure_shard(store: Store, shard: str, rows: int, full_scale: float | None) -> Any:
    """Histogram and dtype of one shard, or (kind, message) of what is wrong with it."""
    total: Any = 0
    dtype = np.dtype(np.uint8)
    try:
        for part in slices_of({shard: rows}, SLICE_ROWS):
            table = read_slice(store, part, ["pixels"])
            crops = unpack_pixels(table["pixels"], table.schema.field("pixels"))
            dtype = crops.dtype
            scale = stored_full_scale(dtype, full_scale)
            check_counts(crops, scale, store.describe(shard), "pretrain.full_scale")
            total = total + fraction_histogram(crops, full_scale=scale)
    except CtcRayError as error:
        # As a value: an exception would reach the driver wrapped in Ray's own.
        return type(error).__name__, str(error)
    return total, str(dtype)


def _outcome(value: Any) -> tuple[Any, str]:
    first, second = value
    if isinstance(first, str):
        raise named_error(first, second)
    return first, second
