"""Intensity rules: how raw counts become what the encoder sees.

Shape letters: N crops, C channels, H rows, W columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch

from ctc_ray.errors import ConfigError, SchemaError

RuleName = Literal["constants", "reference", "minmax"]
RULE_NAMES: Final[tuple[RuleName, ...]] = ("constants", "reference", "minmax")

UNIT_FLOOR: Final = -0.1
"""Smallest value of a scaled pixel: camera noise below the background stays visible, outliers do not."""
UNIT_CEILING: Final = 8.0
"""Largest value of a scaled pixel: eight times the recorded high constant."""


@dataclass(frozen=True)
class IntensityRule:
    """How an encoder scales its input; written into `encoder.json`.

    Attributes:
        name: `constants` scales channel c by its recorded `low[c]` and `high[c]`; `reference` maps full scale
            to -1..1; `minmax` stretches each channel of each crop to its own range.
        low: one fraction of full scale per channel, mapped to 0 (only `constants`).
        high: one fraction of full scale per channel, mapped to 1 (only `constants`).
        compression: k of `asinh(k u) / asinh(k)` applied to the scaled value u; 0 leaves it linear. A cartridge
            holds cells whose markers differ a hundredfold, and a linear scale shows only the brightest.
    """

    name: RuleName
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    compression: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in RULE_NAMES:
            msg = f"intensity rule {self.name!r} is unknown: use one of {', '.join(RULE_NAMES)}"
            raise ConfigError(msg)
        if self.name != "constants":
            return
        if len(self.low) != len(self.high) or not self.low:
            msg = f"intensity constants need one low and one high per channel, got {self.low} and {self.high}"
            raise ConfigError(msg)
        for channel, (low, high) in enumerate(zip(self.low, self.high, strict=True)):
            if not (np.isfinite(low) and np.isfinite(high) and low < high):
                msg = (
                    f"intensity constants of channel {channel} are low={low}, high={high}: low must lie below high; "
                    "is that channel blank in the pretraining cells?"
                )
                raise ConfigError(msg)

    def to_json(self) -> dict[str, Any]:
        """The rule as plain JSON values."""
        return {
            "name": self.name,
            "low": list(self.low),
            "high": list(self.high),
            "compression": self.compression,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> IntensityRule:
        """Read what `to_json` wrote.

        Raises:
            ConfigError: an unknown rule or constants that cannot scale.
        """
        return cls(
            name=value["name"],
            low=tuple(float(v) for v in value.get("low", ())),
            high=tuple(float(v) for v in value.get("high", ())),
            compression=float(value.get("compression", 0.0)),
        )


def full_scale_of(dtype: np.dtype[Any]) -> float:
    """The count that stands for full scale in crops of a dtype: 255 for uint8, 65535 for uint16.

    Raises:
        SchemaError: crops of another dtype.
    """
    if dtype not in (np.dtype(np.uint8), np.dtype(np.uint16)):
        msg = f"crops are {dtype}, expected uint8 or uint16 counts: convert them without rescaling"
        raise SchemaError(msg)
    return float(np.iinfo(dtype).max)


def to_fraction(crops_NCHW: npt.NDArray[Any], full_scale: float | None = None) -> torch.Tensor:
    """Turn counts into fractions of full scale.

    Args:
        crops_NCHW: (N, C, H, W) uint8 or uint16 counts.
        full_scale: count of full scale; None takes the dtype's maximum. A 12-bit camera has 4095.

    Returns:
        (N, C, H, W) float32, 0..1 (above 1 where a count exceeds `full_scale`).

    Raises:
        SchemaError: another dtype or number of dimensions.
    """
    if crops_NCHW.ndim != 4:
        msg = f"crops have shape {crops_NCHW.shape}, expected (N, C, height, width)"
        raise SchemaError(msg)
    maximum = full_scale_of(crops_NCHW.dtype)
    scale = maximum if full_scale is None else float(full_scale)
    if not scale > 0:
        msg = f"full_scale is {full_scale}, expected the positive count of a saturated pixel (4095 for 12 bit)"
        raise ConfigError(msg)
    counts = crops_NCHW.astype(np.float32)  # copies: batches from Arrow are read-only
    return torch.from_numpy(counts).div_(scale)


def to_unit(fraction_NCHW: torch.Tensor, rule: IntensityRule) -> torch.Tensor:
    """Scale fractions linearly so that background lies at 0 and bright cells at 1.

    This is the space of physical light, in which augmentations add noise and mix channels.

    Raises:
        SchemaError: the crops have another number of channels than the rule's constants.
    """
    if rule.name == "reference":
        return fraction_NCHW
    if rule.name == "minmax":
        low = fraction_NCHW.amin(dim=(2, 3), keepdim=True)
        span = fraction_NCHW.amax(dim=(2, 3), keepdim=True) - low
        # A blank channel carries nothing; it becomes 0 and not 0/0.
        return torch.where(span > 0, (fraction_NCHW - low) / span.clamp_min(1e-12), torch.zeros_like(fraction_NCHW))
    if fraction_NCHW.shape[1] != len(rule.low):
        msg = f"crops have {fraction_NCHW.shape[1]} channels, the encoder's intensity constants {len(rule.low)}"
        raise SchemaError(msg)
    low = fraction_NCHW.new_tensor(rule.low).view(1, -1, 1, 1)
    high = fraction_NCHW.new_tensor(rule.high).view(1, -1, 1, 1)
    return (fraction_NCHW - low) / (high - low)


def to_network(unit_NCHW: torch.Tensor, rule: IntensityRule) -> torch.Tensor:
    """Compress scaled light and map it to about -1..1, the network's input range."""
    if rule.name == "constants":
        unit_NCHW = unit_NCHW.clamp(UNIT_FLOOR, UNIT_CEILING)
        if rule.compression > 0:
            k = torch.tensor(rule.compression, dtype=unit_NCHW.dtype, device=unit_NCHW.device)
            unit_NCHW = torch.asinh(unit_NCHW * k) / torch.asinh(k)
    return unit_NCHW * 2 - 1


