"""What is to be done for each patient: fields to segment, fields whose vectors alone are missing, vectors to join."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ctc_ray.cohort import Cohort
from ctc_ray.config import EmbedConfig
from ctc_ray.embed.units import parts_folder
from ctc_ray.errors import StaleOutputError
from ctc_ray.records import State, identity_of, read_record, state_of
from ctc_ray.segment.cartridge import FieldFile
from ctc_ray.segment.plan import PatientPlan, Settings, finished_fields
from ctc_ray.segment.read_step import FieldTask
from ctc_ray.segment.stream import field_tasks
from ctc_ray.storage import Store

STAGE = "ingest"
EXTENDS_NAME = "extends.json"
"""Beside the parts of vectors: which embeddings they add to, where set-aside fields of a finished patient are tried again."""


@dataclass(frozen=True)
class Encoder:
    """What embeds, as far as identities need it.

    Attributes:
        name: id of the encoder.
        fingerprint: of its weights and description.
        width: embedding width D.
        settings: of the embed stage that enter an identity, the precision resolved.
    """

    name: str
    fingerprint: str
    width: int
    settings: Mapping[str, Any]

    def inputs(self, cells_identity: str) -> dict[str, str]:
        """Inputs of a patient's embeddings, as the embed stage records them."""
        return {"cells": cells_identity, "encoder": self.fingerprint}

    def identity(self, cells_identity: str) -> str:
        """Identity of a patient's embeddings: that which the embed stage would give them."""
        return identity_of("embed", self.settings, self.inputs(cells_identity))


@dataclass(frozen=True)
class VectorPlan:
    """The vectors of one patient.

    Attributes:
        patient: id.
        output: folder of its embeddings, relative to the cohort.
        identity: that they will have.
        settings: for their record.
        inputs: for their record.
        width: embedding width D.
        state: where the output stands.
        extends: identity of finished embeddings whose shards stay, since cells are only added to theirs.
        fields: frame numbers whose vectors, and whose cells, lie in parts already.
    """

    patient: str
    output: str
    identity: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    width: int
    state: State
    extends: str | None
    fields: frozenset[int]

    @property
    def parts_folder(self) -> str:
        """Where vectors of single fields wait for the patient to be complete, relative to the cohort."""
        return parts_folder(self.output, self.identity)


@dataclass(frozen=True)
class IngestPlan:
    """One patient.

    Attributes:
        cells: what segmentation has to do.
        vectors: what embedding has to do.
        unembedded: fields whose cells lie in parts, without vectors: an interrupted `segment` left them.
    """

    cells: PatientPlan
    vectors: VectorPlan
    unembedded: tuple[FieldFile, ...]

    @property
    def patient(self) -> str:
        """Id of the patient."""
        return self.cells.patient

    @property
    def num_fields(self) -> int:
        """Fields that go through the plan."""
        return len(self.cells.todo) + len(self.unembedded)

    def tasks(self, images: Store, settings: Settings) -> list[FieldTask]:
        """Tasks of the fields that go through the plan; opens the first images to learn the pixel type."""
        plan, folder = self.cells, self.vectors.parts_folder
        ready = [
            FieldTask(file, plan.parts_folder, "", plan.channel_map, plan.fingerprint, has_cells=True)
            for file in self.unembedded
        ]
        return [
            dataclasses.replace(task, vectors_folder=folder) for task in [*field_tasks(plan, images, settings), *ready]
        ]


def plan_vectors(section: EmbedConfig, cohort: Cohort, cells: PatientPlan, encoder: Encoder) -> IngestPlan:
    """Look at a patient's embeddings, finished and in parts.

    Args:
        section: of the embed stage.
        cohort: with them.
        cells: what segmentation does for the patient.
        encoder: what embeds.
    """
    store, patient = cohort.store, cells.patient
    output, identity = cohort.embeddings(section.encoder, patient), encoder.identity(cells.identity)
    folder = parts_folder(output, identity)
    with_vectors = finished_fields(store, folder)
    with_cells = finished_fields(store, cells.parts_folder) if cells.is_open else with_vectors
    vectors = VectorPlan(
        patient=patient,
        output=output,
        identity=identity,
        settings=encoder.settings,
        inputs=encoder.inputs(cells.identity),
        width=encoder.width,
        state=state_of(store, output, identity),
        extends=_extended(store, output, folder, cells, encoder),
        fields=frozenset(with_vectors & with_cells),
    )
    return IngestPlan(
        cells, vectors, tuple(file for file in cells.cartridge.fields if file.field in with_cells - with_vectors)
    )


def _extended(store: Store, output: str, folder: str, cells: PatientPlan, encoder: Encoder) -> str | None:
    """Identity of the patient's finished embeddings where cells are, or in an interrupted run were, added to theirs."""
    record = read_record(store, output)
    if record is None:
        return None
    if cells.kept is not None:
        return record.identity if record.identity == encoder.identity(cells.kept.identity) else None
    marker = f"{folder}/{EXTENDS_NAME}"
    noted = store.read_json(marker)["identity"] if store.exists(marker) else None
    return record.identity if record.identity == noted else None


def note_extensions(cohort: Cohort, plans: Sequence[IngestPlan]) -> None:
    """Write down which finished embeddings are added to, so that a killed run can go on with it."""
    for plan in plans:
        if plan.cells.kept is not None and plan.vectors.extends is not None:
            path = f"{plan.vectors.parts_folder}/{EXTENDS_NAME}"
            cohort.store.write_json(path, {"identity": plan.vectors.extends})


def refuse_stale_vectors(cohort: Cohort, plans: Sequence[IngestPlan], *, force: bool) -> None:
    """Stop before anything is written where embeddings are of another time.

    Raises:
        StaleOutputError: a patient's embeddings are stale, and `force` is not set.
    """
    stale = [plan.patient for plan in plans if plan.vectors.state is State.STALE and plan.vectors.extends is None]
    if stale and not force:
        raise StaleOutputError(
            f"embeddings of {', '.join(stale)} in {cohort.store.uri} were made from other cells, with another encoder or other "
            "settings. Run again with --force to replace them (the old ones stay until the new ones are complete)"
        )
