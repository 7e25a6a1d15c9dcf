"""The part of the Ray Data plan that reads fields and runs the network on them; `segment` and `ingest` go on from there."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import ray

from ctc_ray.actor_pools import Pool
from ctc_ray.cluster import worker_identity
from ctc_ray.config import SegmentConfig
from ctc_ray.segment.field_image import pixel_type
from ctc_ray.segment.network_step import CandidateFinder
from ctc_ray.segment.plan import PatientPlan, Settings
from ctc_ray.segment.read_step import TASK_SCHEMA, FieldTask, read_fields
from ctc_ray.storage import Store

MAX_BLOCKS = 4000
"""Blocks of the plan; up to this number of fields each is read, segmented and written on its own."""


def network_pool(section: SegmentConfig) -> Pool:
    """The pool of StarDist actors that the configuration asks for."""
    return Pool(
        "StarDist actor",
        "segment.num_network_actors",
        section.num_network_actors,
        cpus=section.num_network_threads,
        gpus=section.gpus_per_actor if section.use_gpu else 0,
    )


def network_device(section: SegmentConfig) -> str:
    """Where StarDist actors compute: a GPU only where they reserve one, since others may have it."""
    return "cuda" if section.use_gpu else "cpu"


def instance_pool(section: SegmentConfig) -> Pool:
    """The pool of actors for non-maximum suppression and crops that the configuration asks for."""
    return Pool("instance actor", "segment.num_instance_actors", section.num_instance_actors)


def field_tasks(plan: PatientPlan, images: Store, settings: Settings) -> list[FieldTask]:
    """Tasks of a patient's fields that are to be segmented; opens the first images to learn the pixel type."""
    if not plan.todo:
        return []
    dtype = pixel_type(images, plan.cartridge.fields, settings.contrast)
    first = FieldTask(plan.todo[0], plan.parts_folder, dtype, plan.channel_map, plan.fingerprint)
    return [dataclasses.replace(first, field=file) for file in plan.todo]


def stream_candidates(
    section: SegmentConfig, settings: Settings, images: Store, tasks: Sequence[FieldTask], pool: Any
) -> Any:
    """Lazy data set of `CANDIDATE_SCHEMA`, one row a field: read by tasks, then through the StarDist actors.

    Args:
        section: for threads and GPUs of an actor.
        settings: of the stage.
        images: the cartridges.
        tasks: one a field, at least one.
        pool: Ray Data's description of the StarDist actors.
    """
    table = pa.table({"task": [task.to_json() for task in tasks]}, schema=TASK_SCHEMA)
    source: Any = ray.data.from_arrow(table)
    fields = source.repartition(min(len(tasks), MAX_BLOCKS)).map_batches(
        read_fields,
        batch_size=1,
        batch_format="pyarrow",
        fn_kwargs={"cartridges": images, "settings": settings},
        num_cpus=0.5,
    )
    return fields.map_batches(
        CandidateFinder,
        batch_size=1,
        batch_format="pyarrow",
        fn_constructor_kwargs={
            "settings": settings,
            "num_threads": section.num_network_threads,
            "identify": worker_identity,
            "device": network_device(section),
        },
        compute=pool,
        num_cpus=section.num_network_threads,
        num_gpus=section.gpus_per_actor if section.use_gpu else None,
    )
