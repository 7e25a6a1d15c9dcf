"""All that a page shows: frames, a few crops, and the settings they were made with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt
import polars as pl

from ctc_ray.config import RunConfig
from ctc_ray.report.agreement import MapAgreement
from ctc_ray.report.simulation_frames import SimulationFrames


@dataclass(frozen=True)
class ReportData:
    """Inputs of a page. A frame is None where its stage has not run; the page then names the command.

    Attributes:
        config: settings of the run.
        cohort_uri: as the user gave it; commands on the page name it.
        patients: `frames.PATIENTS_FRAME`.
        flow: `frames.FLOW_FRAME`.
        failures: FAILURES_SCHEMA.
        points: points of the latent map, with probability and error.
        outlines: `latent_points.cluster_outlines`.
        clusters: `frames.cluster_frame`.
        examples: cells of each cluster to show: cluster, rank, cell_id, patient, role, label, probability.
        agreement: how the clusters agree with another map's; the page says nothing where no other was compared.
        simulation: curves, Table 1 and comparison of the simulation.
        ppv: PPV table of `compare`, the last row the total.
        sensitivity: sensitivity table of `compare`.
        candidates: `frames.candidates_frame`.
        missed: `frames.missed_events_frame`.
        contrast: `survey.contrast_frame`.
        real_field: one row: average_precision_50, num_true, num_found, source.
        real_field_png: the picture of the real field.
        crops: cell_id -> (C, 48, 48).
        versions: library -> version.
    """

    config: RunConfig
    cohort_uri: str
    patients: pl.DataFrame
    flow: pl.DataFrame
    failures: pl.DataFrame
    contrast: pl.DataFrame
    points: pl.DataFrame | None = None
    outlines: pl.DataFrame | None = None
    clusters: pl.DataFrame | None = None
    examples: pl.DataFrame | None = None
    agreement: MapAgreement | None = None
    simulation: SimulationFrames | None = None
    ppv: pl.DataFrame | None = None
    sensitivity: pl.DataFrame | None = None
    candidates: pl.DataFrame | None = None
    missed: pl.DataFrame | None = None
    real_field: pl.DataFrame | None = None
    real_field_png: bytes | None = None
    crops: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def frames(self) -> dict[str, pl.DataFrame]:
        """Every frame that is there, by the name of the file it is saved under."""
        named = {
            "patients": self.patients,
            "flow": self.flow,
            "failures": self.failures,
            "latent_map": self.points,
            "cluster_outlines": self.outlines,
            "clusters": self.clusters,
            "cluster_examples": self.examples,
            "map_agreement": None if self.agreement is None else self.agreement.shared,
            "map_agreement_cells": None if self.agreement is None else self.agreement.cells,
            "hil_f1": None if self.simulation is None else self.simulation.curves,
            "table1": None if self.simulation is None else self.simulation.table1,
            "comparison": None if self.simulation is None else self.simulation.comparison,
            "table2": self.ppv,
            "sensitivity": self.sensitivity,
            "candidates": self.candidates,
            "missed_events": self.missed,
            "contrast": self.contrast,
            "real_field": self.real_field,
        }
        return {name: frame for name, frame in named.items() if frame is not None}
