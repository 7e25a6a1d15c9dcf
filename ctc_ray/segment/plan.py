"""What the stage has to do for each patient, decided without Ray and without opening an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ctc_ray.cohort import Cohort
from ctc_ray.config import SegmentConfig
from ctc_ray.errors import CartridgeError, ConfigError, StaleOutputError
from ctc_ray.records import (
    FailureRow,
    Record,
    State,
    canonical_json,
    digest_of,
    identity_of,
    read_failures,
    read_record,
    state_of,
)
from ctc_ray.schema import Channel
from ctc_ray.segment.cartridge import Cartridge, FieldFile, find_cartridge, find_patients, is_image
from ctc_ray.segment.field_image import USUAL_CHANNELS, Contrast, check_channel_map
from ctc_ray.storage import Store

STAGE = "segment"
COHORT_PATH = "cohort.json"
"""What is decided once for a cohort, such as the precision that `auto` means."""

_NEUTRAL = {"contrast": "raw", "frame_order": "auto"}
"""Settings that are no part of an identity at these values, so that outputs made before they existed stay complete."""
_REASONS = {
    State.ABSENT: "not segmented yet",
    State.STALE: "made with another configuration, weights or images",
    State.COMPLETE: "same configuration, weights and images",
}


@dataclass(frozen=True)
class Settings:
    """The configuration, resolved: everything that decides which cells are found.

    Attributes:
        weights: source of the weights.
        precision: `fp32` or `bf16`.
        prob_thresh: cut of the object probability.
        nms_thresh: cut of the overlap.
        percentiles: of the CK page, become 0 and 1.
        max_candidates: cap before non-maximum suppression.
        skip_background: whether empty parts of a field are left out of the network.
        channel_map: channel -> page; the usual pages where the user gave none.
        channels_by_name: whether the names of an archive's filters come before `channel_map`.
        contrast: `raw` or `unstretched`.
        pixel_size_um: edge of a pixel.
        duplicate_radius_px: for detections of different fields.
        measure_overlap: whether fields are looked at for it.
        fingerprint: 16 hex characters that enter every `cell_id`.
        identity: what enters the identity of a patient's output.
    """

    weights: str | None
    precision: str
    prob_thresh: float
    nms_thresh: float
    percentiles: tuple[float, float]
    max_candidates: int
    skip_background: bool
    channel_map: Mapping[Channel, int | None]
    channels_by_name: bool
    contrast: Contrast
    pixel_size_um: float
    duplicate_radius_px: float
    measure_overlap: bool
    fingerprint: str
    identity: Mapping[str, Any]


@dataclass(frozen=True)
class PatientPlan:
    """What is to be done for one patient.

    Attributes:
        patient: id.
        cartridge: its fields.
        inputs: file -> bytes as text, and the weights' fingerprint.
        identity: of the output.
        state: where the output stands.
        why: the reason, for `--dry-run`.
        kept: the output's record where its cells stay and only set-aside fields are tried again.
        todo: fields to segment.
        reused: frame numbers whose cells are there, finished by an interrupted run or by the kept output.
        channel_map: channel -> page.
        fingerprint: that enters this patient's every `cell_id`: that of the settings, unless its pages are others.
    """

    patient: str
    cartridge: Cartridge
    inputs: Mapping[str, str]
    identity: str
    state: State
    why: str
    kept: Record | None
    todo: tuple[FieldFile, ...]
    reused: tuple[int, ...]
    channel_map: Mapping[Channel, int | None]
    fingerprint: str

    @property
    def parts_folder(self) -> str:
        """Where parts of single fields wait for the patient to be complete, relative to the cohort."""
        return f"cells/{self.patient}/_parts/{self.identity[:12]}"

    @property
    def is_open(self) -> bool:
        """Whether anything is to be done."""
        return self.state is not State.COMPLETE or self.kept is not None


def part_name(field: int) -> str:
    """File name of one field's part."""
    return f"field-{field:05d}.parquet"


