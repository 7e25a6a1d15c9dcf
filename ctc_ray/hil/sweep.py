"""Many trials on Ray Tune: arrays through the object store, each trial writes its own rows, a killed sweep goes on.

Tune may run a trial twice, and a new sweep may find parts of a killed one: both are harmless (see `ctc_ray.hil.parts`).
"""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
from ray import tune

from ctc_ray import errors
from ctc_ray.cluster import worker_identity
from ctc_ray.hil.loop import Trial, run_trial
from ctc_ray.hil.parts import Parts
from ctc_ray.hil.pools import Problem
from ctc_ray.progress import Progress, Task
from ctc_ray.records import WorkerTally
from ctc_ray.schema import TRIAL_SCHEMA


@dataclass(frozen=True)
class SweepResult:
    """Counts of a sweep.

    Attributes:
        computed: trials that ran now.
        reused: trials whose part was there.
        tally: trials that each worker ran.
    """

    computed: int
    reused: int
    tally: WorkerTally


def run_sweep(
    problem: Problem, trials: Sequence[Trial], parts: Parts, *, max_concurrent: int, progress: Progress
) -> SweepResult:
    """Run the trials that have no part yet; Ray must be connected.

    Args:
        problem: arrays, put into the object store once.
        trials: what to run.
        parts: where rows go.
        max_concurrent: trials at a time, one processor each.
        progress: a step with one unit a trial.

    Raises:
        CtcRayError: a trial refused its input; the first such error, after the others have finished.
        ResourceError: a trial died; its parts stay and the next run goes on from them.
    """
    there = parts.finished()
    missing = [trial for trial in trials if parts.name(trial) not in there]
    reused = len(trials) - len(missing)
    tally = WorkerTally()
    if missing:
        with progress.task("simulate", total=len(trials)) as task, tempfile.TemporaryDirectory() as folder:
            if reused:
                task.advance(reused, note=f"{reused} trials were there")
            results = _fit(_tuner(problem, missing, parts, max_concurrent, task, folder))
        _raise_first(results)
        for result in results:
            tally.add(str(result.metrics["node"]), int(result.metrics["pid"]))
    return SweepResult(len(missing), reused, tally)


def _tuner(
    problem: Problem, trials: Sequence[Trial], parts: Parts, max_concurrent: int, task: Task, folder: str
) -> tune.Tuner:
    trainable = tune.with_resources(tune.with_parameters(_run_and_write, problem=problem, parts=parts), {"cpu": 1})
    names = {trial: f"{index:05d}" for index, trial in enumerate(trials)}
    return tune.Tuner(
        trainable,
        param_space={"trial": tune.grid_search([asdict(trial) for trial in trials])},
        tune_config=tune.TuneConfig(
            reuse_actors=True,  # a fresh worker costs more than a second a trial
            max_concurrent_trials=max_concurrent,
            trial_dirname_creator=lambda trial: names[Trial(**trial.config["trial"])],
        ),
        run_config=tune.RunConfig(storage_path=folder, name="sweep", verbose=0, callbacks=[_Advance(task)]),
    )


def _fit(tuner: tune.Tuner) -> Any:
    quiet = {
        "RAY_AIR_NEW_OUTPUT": "0",  # the newer reporter prints a banner even at verbosity 0
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    logger = logging.getLogger("ray.tune")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return tuner.fit()
    finally:
        logger.setLevel(level)


def _run_and_write(config: dict[str, Any], problem: Problem, parts: Parts) -> None:
    """One trial on a worker: compute, write, report who did it."""
    from threadpoolctl import threadpool_limits

    trial = Trial(**config["trial"])
    node, pid = worker_identity()
    try:
        with threadpool_limits(1):  # a reused worker keeps the thread count that its first task set
            rows = run_trial(problem, trial, parts.settings)
    except errors.CtcRayError as error:
        tune.report({"node": node, "pid": pid, "kind": type(error).__name__, "message": str(error)})
        return
    parts.store.write_table(parts.path(trial), pa.Table.from_pylist(rows, schema=TRIAL_SCHEMA))
    tune.report({"node": node, "pid": pid, "kind": "", "message": ""})


def _raise_first(results: Any) -> None:
    for result in results:
        if result.error is not None:
            raise errors.ResourceError(
                f"a simulation trial died: {result.error}. Run the command again: finished trials are kept"
            )
        if result.metrics["kind"]:
            kind = getattr(errors, result.metrics["kind"], errors.CtcRayError)
            raise kind(result.metrics["message"])


class _Advance(tune.Callback):
    """Move the progress on whenever a trial ends."""

    def __init__(self, task: Task | None) -> None:
        self._task = task

    def __getstate__(self) -> dict[str, Any]:
        return {"_task": None}  # Tune pickles its settings, and a terminal cannot be pickled

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if self._task is not None:
            one = trial.config["trial"]
            flips = "" if one["flip_rate"] is None else f", {one['flip_rate']:.0%} wrong answers"
            self._task.advance(note=f"{one['scenario']}, {one['strategy']}, seed {one['seed']}{flips}")
