"""The commands of the stages: each loads the settings, opens the cohort, connects to Ray and runs one function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ctc_ray.cluster import connect
from ctc_ray.cohort import Cohort
from ctc_ray.command_options import (
    Address,
    Cartridges,
    CohortUri,
    ConfigFile,
    DryRun,
    Force,
    Overrides,
    Patients,
    RetryFailed,
    finish,
    parse_patients,
)
from ctc_ray.config import RunConfig, load_config
from ctc_ray.errors import ConfigError
from ctc_ray.progress import Progress
from ctc_ray.records import PlanRow, StageResult
from ctc_ray.terminal import print_plan

app = typer.Typer(
    name="ctc-ray",
    help="Find circulating tumor cells in fluorescence cartridges, and label where it helps most.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@dataclass(frozen=True)
class Session:
    """What every stage is given: settings, cohort, progress."""

    config: RunConfig
    cohort: Cohort
    progress: Progress
    force: bool


def _stage(
    uri: str,
    options: tuple[Path | None, list[str] | None, str | None, bool, bool],
    run: Callable[[Session], StageResult],
    plan: Callable[[Session], list[PlanRow]],
    *,
    create: bool = False,
    needs_ray: bool = True,
) -> None:
    """Load the settings, open the cohort, then plan or run one stage."""
    config_file, overrides, address, force, dry_run = options
    config = load_config(config_file, overrides or ())
    session = Session(config, Cohort.open(uri, create=create), Progress(), force)
    if dry_run:
        print_plan(plan(session))
    elif needs_ray:
        with connect(address, config.ray):
            result = run(session)
        finish(result)
    else:
        finish(run(session))


def _from_images(
    uri: str,
    options: tuple[Path | None, list[str] | None, str | None, bool, bool],
    run: Callable[..., StageResult],
    plan: Callable[..., list[PlanRow]],
    patients: list[str] | None,
    *,
    retry_failed: bool,
    **source: str,
) -> None:
    """Plan or run a stage that starts a cohort from images."""
    chosen: dict[str, Any] = {**source, "patients": parse_patients(patients), "retry_failed": retry_failed}
    _stage(
        uri,
        options,
        lambda s: run(s.config, s.cohort, **chosen, force=s.force, progress=s.progress),
        lambda s: plan(s.config, s.cohort, **chosen),
        create=True,
    )


@app.command()
def segment(
    cohort: CohortUri,
    cartridges: Cartridges,
    patients: Patients = None,
    retry_failed: RetryFailed = False,
    config: ConfigFile = None,
    set_: Overrides = None,
    address: Address = None,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Find cells with StarDist and cut them out."""
    from ctc_ray.segment.stage import plan_segment, run_segment

    options = (config, set_, address, force, dry_run)
    _from_images(cohort, options, run_segment, plan_segment, patients, retry_failed=retry_failed, cartridges=cartridges)


