"""Start Ray Train for a planned training of the segmenter."""

from __future__ import annotations

import shutil

import ray

from ctc_ray.config import TrainSegmenterConfig
from ctc_ray.errors import ConfigError, ResourceError
from ctc_ray.progress import Task
from ctc_ray.segment.training_worker import TrainingPlan, train_worker
from ctc_ray.train_launch import Workers, launch


def uses_gpu(section: TrainSegmenterConfig) -> bool:
    """Whether workers get a GPU each: what the configuration says, else where the cluster has enough of them."""
    if section.use_gpu is not None:
        return section.use_gpu
    cluster: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]  # Ray has no annotations there
    return cluster.get("GPU", 0.0) >= section.num_workers


def threads_of_worker(section: TrainSegmenterConfig) -> int:
    """Threads of one worker: what the configuration says, else the smallest machine's processors over the workers."""
    if section.num_threads is not None:
        return section.num_threads
    machines = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    processors = min([count for count in machines if count >= 1], default=1.0)
    return max(1, int(processors) // section.num_workers)


def workers_of(section: TrainSegmenterConfig) -> Workers:
    """The workers of a training; a fixed number, since each has its share of every batch."""
    gpu = uses_gpu(section)
    return Workers(
        num_workers=section.num_workers,
        min_workers=section.num_workers,
        num_cpus=1 if gpu else threads_of_worker(section),
        use_gpu=gpu,
        max_failures=section.max_failures,
    )


def check_resources(section: TrainSegmenterConfig) -> None:
    """Refuse a training that could not start, before Ray waits for it without a word.

    Raises:
        ConfigError: the batch does not divide among the workers.
        ResourceError: the cluster has too few processors or GPUs.
    """
    if section.batch_size % section.num_workers:
        raise ConfigError(
            f"train_segmenter.batch_size {section.batch_size} does not divide among {section.num_workers} workers: "
            "change one of them"
        )
    workers_of(section).require_room("train_segmenter")


def fit(plan: TrainingPlan, section: TrainSegmenterConfig, task: Task) -> None:
    """Run Ray Train to the last step; what it trains lies in the plan's folder.

    Args:
        plan: what to train.
        section: workers and retries.
        task: shows the steps.

    Raises:
        CtcRayError: what a worker reported.
        ResourceError: workers kept failing, or write to a folder that is not the driver's.
    """
    plan.state.mkdir(parents=True, exist_ok=True)
    launch(
        train_worker,
        plan,
        workers_of(section),
        name="train-segmenter",
        storage_path=str(plan.state.absolute()),
        task=task,
    )
    if not (plan.out / "thresholds.json").exists():
        raise ResourceError(
            f"the workers left nothing in {plan.out}: give a folder that all machines of the cluster see, or use --local"
        )
    shutil.rmtree(plan.state, ignore_errors=True)  # only Ray's notes are left in it
