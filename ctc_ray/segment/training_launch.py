"""Start Ray Train for a planned training of the segmenter, and watch it."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Iterator

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from ctc_ray import errors
from ctc_ray.config import TrainSegmenterConfig
from ctc_ray.errors import ConfigError, CtcRayError, ResourceError
from ctc_ray.progress import Task
from ctc_ray.segment.training_worker import ERROR_FILE, STATUS_FILE, TrainingPlan, train_worker

_POLL_S = 0.5


def uses_gpu(section: TrainSegmenterConfig) -> bool:
    """Whether workers get a GPU each: what the configuration says, else where the cluster has enough of them."""
    if section.use_gpu is not None:
        return section.use_gpu
    return bool(_cluster().get("GPU", 0.0) >= section.num_workers)


def threads_of_worker(section: TrainSegmenterConfig) -> int:
    """Threads of one worker: what the configuration says, else the smallest machine's processors over the workers."""
    if section.num_threads is not None:
        return section.num_threads
    machines = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    processors = min([count for count in machines if count >= 1], default=1.0)
    return max(1, int(processors) // section.num_workers)


def check_resources(section: TrainSegmenterConfig) -> None:
    """Refuse a training that could not start, before Ray waits for it without a word.

    Raises:
        ConfigError: the batch does not divide among the workers.
        ResourceError: the cluster has too few processors or GPUs.
    """
    workers, threads = section.num_workers, threads_of_worker(section)
    if section.batch_size % workers:
        raise ConfigError(
            f"train_segmenter.batch_size {section.batch_size} does not divide among {workers} workers: change one of them"
        )
    processors, gpus = _cluster().get("CPU", 0.0), _cluster().get("GPU", 0.0)
    if processors < workers * threads:
        raise ResourceError(
            f"the cluster has {processors:g} processors; {workers} training workers of {threads} threads need "
            f"{workers * threads}: lower train_segmenter.num_workers or num_threads"
        )
    if section.use_gpu and gpus < workers:
        raise ResourceError(
            f"the cluster has {gpus:g} GPUs, {workers} training workers need one each: lower "
            "train_segmenter.num_workers or set train_segmenter.use_gpu=false"
        )


def _cluster() -> dict[str, float]:
    return dict(ray.cluster_resources())  # type: ignore[no-untyped-call]  # Ray has no annotations there


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
    for name in (ERROR_FILE, STATUS_FILE):
        (plan.state / name).unlink(missing_ok=True)
    gpu = uses_gpu(section)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"plan": plan},
        scaling_config=ScalingConfig(
            num_workers=section.num_workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": 1, "GPU": 1} if gpu else {"CPU": plan.num_threads},
        ),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        run_config=RunConfig(
            # A name of its own for every attempt: Ray would take up its own state of an earlier one.
            name=f"train-segmenter-{int(time.time() * 1000)}",
            storage_path=str(plan.state.absolute()),
            failure_config=FailureConfig(max_failures=section.max_failures),
        ),
    )
    try:
        with _watched(plan, task):
            trainer.fit()
    except ray.train.TrainingFailedError as error:
        _raise_reported(plan)
        raise ResourceError(
            f"training failed after {section.max_failures} restarts: {_first_cause(error)}. "
            "The last checkpoint is intact: run again to continue"
        ) from error
    _raise_reported(plan)
    if not (plan.state / STATUS_FILE).exists() and not (plan.out / "thresholds.json").exists():
        raise ResourceError(
            f"the workers left nothing in {plan.out}: give a folder that all machines of the cluster see, or use --local"
        )
    shutil.rmtree(plan.state, ignore_errors=True)  # only Ray's notes and the finished progress are left in it


def _raise_reported(plan: TrainingPlan) -> None:
    path = plan.state / ERROR_FILE
    if not path.exists():
        return
    reported = json.loads(path.read_text())
    path.unlink()
    named = getattr(errors, reported["kind"], ResourceError)
    raise named(reported["message"]) if issubclass(named, CtcRayError) else ResourceError(reported["message"])


def _first_cause(error: Exception) -> str:
    failures = getattr(error, "worker_failures", None) or {}
    cause = next(iter(failures.values()), error)
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(cause).__name__


@contextlib.contextmanager
def _watched(plan: TrainingPlan, task: Task) -> Iterator[None]:
    """Show the steps that process 0 notes, while the block runs."""
    stop = threading.Event()
    path = plan.state / STATUS_FILE

    def look() -> None:
        if not path.exists():
            task.advance(0, note="starting workers")
            return
        row = json.loads(path.read_text())
        task.advance(max(0, int(row["step"]) - task.done), note=f"step {row['step']}, loss {row['loss']:.3f}")

    def poll() -> None:
        while not stop.wait(_POLL_S):
            with contextlib.suppress(OSError, ValueError):  # replaced at this very moment: look again
                look()

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        with contextlib.suppress(OSError, ValueError):  # the last look must not hide the training's own error
            look()
