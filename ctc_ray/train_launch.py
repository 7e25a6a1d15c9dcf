"""Start the workers of a training with Ray Train, show their steps, and bring their errors home under their own names.

What a training learns lies in its own checkpoints and not in Ray: a worker that is lost is replaced, a driver that is lost
is run again, and both go on from the newest checkpoint that the work itself finds.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ctc_ray.errors import ConfigError, CtcRayError, ResourceError, named_error
from ctc_ray.progress import Task

if TYPE_CHECKING:
    from ray.train import ScalingConfig

Plan = TypeVar("Plan")

_POLL_S: Final = 0.5
_NOTE_INTERVAL_S: Final = 1.0
_SILENCE_S: Final = 60.0
"""After so long without a word from a worker, the progress says so."""
_GROW_INTERVAL_S: Final = 300.0
"""How often a training that lost workers looks whether there is room for them again: growing costs the steps since the last
checkpoint, and at a few seconds Ray was seen to shrink and grow in turn."""


@dataclass(frozen=True)
class Workers:
    """The workers of a training.

    Attributes:
        num_workers: processes that train together.
        min_workers: the fewest that go on where the cluster lost room for the others.
        num_cpus: processors of each.
        use_gpu: whether each has a GPU.
        max_failures: restarts after a lost worker.
    """

    num_workers: int
    min_workers: int = 1
    num_cpus: int = 1
    use_gpu: bool = False
    max_failures: int = 2

    def room(self, *, spare_cpus: int = 0) -> int:
        """How many of them the cluster has room for, at most `num_workers`, with `spare_cpus` left for others."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]  # no annotations
        total = (sum(node.get("CPU", 0.0) for node in nodes) - spare_cpus) // self.num_cpus
        places = [node.get("CPU", 0.0) // self.num_cpus for node in nodes]
        if self.use_gpu:
            places = [min(place, node.get("GPU", 0.0)) for place, node in zip(places, nodes, strict=True)]
        return int(max(0, min(sum(places), total, self.num_workers)))

    def require_room(self, section: str, *, spare_cpus: int = 0) -> int:
        """How many workers can start now.

        Args:
            section: of the configuration that names the workers, for the message.
            spare_cpus: processors that must stay free beside them.

        Raises:
            ConfigError: `min_workers` is more than `num_workers`.
            ResourceError: the cluster has not room for `min_workers`.
        """
        if self.min_workers > self.num_workers:
            raise ConfigError(
                f"{section}.min_workers {self.min_workers} is more than {section}.num_workers {self.num_workers}: change one"
            )
        room = self.room(spare_cpus=spare_cpus)
        if room < self.min_workers:
            cluster: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]  # no annotations
            needed = f"{self.num_cpus} processors" + (" and a GPU" if self.use_gpu else "")
            spare = f", beside {spare_cpus} for the data" if spare_cpus else ""
            raise ResourceError(
                f"the cluster has {cluster.get('CPU', 0.0):g} processors and {cluster.get('GPU', 0.0):g} GPUs: room for "
                f"{room} training workers with {needed} each{spare}, and {self.min_workers} are needed. Lower "
                f"{section}.num_workers" + (f" or set {section}.use_gpu=false" if self.use_gpu else "")
            )
        return room

    def scaling(self) -> ScalingConfig:
        """The same for Ray Train: elastic where fewer than `num_workers` will do."""
        from ray.train import ScalingConfig

        elastic = self.min_workers < self.num_workers
        return ScalingConfig(  # type: ignore[call-arg]  # Ray's annotations are those of its former ScalingConfig
            num_workers=(self.min_workers, self.num_workers) if elastic else self.num_workers,  # type: ignore[arg-type]  # as above
            use_gpu=self.use_gpu,
            resources_per_worker={"CPU": self.num_cpus, "GPU": 1} if self.use_gpu else {"CPU": self.num_cpus},
            elastic_resize_monitor_interval_s=_GROW_INTERVAL_S,
        )


@dataclass
class _Board:
    """What the workers told: an actor beside the driver, since a full disk or a slow store must not swallow it.

    Training goes on without it: a lost board costs what it would have told.
    """

    notes: int = 0
    step: int = 0
    text: str = ""
    warnings: list[str] = field(default_factory=list)
    failure: tuple[str, str] | None = None

    def note(self, step: int, text: str) -> None:
        """Keep the newest step."""
        self.notes, self.step, self.text = self.notes + 1, step, text

    def warn(self, text: str) -> None:
        """Keep a warning."""
        self.warnings.append(text)

    def fail(self, kind: str, message: str) -> None:
        """Keep the first error: those of the other workers follow from it."""
        self.failure = self.failure or (kind, message)

    def read(self) -> tuple[int, int, str, list[str], tuple[str, str] | None]:
        """All of it."""
        return self.notes, self.step, self.text, self.warnings, self.failure


