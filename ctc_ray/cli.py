"""The `ctc-ray` command; `jobs/*.py` run the same commands under `ray job submit`."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from ctc_ray import __version__, stage_commands
from ctc_ray.cluster import Wanted, connect, examine
from ctc_ray.cohort import Cohort
from ctc_ray.command_options import (
    EXIT_SET_ASIDE,
    Address,
    CohortUri,
    ConfigFile,
    Force,
    Overrides,
    Patients,
    finish,
    parse_patients,
)
from ctc_ray.config import load_config
from ctc_ray.errors import ConfigError, CtcRayError
from ctc_ray.progress import Progress
from ctc_ray.records import StageResult
from ctc_ray.terminal import print_findings, print_result

app = stage_commands.app
STAGES = tuple(sorted(c.name or getattr(c.callback, "__name__", "") for c in app.registered_commands))
"""Commands that can run as a job."""
labels_app = typer.Typer(
    help="Label events: simulated expert, and carrying labels over a new segmentation.", no_args_is_help=True
)
app.add_typer(labels_app, name="labels")

TruthFile = Annotated[str, typer.Option("--truth", help="truth.parquet that `ctc-ray phantom` wrote.")]


@app.command()
def demo(
    out: Annotated[str, typer.Argument(help="Folder for the demo; run again to continue it.")] = "demo",
    config: ConfigFile = None,
    set_: Overrides = None,
    address: Address = None,
) -> None:
    """Run the whole flow on a phantom cohort: from cartridge TIFFs to a report."""
    from ctc_ray.demo import load_demo_config, run_demo

    settings = load_demo_config(config, set_ or ())
    set_aside = run_demo(settings, Path(out), address=address, progress=Progress())
    if set_aside:
        raise typer.Exit(EXIT_SET_ASIDE)


@app.command()
def phantom(
    out: Annotated[str, typer.Argument(help="Folder for the cartridges.")],
    patients: Annotated[int | None, typer.Option("--patients", min=1, help="Number of patients.")] = None,
    fields: Annotated[int | None, typer.Option("--fields", min=1, help="Fields a cartridge.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Same seed, same bytes.")] = None,
    profile: Annotated[str | None, typer.Option("--profile", help="paper or demo.")] = None,
    config: ConfigFile = None,
    set_: Overrides = None,
    force: Force = False,
) -> None:
    """Write synthetic cartridges in the CellSearch layout, with ground truth."""
    from ctc_ray.phantom import write_phantom

    given = {"patients": patients, "fields": fields, "seed": seed, "profile": profile}
    overrides = [f"phantom.{name}={value}" for name, value in given.items() if value is not None]
    settings = load_config(config, [*(set_ or ()), *overrides])
    result = write_phantom(settings.phantom, out, progress=Progress(), force=force)
    print_result(
        StageResult(
            stage="phantom",
            units_computed=result.fields_written,
            units_reused=result.fields_reused,
            paths=(out,),
            seconds=result.seconds,
        )
    )


@app.command("train-segmenter")
def train_segmenter(
    images: Annotated[Path, typer.Argument(help="Folder of images (TIFF or PNG), or of phantom cartridges.")],
    masks: Annotated[
        Path, typer.Argument(help="Folder of instance masks with the same names; CARTRIDGES/.masks for a phantom.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for checkpoints and weights.")],
    local: Annotated[bool, typer.Option("--local", help="Train in this process, without Ray.")] = False,
    config: ConfigFile = None,
    set_: Overrides = None,
    address: Address = None,
) -> None:
    """Train a StarDist network on images with instance masks; run again to resume."""
    from ctc_ray.segment.train_segmenter import run_train_segmenter

    settings = load_config(config, set_ or ())
    with contextlib.nullcontext() if local else connect(address, settings.ray):
        trained = run_train_segmenter(settings, images, masks, out, progress=Progress(), local=local)
    finish(
        StageResult(
            stage="train-segmenter",
            units_computed=trained.steps_now,
            units_reused=trained.steps - trained.steps_now,
            set_aside=trained.set_aside,
            counts={"images": trained.images, "held_out_images": trained.held_out},
            paths=(str(trained.out),),
            seconds=trained.seconds,
        )
    )


@app.command("import-encoder")
def import_encoder(
    cohort: CohortUri,
    file: Annotated[Path, typer.Argument(help="The published ctc_dino.pt, or weights in its naming.")],
    encoder_id: Annotated[str, typer.Option("--encoder-id", help="Folder below encoders/.")] = "imported",
    config: ConfigFile = None,
    set_: Overrides = None,
    force: Force = False,
) -> None:
    """Bring in published encoder weights; nothing in the file is executed."""
    from ctc_ray.pretrain.stage import import_encoder as run_import

    settings = load_config(config, set_ or ())
    print_result(run_import(settings, Cohort.open(cohort, create=True), file, encoder_id, force=force))


@app.command()
def similar(
    cohort: CohortUri,
    cell_ids: Annotated[list[str] | None, typer.Argument(metavar="CELL_ID...", help="Cells to start from.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Neighbours a cell; with --unlabelled, in all.")] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    patients: Patients = None,
    clusters: Annotated[
        str | None, typer.Option("--clusters", help="Search these clusters of the map alone: 0,3.")
    ] = None,
    same_cell: Annotated[
        bool, typer.Option("--same-cell", help="Keep other detections of the same physical cell.")
    ] = False,
    unlabelled: Annotated[
        bool,
        typer.Option(
            "--unlabelled", help="Rank the unlabelled cells in one list, like the given cells or all labelled CTCs."
        ),
    ] = False,
    diversity: Annotated[
        float, typer.Option("--diversity", min=0.0, max=1.0, help="With --unlabelled: avoid candidates alike.")
    ] = 0.0,
    contrast: Annotated[
        float, typer.Option("--contrast", min=0.0, help="With --unlabelled: weight of likeness to labelled non-CTCs.")
    ] = 0.0,
    config: ConfigFile = None,
    set_: Overrides = None,
) -> None:
    """List the cells that look most like the given ones, or candidates that look like the labelled CTCs."""
    from ctc_ray.index.retrieval import more_like
    from ctc_ray.index.search import similar as search
    from ctc_ray.terminal import print_neighbours

    settings, opened = load_config(config, set_ or ()), Cohort.open(cohort)
    chosen = parse_clusters(clusters)
    if unlabelled:
        found = more_like(
            settings,
            opened,
            cell_ids,
            k=k,
            patients=parse_patients(patients),
            clusters=chosen,
            contrast=contrast,
            diversity=diversity,
        )
    elif not cell_ids:
        raise ConfigError("give the cells to start from, or --unlabelled to start from all labelled CTCs")
    else:
        found = search(
            settings,
            opened,
            cell_ids,
            k=k,
            patients=parse_patients(patients),
            clusters=chosen,
            exclude_same_cell=not same_cell,
        )
    print_neighbours(found, as_json=as_json)


@app.command("simulation-report")
def simulation_report(
    place: Annotated[
        str,
        typer.Argument(
            metavar="PLACE", help="Folder or URI of a simulation: COHORT/simulations/NAME, or the --out of a release."
        ),
    ],
    out: Annotated[str | None, typer.Option("--out", help="HTML file to write; PLACE/report.html by default.")] = None,
) -> None:
    """Write the page of a simulation: learning curves, Table 1, which strategy is better and by how much."""
    from ctc_ray.report.simulation_page import run_simulation_report

    print_result(run_simulation_report(place, out))


def parse_clusters(text: str | None) -> list[int] | None:
    """Cluster numbers from `0,3`; None where none are given.

    Raises:
        ConfigError: one is no number.
    """
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--clusters {text}: give numbers of clusters separated by commas, as 0,3") from error


@labels_app.command("simulate")
def labels_simulate(
    cohort: CohortUri, truth: TruthFile, config: ConfigFile = None, set_: Overrides = None, force: Force = False
) -> None:
    """Let a simulated expert label phantom cells from their ground truth."""
    from ctc_ray.labels.simulated import simulate_expert

    settings = load_config(config, set_ or ())
    finish(simulate_expert(settings, Cohort.open(cohort), truth, force=force))


@labels_app.command("relink")
def labels_relink(cohort: CohortUri, config: ConfigFile = None, set_: Overrides = None) -> None:
    """After a new segmentation, carry labels to the nearest cell within 5 px."""
    from ctc_ray.labels.relink import relink

    finish(relink(load_config(config, set_ or ()), Cohort.open(cohort)))


@app.command("import-labels")
def import_labels(
    cohort: CohortUri,
    file: Annotated[Path, typer.Argument(help="CSV or Parquet with cell_id, or patient, field, row, col; and label.")],
    reader: Annotated[str, typer.Option("--reader", help="Who labelled.")] = "imported",
) -> None:
    """Bring in labels as events."""
    from ctc_ray.labels.transfer import import_labels as run_import

    finish(run_import(Cohort.open(cohort), file, reader=reader, source=file.name))


@app.command("export-labels")
def export_labels(cohort: CohortUri, file: Annotated[Path, typer.Argument(help="CSV or Parquet to write.")]) -> None:
    """Write the consensus label of every labelled cell."""
    from ctc_ray.labels.transfer import export_labels as run_export

    print_result(run_export(Cohort.open(cohort), file))


@app.command()
def doctor(
    cohort: Annotated[
        str | None, typer.Argument(metavar="[COHORT]", help="Cohort whose write access to check.")
    ] = None,
    address: Address = None,
    cpus: Annotated[int, typer.Option("--cpus", min=0, help="CPUs that an autoscaling cluster shall start first.")] = 0,
    gpus: Annotated[int, typer.Option("--gpus", min=0, help="GPUs that an autoscaling cluster shall start first.")] = 0,
    timeout_s: Annotated[float, typer.Option("--timeout", min=0, help="Seconds to wait for --cpus and --gpus.")] = 600,
) -> None:
    """Show versions, devices, memory and write access, here and on every node of a cluster, and say what to do."""
    findings = examine(cohort, address, Wanted(cpus, gpus, timeout_s) if cpus or gpus else None)
    print_findings(findings)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def submit(
    context: typer.Context,
    stage: Annotated[str, typer.Argument(help="Stage to run, for example embed.")],
    address: Annotated[str, typer.Option("--address", help="Dashboard of the cluster, http://head:8265.")],
    wait: Annotated[bool, typer.Option(help="Follow the job until it ends.")] = True,
    runtime_env: Annotated[
        Path | None, typer.Option("--runtime-env", help="YAML file: Ray's runtime environment of the job.")
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option("--env", metavar="NAME[=VALUE]", help="Environment variable of the job; repeatable."),
    ] = None,
    working_dir: Annotated[
        str | None, typer.Option("--working-dir", help="Folder to send along, without data; the job runs in it.")
    ] = None,
) -> None:
    """Run a stage as a Ray job: `ctc-ray submit embed s3://bucket/cohort --address http://head:8265`."""
    from ctc_ray.submit import check_files_reach_the_cluster, runtime_env_of, submit_stage

    if stage not in (known := submittable()):
        raise ConfigError(f"unknown stage {stage!r}: one of {', '.join(known)}")
    environment = runtime_env_of(runtime_env, env or (), working_dir)
    check_files_reach_the_cluster(context.args, environment)
    code = submit_stage(stage, context.args, address=address, wait=wait, runtime_env=environment)
    if code:
        raise typer.Exit(code)


def submittable() -> list[str]:
    """Commands and groups of commands that can run as a job: all but `submit` itself."""
    commands = {c.name or getattr(c.callback, "__name__", "") for c in app.registered_commands}
    return sorted((commands | {group.name or "" for group in app.registered_groups}) - {"submit"})


def _root_cause(error: BaseException) -> BaseException:
    """Dig out of Ray's wrappers the error that a worker raised: the first of our own, else the innermost `cause`."""
    chain: list[BaseException] = []
    waiting = [error]
    while waiting:
        found = waiting.pop(0)
        if found in chain:
            continue
        chain.append(found)
        # Ray keeps a worker's error as `cause`; Python keeps what was handled as `__cause__`.
        waiting += [
            inner for inner in (getattr(found, "cause", None), found.__cause__) if isinstance(inner, BaseException)
        ]
    for found in chain:
        if isinstance(found, CtcRayError) and type(found).__module__.startswith("ctc_ray"):
            return found
    while isinstance(inner := getattr(error, "cause", None), BaseException):
        error = inner
    return error


def _fail(message: str, code: int) -> NoReturn:
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"ctc-ray: {message}", markup=False)
    sys.exit(code)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; ends the process with the documented exit code.

    Args:
        arguments: words after the program's name; None takes them from the process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if words == ["--version"]:
        typer.echo(__version__)
        sys.exit(0)
    try:
        app(args=words, prog_name="ctc-ray")
    except Exception as error:  # noqa: BLE001 - last line of defence: a user reads one message, --debug shows the rest
        if debug:
            traceback.print_exc()
        cause = _root_cause(error)
        if isinstance(cause, CtcRayError):
            _fail(str(cause), cause.exit_code)
        _fail(f"unexpected {type(cause).__name__}: {cause}. Run again with --debug to see where", 1)


if __name__ == "__main__":
    main()