@app.command()
def ingest(
    cohort: CohortUri,
    cartridges: Cartridges,
    patients: Patients = None,
    retry_failed: RetryFailed = False,
    config: ConfigFile = None,
    set_: Overrides = None,
    address: Address = None,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Segment and embed in one streaming plan, with an encoder that is there already."""
    from ctc_ray.ingest.stage import plan_ingest, run_ingest

    options = (config, set_, address, force, dry_run)
    _from_images(cohort, options, run_ingest, plan_ingest, patients, retry_failed=retry_failed, cartridges=cartridges)


@app.command("import-crops")
def import_crops(
    cohort: CohortUri,
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="CSV, Parquet or npz file, or a folder of them; a path or URI.")
    ],
    patients: Patients = None,
    retry_failed: RetryFailed = False,
    config: ConfigFile = None,
    set_: Overrides = None,
    address: Address = None,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Bring in single-cell images that another program cut out: image files, npz arrays, Parquet."""
    from ctc_ray.imports.stage import plan_import_crops, run_import_crops

    options = (config, set_, address, force, dry_run)
    _from_images(
        cohort, options, run_import_crops, plan_import_crops, patients, retry_failed=retry_failed, source=source
    )


@app.command()
def split(
    cohort: CohortUri,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the assignment.")] = None,
    config: ConfigFile = None,
    set_: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Give every patient a role; roles once given stay."""
    from ctc_ray.split import plan_split, split_patients

    overrides = [*(set_ or ()), *([f"split.seed={seed}"] if seed is not None else [])]
    _stage(
        cohort,
        (config, overrides, None, False, dry_run),
        lambda s: split_patients(s.config.split, s.cohort),
        lambda s: plan_split(s.config.split, s.cohort),
        needs_ray=False,
    )


@app.command()
def pretrain(
    cohort: CohortUri,
    config: ConfigFile = None,
    set_: Overrides = None,
    address: Address = None,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Train the encoder with DINO on the patients of role pretrain."""
    from ctc_ray.pretrain.stage import plan_pretrain, run_pretrain

    _stage(
        cohort,
        (config, set_, address, force, dry_run),
        lambda s: run_pretrain(s.config, s.cohort, force=s.force, progress=s.progress),
        lambda s: plan_pretrain(s.config, s.cohort),
    )


@app.command()
def embed(
    cohort: CohortUri,
    patients: Patients = None,
    config: ConfigFile = None,
    set_: Overrides = None,
    address: Address = None,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Turn every crop into a vector."""
    from ctc_ray.embed.stage import plan_embed, run_embed

    names = parse_patients(patients)
    _stage(
        cohort,
        (config, set_, address, force, dry_run),
        lambda s: run_embed(s.config, s.cohort, patients=names, force=s.force, progress=s.progress),
        lambda s: plan_embed(s.config, s.cohort, patients=names),
    )


@app.command("map")
def map_command(
    cohort: CohortUri,
    config: ConfigFile = None,
    set_: Overrides = None,
    address: Address = None,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Fit the latent map (PCA, UMAP, HDBSCAN) and place every cell on it."""
    from ctc_ray.latent.stage import plan_map, run_map

    _stage(
        cohort,
        (config, set_, address, force, dry_run),
        lambda s: run_map(s.config, s.cohort, force=s.force, progress=s.progress),
        lambda s: plan_map(s.config, s.cohort),
    )


@app.command()
def train(
    cohort: CohortUri, config: ConfigFile = None, set_: Overrides = None, force: Force = False, dry_run: DryRun = False
) -> None:
    """Train the classifier on the labelled cells; F1 per cluster on the test patients."""
    from ctc_ray.classify.stage import plan_train, run_train

    _stage(
        cohort,
        (config, set_, None, force, dry_run),
        lambda s: run_train(s.config, s.cohort, force=s.force, progress=s.progress),
        lambda s: plan_train(s.config, s.cohort),
        needs_ray=False,
    )


@app.command("filter-noise")
def filter_noise(
    cohort: CohortUri,
    config: ConfigFile = None,
    set_: Overrides = None,
    address: Address = None,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Train the noise filter on cells labelled artefact, and score every cell with it."""
    from ctc_ray.classify.noise_stage import plan_filter_noise, run_filter_noise

    _stage(
        cohort,
        (config, set_, address, force, dry_run),
        lambda s: run_filter_noise(s.config, s.cohort, force=s.force, progress=s.progress),
        lambda s: plan_filter_noise(s.config, s.cohort),
    )


@app.command()
def index(
    cohort: CohortUri,
    config: ConfigFile = None,
    set_: Overrides = None,
    address: Address = None,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Build the nearest-neighbour index over all embeddings."""
    from ctc_ray.index.stage import plan_index, run_index

    _stage(
        cohort,
        (config, set_, address, force, dry_run),
        lambda s: run_index(s.config, s.cohort, force=s.force, progress=s.progress),
        lambda s: plan_index(s.config, s.cohort),
    )


@app.command()
def simulate(
    cohort: Annotated[
        str | None, typer.Argument(metavar="[COHORT]", help="Cohort; or give --release and --out.")
    ] = None,
    release: Annotated[str | None, typer.Option("--release", help="Folder of the published processed release.")] = None,
    out: Annotated[str | None, typer.Option("--out", help="Folder for the results of a release.")] = None,
    scenario: Annotated[list[str] | None, typer.Option("--scenario", help="Scenario; repeatable.")] = None,
    strategy: Annotated[list[str] | None, typer.Option("--strategy", help="Strategy; repeatable.")] = None,
    seeds: Annotated[str | None, typer.Option("--seeds", help="paper, or a number of seeds.")] = None,
    main_cluster: Annotated[
        list[int] | None,
        typer.Option("--main-cluster", help="Main cluster of limited-local, region of rare-positive; repeatable."),
    ] = None,
    mode: Annotated[str | None, typer.Option("--mode", help="faithful or corrected.")] = None,
    flip_rate: Annotated[
        list[float] | None,
        typer.Option("--flip-rate", help="Share of wrong answers; repeatable for a sweep over several."),
    ] = None,
    fault: Annotated[
        list[str] | None,
        typer.Option("--fault", help="Fault of the reference that corrected mode leaves in; repeatable."),
    ] = None,
    config: ConfigFile = None,
    set_: Overrides = None,
    address: Address = None,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Sweep human-in-the-loop simulations over strategies and seeds with Ray Tune."""
    from ctc_ray.hil.stage import plan_simulate, run_simulate

    if (cohort is None) == (release is None) or (release is not None and out is None):
        raise ConfigError("give either a COHORT, or --release DIR with --out OUT")
    given: dict[str, object] = {"scenarios": scenario, "strategies": strategy, "main_clusters": main_cluster}
    given |= {"seeds": seeds, "mode": mode, "flip_rates": flip_rate, "faults": fault}
    overrides = [*(set_ or ()), *(f"hil.{name}={value!r}" for name, value in given.items() if value)]
    settings = load_config(config, overrides)
    place = Cohort.open(cohort) if cohort is not None else None
    if dry_run:
        print_plan(plan_simulate(settings, place, release=release, out=out))
        return
    with connect(address, settings.ray):
        result = run_simulate(settings, place, release=release, out=out, force=force, progress=Progress())
    finish(result)


@app.command()
def detect(
    cohort: CohortUri,
    patients: Patients = None,
    config: ConfigFile = None,
    set_: Overrides = None,
    address: Address = None,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """List the CTC candidates of new patients."""
    from ctc_ray.detect.stage import plan_detect, run_detect

    names = parse_patients(patients)
    _stage(
        cohort,
        (config, set_, address, force, dry_run),
        lambda s: run_detect(s.config, s.cohort, patients=names, force=s.force, progress=s.progress),
        lambda s: plan_detect(s.config, s.cohort, patients=names),
    )


@app.command()
def compare(
    cohort: CohortUri,
    cellsearch: Annotated[str, typer.Option("--cellsearch", help="Folder that holds one cartridge folder a patient.")],
    config: ConfigFile = None,
    set_: Overrides = None,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Compare the candidates with CellSearch's events."""
    from ctc_ray.detect.compare import plan_compare, run_compare

    _stage(
        cohort,
        (config, set_, None, force, dry_run),
        lambda s: run_compare(s.config, s.cohort, cellsearch=cellsearch, force=s.force, progress=s.progress),
        lambda s: plan_compare(s.config, s.cohort, cellsearch=cellsearch),
        needs_ray=False,
    )


@app.command()
def report(cohort: CohortUri, config: ConfigFile = None, set_: Overrides = None, dry_run: DryRun = False) -> None:
    """Write the HTML report from whatever has been computed."""
    from ctc_ray.report.stage import plan_report, run_report

    _stage(
        cohort,
        (config, set_, None, False, dry_run),
        lambda s: run_report(s.config, s.cohort, progress=s.progress),
        lambda s: plan_report(s.config, s.cohort),
        needs_ray=False,
    )
