"""The plan that embeds: read tasks hand units of cells to a pool of actors, which embed them and write their parts.

Reading and embedding run side by side, each in processes of its own: an actor finds its next units in the object store, and its
processor or GPU waits for no file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import ray

from ctc_ray.actor_pools import Pool, fitted_pools
from ctc_ray.cluster import worker_identity
from ctc_ray.config import EmbedConfig
from ctc_ray.embed.compute import EmbedUnits
from ctc_ray.embed.reading import read_units
from ctc_ray.embed.units import Unit
from ctc_ray.progress import Progress
from ctc_ray.storage import Store

READER_CPUS: Final = 0.1
"""Processors of a reader, which an actor leaves free for it: reading takes a small share of the time that embedding takes on a
processor, and on two processors both can embed."""
_NUM_READERS: Final = 2
"""Readers at once; one feeds dozens of processors that embed."""
_READERS_A_GPU: Final = 4
"""Readers at once for an actor with a GPU, each with a whole processor."""
_MAX_BLOCKS: Final = 1000
"""Blocks that the list of units is cut into at most; a read task takes one."""


def stream_units(
    section: EmbedConfig, store: Store, units: Sequence[Unit], precision: str, progress: Progress
) -> Iterator[dict[str, Any]]:
    """Embed units and write their parts.

    Args:
        section: settings.
        store: of the cohort.
        units: at least one.
        precision: resolved.
        progress: where to say that fewer actors than configured fit.

    Yields:
        One row of `ctc_ray.embed.compute.STATUS_SCHEMA` a unit, as it is done, in no particular order.

    Raises:
        ResourceError: not even one actor fits the cluster.
    """
    num_actors = min(section.num_actors, len(units))
    gpus = section.gpus_per_actor if section.use_gpu else 0.0
    cpus = section.num_threads - READER_CPUS
    readers, reader_cpus = (_READERS_A_GPU * num_actors, 1.0) if section.use_gpu else (_NUM_READERS, READER_CPUS)
    pool = Pool("embedding actor", "embed.num_actors", num_actors, cpus=cpus, gpus=gpus)
    (actors,) = fitted_pools("embed", [pool], progress, spare_cpus=READER_CPUS if gpus == 0.0 else 1.0)
    done = (
        ray.data.from_items([unit.to_row() for unit in units], override_num_blocks=min(len(units), _MAX_BLOCKS))
        .map_batches(
            read_units,  # type: ignore[arg-type]  # its further argument comes from fn_kwargs
            fn_kwargs={"store": store},
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.TaskPoolStrategy(size=readers),
            num_cpus=reader_cpus,
        )
        .map_batches(
            EmbedUnits,
            fn_constructor_args=(store, section, precision, worker_identity),
            batch_size=1,
            batch_format="pyarrow",
            compute=actors,
            num_cpus=cpus,
            num_gpus=gpus or None,
        )
    )
    batch: Any
    for batch in done.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from batch.to_pylist()
