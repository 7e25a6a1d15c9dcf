"""Arguments and options that several commands share, and how a command ends."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ctc_ray.records import StageResult
from ctc_ray.terminal import print_result

EXIT_SET_ASIDE = 3
"""Exit code of a run that finished, with some units set aside in `failures/`."""
CohortUri = Annotated[
    str,
    typer.Argument(metavar="COHORT", help="Folder or URI of the cohort, for example ./cohort or s3://bucket/cohort."),
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file with any of the sections.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Override one setting; repeatable.")
]
Address = Annotated[str | None, typer.Option("--address", help="Ray cluster to use; without it, one is started here.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that was made with other settings or inputs.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would run, and why, and stop.")]
Patients = Annotated[
    list[str] | None, typer.Option("--patients", help="Only these patients; repeatable, or separated by commas.")
]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Try again what was set aside.")]
Cartridges = Annotated[str, typer.Option("--cartridges", help="Folder that holds one folder a patient.")]


def parse_patients(values: list[str] | None) -> list[str] | None:
    """Accept `--patients A --patients B` and `--patients A,B`."""
    names = [name.strip() for value in values or () for name in value.split(",") if name.strip()]
    return names or None


def finish(result: StageResult) -> None:
    """Print a result, and end with exit code 3 where units were set aside."""
    print_result(result)
    if result.set_aside:
        raise typer.Exit(EXIT_SET_ASIDE)
