"""RunConfig: one frozen section per stage, read from YAML and `--set`, with the fingerprint that makes an identity.

Importing this package loads neither Ray nor Torch. Fields marked operational (actor counts, batch sizes, machine size) do not
change results and stay outside the identity of an output.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from ctc_ray.config.analysis import (
    CompareConfig,
    DetectConfig,
    FilterNoiseConfig,
    HilConfig,
    IndexConfig,
    LabelsConfig,
    MapConfig,
    RayConfig,
    ReportConfig,
    TrainConfig,
)
from ctc_ray.config.images import (
    EmbedConfig,
    ImportCropsConfig,
    PhantomConfig,
    PretrainConfig,
    SegmentConfig,
    SplitConfig,
    TrainSegmenterConfig,
)
from ctc_ray.config.section import (
    FaultName,
    Precision,
    ResizeRule,
    Section,
    neutral,
    operational,
)
from ctc_ray.errors import ConfigError

__all__ = [
    "CompareConfig",
    "DetectConfig",
    "EmbedConfig",
    "FaultName",
    "FilterNoiseConfig",
    "HilConfig",
    "ImportCropsConfig",
    "IndexConfig",
    "LabelsConfig",
    "MapConfig",
    "PhantomConfig",
    "Precision",
    "PretrainConfig",
    "RayConfig",
    "ReportConfig",
    "ResizeRule",
    "RunConfig",
    "Section",
    "SegmentConfig",
    "SplitConfig",
    "TrainConfig",
    "TrainSegmenterConfig",
    "load_config",
    "neutral",
    "operational",
]


class RunConfig(Section):
    """All settings of a run."""

    phantom: PhantomConfig = PhantomConfig()
    segment: SegmentConfig = SegmentConfig()
    train_segmenter: TrainSegmenterConfig = TrainSegmenterConfig()
    import_crops: ImportCropsConfig = ImportCropsConfig()
    split: SplitConfig = SplitConfig()
    pretrain: PretrainConfig = PretrainConfig()
    embed: EmbedConfig = EmbedConfig()
    map: MapConfig = MapConfig()
    labels: LabelsConfig = LabelsConfig()
    train: TrainConfig = TrainConfig()
    filter_noise: FilterNoiseConfig = FilterNoiseConfig()
    index: IndexConfig = IndexConfig()
    hil: HilConfig = HilConfig()
    detect: DetectConfig = DetectConfig()
    compare: CompareConfig = CompareConfig()
    report: ReportConfig = ReportConfig()
    ray: RayConfig = RayConfig()


def load_config(file: str | Path | None = None, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a configuration.

    Args:
        file: YAML with any of the sections; None for the defaults.
        overrides: `section.field=value`, the value in YAML; they win over the file.

    Raises:
        ConfigError: the file cannot be read, a key is unknown (the message names the nearest valid one), or a value is wrong.
    """
    values: dict[str, Any] = {}
    where = "the defaults"
    if file is not None:
        where = str(file)
        values = _read_yaml(Path(file))
    for override in overrides:
        _apply_override(values, override)
    _refuse_unknown(values, where)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{where}: {key} = {first.get('input')!r} is wrong: {first['msg']}") from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} must hold sections (for example `segment:`), not a {type(loaded).__name__}")
    return {str(key): value for key, value in loaded.items()}


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    section, dot, name = key.strip().partition(".")
    if not separator or not dot or not name:
        raise ConfigError(
            f"--set {override!r}: write it as section.field=value, for example --set segment.precision=fp32"
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: {text!r} is not a YAML value") from error
    group = values.setdefault(section, {})
    if not isinstance(group, dict):
        raise ConfigError(f"--set {override!r}: {section} is not a section")
    group[name] = value


def _refuse_unknown(values: Mapping[str, Any], where: str) -> None:
    sections = RunConfig.model_fields
    for section, group in values.items():
        if section not in sections:
            raise ConfigError(f"{where}: unknown section {section!r}{_nearest(section, sections)}")
        kind = sections[section].annotation
        if not isinstance(group, Mapping):
            raise ConfigError(f"{where}: section {section!r} must hold settings, not {group!r}")
        fields = kind.model_fields if isinstance(kind, type) and issubclass(kind, Section) else get_args(kind)
        for name in group:
            if name not in fields:
                raise ConfigError(f"{where}: unknown key {section}.{name}{_nearest(str(name), fields)}")


def _nearest(name: str, valid: Iterable[str]) -> str:
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f": did you mean {close[0]!r}?" if close else f"; valid are {', '.join(names)}"
