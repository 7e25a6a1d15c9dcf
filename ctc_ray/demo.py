"""The whole flow on a phantom cohort: cartridges written as files, every stage through Ray, a report at the end."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from importlib.resources import files
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ctc_ray.cluster import connect
from ctc_ray.cohort import Cohort
from ctc_ray.config import RunConfig, load_config
from ctc_ray.errors import StaleOutputError
from ctc_ray.progress import Progress
from ctc_ray.records import StageResult
from ctc_ray.report.real_field import RealField

_REAL_PATIENT = "nuclei"


@dataclasses.dataclass(frozen=True)
class DemoPaths:
    """Where the demo keeps its files, below one folder."""

    out: Path

    @property
    def cartridges(self) -> Path:
        """Phantom cartridges in the CellSearch layout."""
        return self.out / "cartridges"

    @property
    def cohort(self) -> Path:
        """The cohort that the stages fill."""
        return self.out / "cohort"

    @property
    def real_images(self) -> Path:
        """The real fluorescence field, as an ordinary TIFF."""
        return self.out / "real_field" / "images"

    @property
    def real_cohort(self) -> Path:
        """The cohort of the real field."""
        return self.out / "real_field" / "cohort"


def load_demo_config(file: Path | None = None, overrides: Iterable[str] = ()) -> RunConfig:
    """Read the demo's settings: `jobs/configs/demo.yaml` unless a file is given; overrides win."""
    return load_config(file or Path(str(files("jobs") / "configs" / "demo.yaml")), overrides)


def run_demo(config: RunConfig, out: Path, *, address: str | None = None, progress: Progress) -> int:
    """Run every stage, skipping what is finished, and print a table of results and the report's path.

    Args:
        config: settings of all stages.
        out: folder for cartridges, cohort and report.
        address: Ray cluster; None starts one here.
        progress: where progress goes.

    Returns:
        Number of units that were set aside over all stages.

    Raises:
        StaleOutputError: the folder holds a demo with other settings.
    """
    from ctc_ray.report.terminal import print_summary

    started = time.monotonic()
    paths = DemoPaths(out)
    progress.say(f"ctc_ray demo in {out.absolute()}: about five minutes on two cores; stop and run again at will")
    results: list[StageResult] = []
    with connect(address, config.ray):
        for number, (name, stage) in enumerate(steps := demo_steps(config, paths, progress), start=1):
            begun = time.monotonic()
            progress.say(f"[{number}/{len(steps)}] {name} ...")
            try:
                result = stage()
            except StaleOutputError as error:
                raise StaleOutputError(f"{error}. For the demo: delete {out}, or name another folder") from error
            results.append(result)
            aside = f", {result.set_aside} set aside" if result.set_aside else ""
            counts = f"{result.units_computed} computed, {result.units_reused} reused{aside}"
            progress.say(f"[{number}/{len(steps)}] {name}: {counts}, {time.monotonic() - begun:.1f} s")
    print_summary(Cohort.open(str(paths.cohort)), config)
    progress.say(f"Finished in {time.monotonic() - started:.0f} s. Open the report in a browser:")
    print((paths.cohort / "reports" / config.report.name / "report.html").absolute())  # noqa: T201 - the demo's result
    return sum(result.set_aside for result in results)