def resolve_settings(config: SegmentConfig, precision: str) -> Settings:
    """Resolve the configuration against the weights.

    Raises:
        WeightsError: the weights cannot be read.
        ConfigError: the channel map or the percentiles are not usable.
    """
    from ctc_ray.segment.gating import gate_constants  # torch, which only the driver needs here
    from ctc_ray.segment.weights import load_weights

    weights = load_weights(config.weights)
    low, high = config.normalize_percentiles
    if not 0 <= low < high <= 100:
        raise ConfigError(f"segment.normalize_percentiles is {low}, {high}; it needs 0 <= low < high <= 100")
    channel_map = check_channel_map(USUAL_CHANNELS if config.channel_map is None else config.channel_map)
    prob = weights.thresholds.prob if config.prob_threshold is None else config.prob_threshold
    nms = weights.thresholds.nms if config.nms_threshold is None else config.nms_threshold
    finds: dict[str, Any] = {
        "weights": weights.fingerprint,
        "precision": precision,
        "thresholds": [prob, nms],
        "percentiles": [low, high],
        "max_candidates": config.max_candidates,
        "channel_map": _named(channel_map),
    }
    if config.skip_background:
        finds["skip_background"] = gate_constants()
    if config.contrast != "raw":
        finds["contrast"] = config.contrast
    rest = {
        key: value
        for key, value in config.identity().items()
        if key not in ("weights", "precision") and _NEUTRAL.get(key) != value
    }
    return Settings(
        weights=config.weights,
        precision=precision,
        prob_thresh=prob,
        nms_thresh=nms,
        percentiles=(low, high),
        max_candidates=config.max_candidates,
        skip_background=config.skip_background,
        channel_map=channel_map,
        channels_by_name=config.channel_map is None,
        contrast=config.contrast,
        pixel_size_um=config.pixel_size_um,
        duplicate_radius_px=config.duplicate_radius_px,
        measure_overlap=config.measure_overlap,
        fingerprint=digest_of(finds),
        identity=rest | finds,
    )


def _named(channel_map: Mapping[Channel, int | None]) -> dict[str, int | None]:
    return {channel.name: page for channel, page in channel_map.items()}


def recorded_precision(cohort: Cohort, asked: str) -> str | None:
    """The precision that `auto` means in this cohort, None where it is not decided yet; other values are themselves."""
    from ctc_ray.segment.model import resolve_precision  # torch, which only the driver needs here

    if asked != "auto":
        return resolve_precision(asked)
    if not cohort.store.exists(COHORT_PATH):
        return None
    found = cohort.store.read_json(COHORT_PATH).get("precision", {}).get(STAGE)
    return None if found is None else resolve_precision(str(found))


def record_precision(cohort: Cohort, precision: str) -> None:
    """Decide once what `auto` means in this cohort, so that two kinds of machine cannot give two sets of cells."""
    values = cohort.store.read_json(COHORT_PATH) if cohort.store.exists(COHORT_PATH) else {}
    values["precision"] = values.get("precision", {}) | {STAGE: precision}
    cohort.store.write_json(COHORT_PATH, values)


def plan_patients(
    config: SegmentConfig,
    settings: Settings,
    cohort: Cohort,
    cartridges: Store,
    *,
    patients: Sequence[str] | None,
    retry_failed: bool,
) -> tuple[list[PatientPlan], dict[str, FailureRow]]:
    """Look at every patient's folder and output.

    Args:
        config: the stage's section.
        settings: the same, resolved.
        cohort: where cells go.
        cartridges: folder of patient folders.
        patients: which; None for all.
        retry_failed: whether set-aside fields of complete patients are tried again.

    Returns:
        One plan a patient, by name, and the patients whose folder has no usable image, with the reason.

    Raises:
        ConfigError: a named patient has no folder.
        CartridgeError: no patient has any image.
    """
    found = find_patients(cartridges)
    unknown = sorted(set(patients or ()) - set(found))
    if unknown:
        raise ConfigError(
            f"no folder for {', '.join(map(repr, unknown))} in {cartridges.describe()}: it has {', '.join(found)}"
        )
    plans: list[PatientPlan] = []
    empty: dict[str, FailureRow] = {}
    for patient in sorted(set(patients or found)):
        try:
            cartridge = find_cartridge(cartridges, patient, config.layout, config.frame_order)
        except CartridgeError as error:
            empty[patient] = FailureRow(patient, type(error).__name__, str(error))
            continue
        plans.append(_plan_patient(cartridge, settings, cohort, retry_failed=retry_failed))
    if not plans:
        raise CartridgeError(next(iter(empty.values())).message)
    return plans, empty


