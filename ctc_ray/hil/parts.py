"""Where the trials of a sweep put their rows until all of them are there.

A part is written whole or not at all, by one trial, and its name covers everything that its rows follow from: an interrupted
sweep goes on from the parts it finds, and parts of other settings or inputs are never mistaken for its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from ctc_ray.hil.loop import Trial
from ctc_ray.hil.settings import LoopSettings
from ctc_ray.records import digest_of
from ctc_ray.storage import Store

FOLDER = "_parts"


@dataclass(frozen=True)
class Parts:
    """Where the trials of one sweep put their rows.

    Attributes:
        store: the store of the simulation.
        folder: folder of the simulation.
        settings: numbers of the experiment.
        inputs: name -> identity or digest of what the problem was made of.
    """

    store: Store
    folder: str
    settings: LoopSettings
    inputs: Mapping[str, str]

    def name(self, trial: Trial) -> str:
        """File name of a trial's part, readable and unique to trial, settings and inputs."""
        made_of = {"trial": asdict(trial), "settings": asdict(self.settings), "inputs": dict(self.inputs)}
        flips = "" if trial.flip_rate is None else f"-flips{trial.flip_rate:g}"
        main = "" if trial.main_cluster is None else f"-main{trial.main_cluster}"
        return f"{trial.scenario}-{trial.strategy}{main}{flips}-seed{trial.seed}-{digest_of(made_of)}.parquet"

    def path(self, trial: Trial) -> str:
        """Path of a trial's part."""
        return f"{self.folder}/{FOLDER}/{self.name(trial)}"

    def finished(self) -> set[str]:
        """Names of the parts that are there."""
        return {path.rsplit("/", 1)[-1] for path in self.store.list_files(f"{self.folder}/{FOLDER}", ".parquet")}