def demo_steps(config: RunConfig, paths: DemoPaths, progress: Progress) -> list[tuple[str, Callable[[], StageResult]]]:
    """The stages in order, each a name and a function without arguments."""
    from ctc_ray.classify.baseline import run_baseline
    from ctc_ray.classify.stage import run_train
    from ctc_ray.detect.compare import run_compare
    from ctc_ray.detect.stage import run_detect
    from ctc_ray.embed.stage import run_embed
    from ctc_ray.hil.stage import run_simulate
    from ctc_ray.index.stage import run_index
    from ctc_ray.labels.simulated import simulate_expert
    from ctc_ray.latent.stage import run_map
    from ctc_ray.pretrain.stage import run_pretrain
    from ctc_ray.report.stage import run_report
    from ctc_ray.segment.stage import run_segment
    from ctc_ray.split import split_patients

    cohort = Cohort.open(str(paths.cohort), create=True)
    cartridges, truth = str(paths.cartridges), str(paths.cartridges / "truth.parquet")
    return [
        ("phantom: write cartridges as CellSearch files", lambda: _write_cartridges(config, paths, progress)),
        (
            "segment: StarDist on every field",
            lambda: run_segment(config, cohort, cartridges=cartridges, progress=progress),
        ),
        ("segment: a real fluorescence field", lambda: _segment_real_field(config, paths, progress)),
        ("split: a role for every patient", lambda: split_patients(config.split, cohort)),
        ("pretrain: DINO on Ray Train", lambda: run_pretrain(config, cohort, progress=progress)),
        ("embed: a vector for every cell", lambda: run_embed(config, cohort, progress=progress)),
        ("labels: the simulated expert", lambda: simulate_expert(config, cohort, truth)),
        ("map: PCA, UMAP, HDBSCAN", lambda: run_map(config, cohort, progress=progress)),
        ("train: SVM, F1 per cluster", lambda: run_train(config, cohort, progress=progress)),
        ("train: the same on raw pixels, to compare", lambda: run_baseline(config, cohort)),
        ("simulate: labelling strategies on Ray Tune", lambda: run_simulate(config, cohort, progress=progress)),
        ("index: FAISS", lambda: run_index(config, cohort, progress=progress)),
        ("detect: candidates of new patients", lambda: run_detect(config, cohort, progress=progress)),
        (
            "compare: with CellSearch's events",
            lambda: run_compare(config, cohort, cellsearch=cartridges, progress=progress),
        ),
        ("report", lambda: run_report(config, cohort, real_field=_real_field(config, paths), progress=progress)),
    ]


def _write_cartridges(config: RunConfig, paths: DemoPaths, progress: Progress) -> StageResult:
    from ctc_ray.phantom import write_phantom

    written = write_phantom(config.phantom, paths.cartridges, progress=progress, workers=2)
    return StageResult("phantom", written.fields_written, written.fields_reused, paths=(str(paths.cartridges),))


def _real_image() -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.int32]]:
    """The real fluorescence field that the stardist package ships, and its instance mask."""
    from stardist.data import test_image_nuclei_2d

    image, mask = test_image_nuclei_2d(return_mask=True)
    return image, mask.astype(np.int32)


def _real_field_config(config: RunConfig) -> RunConfig:
    """Settings for an ordinary one-channel image: its one plane stands for CK, which StarDist reads, and for DAPI."""
    segment = config.segment.model_copy(update={"layout": "folder", "channel_map": {"DAPI": 0, "CK": 0, "CD45": None}})
    return config.model_copy(update={"segment": segment})


def _segment_real_field(config: RunConfig, paths: DemoPaths, progress: Progress) -> StageResult:
    """Send the real field through the same stage, as a folder of ordinary TIFFs."""
    import tifffile

    from ctc_ray.segment.stage import run_segment

    target = paths.real_images / _REAL_PATIENT / "field_p1.tif"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(".field_p1.tif.part")
        tifffile.imwrite(temporary, _real_image()[0])
        temporary.replace(target)
    cohort = Cohort.open(str(paths.real_cohort), create=True)
    return run_segment(_real_field_config(config), cohort, cartridges=str(paths.real_images), progress=progress)


def _real_field(config: RunConfig, paths: DemoPaths) -> RealField:
    """Instances of the real field, scored against the mask that comes with it."""
    from stardist.matching import matching

    from ctc_ray.segment import StarDist

    image, mask = _real_image()
    model = StarDist.load(config.segment.weights, precision=config.segment.precision)
    labels = model.predict(image).labels
    cohort = Cohort.open(str(paths.real_cohort))
    points = cohort.read_columns(cohort.cells(_REAL_PATIENT), ["point_row", "point_col"])
    score = matching(mask, labels, thresh=0.5)
    return RealField(
        image=np.asarray(image, np.float32),
        labels=labels,
        average_precision_50=float(score.accuracy),
        num_true=int(score.n_true),
        num_found=points.num_rows,
        source="stardist.data.test_image_nuclei_2d: a field of nuclei with an expert's mask, shipped with the stardist package",
    )