def scale_for_network(fraction_NCHW: torch.Tensor, rule: IntensityRule) -> torch.Tensor:
    """Fractions of full scale (N, C, H, W) to the network's input, by an encoder's rule."""
    return to_network(to_unit(fraction_NCHW, rule), rule)


def fraction_histogram(
    crops_NCHW: npt.NDArray[Any], num_bins: int = 4096, *, full_scale: float | None = None
) -> npt.NDArray[np.int64]:
    """Count pixels per channel and fraction of full scale.

    Args:
        crops_NCHW: (N, C, H, W) uint8 or uint16.
        num_bins: bins over 0..1; 4096 keep 12 bits.
        full_scale: count of a saturated pixel; None takes the dtype's maximum.

    Returns:
        (C, num_bins) int64; histograms of shards add up to the histogram of the whole.
    """
    maximum = full_scale_of(crops_NCHW.dtype)
    levels = np.arange(int(maximum) + 1)
    bin_of_level = np.minimum((levels / (full_scale or maximum) * num_bins).astype(np.int64), num_bins - 1)
    counts = np.empty((crops_NCHW.shape[1], num_bins), dtype=np.int64)
    for channel in range(crops_NCHW.shape[1]):
        per_level = np.bincount(crops_NCHW[:, channel].reshape(-1), minlength=len(levels))
        counts[channel] = np.bincount(bin_of_level, weights=per_level, minlength=num_bins).astype(np.int64)
    return counts


def constants_from_histogram(
    counts_CB: npt.NDArray[np.int64],
    *,
    low_percentile: float = 1.0,
    high_percentile: float = 99.8,
    compression: float = 0.0,
) -> IntensityRule:
    """Choose per-channel constants from a histogram of the pretraining patients.

    Args:
        counts_CB: (C, bins) from `fraction_histogram`.
        low_percentile: percentile of pixels mapped to 0.
        high_percentile: percentile of pixels mapped to 1.
        compression: see `IntensityRule`.

    Raises:
        SchemaError: no pixels, or a channel whose pixels all have one value.
    """
    low = _percentiles(counts_CB, low_percentile)
    high = _percentiles(counts_CB, high_percentile)
    for channel, (a, b) in enumerate(zip(low, high, strict=True)):
        if not a < b:
            # A sparse marker can be dark up to the high percentile: then its brightest pixels set the scale.
            occupied = np.nonzero(counts_CB[channel])[0]
            high[channel] = (occupied[-1] + 1) / counts_CB.shape[1]
            if len(occupied) < 2:
                msg = (
                    f"channel {channel} of the pretraining cells has one single value ({a:.4f} of full scale): "
                    "all crops are constant there; check the channel map of the cartridges"
                )
                raise SchemaError(msg)
    return IntensityRule("constants", tuple(low), tuple(high), compression)


def _percentiles(counts_CB: npt.NDArray[np.int64], percentile: float) -> list[float]:
    num_bins = counts_CB.shape[1]
    values = []
    for counts in counts_CB:
        total = counts.sum()
        if total == 0:
            msg = "there are no pixels to measure intensities from: the pretraining patients have no cells"
            raise SchemaError(msg)
        position = int(np.searchsorted(np.cumsum(counts), total * percentile / 100.0))
        values.append(round((min(position, num_bins - 1) + 0.5) / num_bins, 6))
    return values


CAMERA_FULL_SCALE: Final = 4095.0
"""Count of a saturated pixel of a 12-bit camera, whose counts cohorts store in uint16."""


def stored_full_scale(dtype: np.dtype[Any], full_scale: float | None) -> float:
    """Full scale of the crops of a cohort: the configured one, else 255 for 8 bit and 4,095 for 16 bit."""
    if full_scale is not None:
        return full_scale
    return 255.0 if full_scale_of(dtype) == 255.0 else CAMERA_FULL_SCALE


def check_counts(crops_NCHW: npt.NDArray[Any], full_scale: float, where: str, key: str) -> None:
    """Refuse counts above full scale: the scale is then wrong, and all vectors would be.

    Args:
        crops_NCHW: (N, C, H, W) counts.
        full_scale: count of a saturated pixel.
        where: the crops' place, for the message.
        key: configuration key that sets full scale, for the message.

    Raises:
        SchemaError: a count lies above it.
    """
    highest = int(crops_NCHW.max()) if crops_NCHW.size else 0
    if highest > full_scale:
        raise SchemaError(
            f"{where} holds counts up to {highest}, above the full scale of {full_scale:g}: "
            f"set {key} to the count of a saturated pixel (65535 for 16-bit cameras)"
        )