class Reports:
    """A worker's line to the driver.

    Args:
        board: handle of the actor that the driver reads.
    """

    def __init__(self, board: Any) -> None:
        self._board = board
        self._noted = float("-inf")

    def step(self, step: int, text: str, *, now: bool = False) -> None:
        """Tell the driver which step was done, at most once a second unless `now`."""
        moment = time.monotonic()
        if now or moment - self._noted >= _NOTE_INTERVAL_S:
            self._noted = moment
            self._board.note.remote(step, text)

    def warn(self, text: str) -> None:
        """Have the driver print a warning."""
        self._board.warn.remote(text)

    def fail(self, error: CtcRayError) -> None:
        """Leave an error for the driver; returns when it has arrived."""
        with contextlib.suppress(ray.exceptions.RayError):  # then the driver finds it in what Ray Train says
            ray.get(self._board.fail.remote(type(error).__name__, str(error)))

    def failed(self) -> bool:
        """Whether a worker of this training left an error; False where nobody can tell any more."""
        try:
            return ray.get(self._board.read.remote())[-1] is not None
        except ray.exceptions.RayError:
            return False


def launch(
    work: Callable[[Plan, Reports], None],
    plan: Plan,
    workers: Workers,
    *,
    name: str,
    storage_path: str,
    task: Task,
    warn: Callable[[str], None] | None = None,
    datasets: dict[str, Any] | None = None,
) -> None:
    """Run `work` in every worker until it returns in all of them.

    Args:
        work: what one worker does, inside Ray Train; it continues from the newest checkpoint that it finds. Our own errors
            are not tried again, since they would only come again; a lost worker, or any other error, is.
        plan: its first argument.
        workers: how many, and on what.
        name: of the training, for Ray.
        storage_path: a folder or URI that all machines see, where Ray keeps a few notes.
        task: shows the steps that workers report.
        warn: prints a worker's warning; None leaves warnings out.
        datasets: split among the workers by Ray Data.

    Raises:
        CtcRayError: what a worker raised, of its own kind.
        ResourceError: workers kept failing, or `storage_path` cannot be written.
    """
    from ray.train import TrainingFailedError

    # Not `soft`: Ray may then take another machine, and the training would lose its board with that one.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(num_cpus=0)(_Board).options(scheduling_strategy=here).remote()
    config = {"work": work, "plan": plan, "reports": Reports(board)}
    trainer = _trainer(config, workers, name, storage_path, datasets)
    try:
        with _watched(board, task, warn):
            trainer.fit()
    except TrainingFailedError as error:
        _raise_reported(board)
        raise ResourceError(
            f"training failed after {workers.max_failures} restarts: {_first_cause(error)}. "
            "The last checkpoint is intact: run again to continue"
        ) from error
    except OSError as error:
        raise ResourceError(
            f"Ray Train cannot keep its notes in {storage_path} ({error}): check permissions and free space, then run again"
        ) from error
    _raise_reported(board)


def _trainer(
    config: dict[str, Any], workers: Workers, name: str, storage_path: str, datasets: dict[str, Any] | None
) -> Any:
    # Imported here and not above: the actor of this module, which holds a few words, would load torch too.
    from ray.train import DataConfig, FailureConfig, RunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    return TorchTrainer(
        _work,
        train_loop_config=config,
        scaling_config=workers.scaling(),
        torch_config=TorchConfig(backend="nccl" if workers.use_gpu else "gloo"),
        run_config=RunConfig(
            # A name of its own for every attempt: Ray would take up its own state of an earlier one.
            name=f"{name}-{time.time_ns() // 1_000_000}",
            storage_path=storage_path,
            failure_config=FailureConfig(max_failures=workers.max_failures),
        ),
        datasets=datasets,
        dataset_config=DataConfig(datasets_to_split="all"),
    )


def _work(config: dict[str, Any]) -> None:
    """What Ray Train calls in a worker."""
    reports: Reports = config["reports"]
    if reports.failed():
        return
    try:
        config["work"](config["plan"], reports)
    except CtcRayError as error:
        reports.fail(error)
        raise


def _raise_reported(board: Any) -> None:
    try:
        failure = ray.get(board.read.remote())[-1]
    except ray.exceptions.RayError:  # the board was lost with its machine, and what it knew with it
        return
    if failure is not None:
        raise named_error(*failure)


def _first_cause(error: Exception) -> str:
    failures = getattr(error, "worker_failures", None) or {}
    cause = next(iter(failures.values()), getattr(error, "controller_failure", error))
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(cause).__name__


@contextlib.contextmanager
def _watched(board: Any, task: Task, warn: Callable[[str], None] | None) -> Iterator[None]:
    """Show what the workers tell, while the block runs."""
    stop = threading.Event()
    watch = _Watch(board, task, warn)

    def poll() -> None:
        while not stop.wait(_POLL_S):
            watch.look()

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        watch.look()


class _Watch:
    """Brings the board's news to the progress."""

    def __init__(self, board: Any, task: Task, warn: Callable[[str], None] | None) -> None:
        self._board, self._task, self._warn = board, task, warn
        self._notes = self._warnings = 0
        self._heard = time.monotonic()

    def look(self) -> None:
        """Show what is new."""
        try:
            notes, step, text, warnings, _ = ray.get(self._board.read.remote(), timeout=10 * _POLL_S)
        except ray.exceptions.RayError:  # a busy or lost board costs a look, never the training
            return
        if self._warn is not None:
            for warning in warnings[self._warnings :]:
                self._warn(warning)
        self._warnings = len(warnings)
        now = time.monotonic()
        if notes > self._notes:
            self._notes, self._heard = notes, now
        silent_s = now - self._heard
        if not notes:
            text = "starting workers"
        if silent_s > _SILENCE_S:
            text = f"{text}; no word from a worker for {silent_s:.0f} s"
        self._task.advance(max(0, step - self._task.done), note=text)