def _plan_patient(cartridge: Cartridge, settings: Settings, cohort: Cohort, *, retry_failed: bool) -> PatientPlan:
    patient, store = cartridge.patient, cohort.store
    folder = cohort.cells(patient)
    inputs = {path: str(size) for path, size in cartridge.files.items()} | {"weights": settings.identity["weights"]}
    channel_map, fingerprint = settings.channel_map, settings.fingerprint
    if settings.channels_by_name and cartridge.channels not in (None, channel_map):
        channel_map = (
            {channel: cartridge.channels[channel] for channel in Channel} if cartridge.channels else channel_map
        )
        inputs |= {"channels": canonical_json(_named(channel_map))}
        fingerprint = digest_of([fingerprint, inputs["channels"]])
    identity = identity_of(STAGE, settings.identity, inputs)
    state, record = state_of(store, folder, identity), read_record(store, folder)
    kept, why = None, _REASONS[state]
    done = finished_fields(store, f"{folder}/_parts/{identity[:12]}")
    if state is not State.ABSENT and record is not None:
        failed = set(filter(is_image, read_failures(store, STAGE, patient)["source"]))
        only_failed = state is State.COMPLETE or _differs_in(record, settings, inputs) <= failed
        if failed and only_failed and retry_failed:
            kept, why = record, f"{len(failed)} set-aside files are tried again"
            done |= {field.field for field in cartridge.fields if field.path not in failed}
        elif failed and only_failed and state is State.STALE:
            why = "files that were set aside have changed; --retry-failed adds them and keeps the rest"
    fields = cartridge.fields if state is not State.COMPLETE or kept is not None else ()
    todo = tuple(field for field in fields if field.field not in done)
    reused = tuple(sorted(field.field for field in fields if field.field in done))
    return PatientPlan(patient, cartridge, inputs, identity, state, why, kept, todo, reused, channel_map, fingerprint)


def _differs_in(record: Record, settings: Settings, inputs: Mapping[str, str]) -> set[str]:
    """Names of inputs that changed since; a name that no file has where the configuration changed."""
    if identity_of(STAGE, record.config, {}) != identity_of(STAGE, settings.identity, {}):
        return {"configuration"}
    return {name for name in {*inputs, *record.inputs} if inputs.get(name) != record.inputs.get(name)}


def finished_fields(store: Store, parts_folder: str) -> set[int]:
    """Frame numbers that have a part in the folder."""
    names = [path.rsplit("/", 1)[-1] for path in store.list_files(parts_folder, ".parquet")]
    return {int(name.removeprefix("field-").removesuffix(".parquet")) for name in names}


def refuse_stale(cohort: Cohort, plans: Sequence[PatientPlan], *, force: bool) -> None:
    """Stop before anything is written where an output is of another time.

    Raises:
        StaleOutputError: a patient's cells are stale and neither `force` nor a retry covers them.
    """
    stale = [plan for plan in plans if plan.state is State.STALE and plan.kept is None]
    if stale and not force:
        names = ", ".join(plan.patient for plan in stale)
        raise StaleOutputError(
            f"cells of {names} in {cohort.store.uri} are stale: {stale[0].why}. Run again with --force to segment them anew "
            "(the old cells stay until the new ones are complete), or use another cohort"
        )
