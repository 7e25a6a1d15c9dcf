"""When each pool worked, and for how long both did at once. Pure: no Ray, no files."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Intervals = npt.NDArray[np.float64]
"""(N, 2) start and end, seconds."""

STATISTICS_SCHEMA = pa.schema(
    [
        ("patient", pa.string()),
        ("field", pa.int32()),
        ("cells", pa.int32()),
        ("network_node", pa.string()),
        ("network_pid", pa.int64()),
        ("network_start", pa.float64()),
        ("network_end", pa.float64()),
        ("embed_node", pa.string()),
        ("embed_pid", pa.int64()),
        ("embed_start", pa.float64()),
        ("embed_end", pa.float64()),
    ]
)
"""One row a field: who ran the network and who embedded, from when to when (seconds since 1970, by the worker's clock). Fields that
are embedded together share the times of that."""


def statistics_path(patient: str) -> str:
    """Where the times of a patient's fields lie, relative to the cohort."""
    return f"statistics/ingest/{patient}.parquet"


def merged(intervals: Intervals) -> Intervals:
    """Union of intervals (N, 2) as disjoint ones (M, 2), sorted; touching ones become one."""
    ordered = intervals[np.argsort(intervals[:, 0], kind="stable")]
    found: list[list[float]] = []
    for start, end in ordered.tolist():
        if found and start <= found[-1][1]:
            found[-1][1] = max(found[-1][1], end)
        else:
            found.append([start, end])
    return np.array(found, np.float64).reshape(-1, 2)


def covered_seconds(intervals: Intervals) -> float:
    """Seconds that lie in at least one of the intervals (N, 2)."""
    union = merged(intervals)
    return float((union[:, 1] - union[:, 0]).sum())


def shared_seconds(first: Intervals, second: Intervals) -> float:
    """Seconds that lie in an interval of both kinds: of `first` (N, 2) and of `second` (M, 2)."""
    both = np.concatenate([first, second]).reshape(-1, 2)
    return covered_seconds(first) + covered_seconds(second) - covered_seconds(both)


@dataclass(frozen=True)
class Busy:
    """How long the pools of a run worked, in seconds.

    Attributes:
        network: in which at least one StarDist actor computed.
        embedding: in which at least one embedding actor did.
        both: in which both did.
        either: in which one of them did, or both.
    """

    network: float
    embedding: float
    both: float
    either: float

    def sentence(self) -> str:
        """For the terminal."""
        share = self.both / self.either if self.either else 0.0
        return (
            f"StarDist busy for {self.network:.1f} s, embedding for {self.embedding:.1f} s, both at once for {self.both:.1f} s "
            f"({share:.0%} of the {self.either:.1f} s in which either was)"
        )


class BusyTimes:
    """Collects the times of a run's fields; 32 bytes a field."""

    def __init__(self) -> None:
        self._network, self._embedding = array("d"), array("d")

    def add(self, row: Mapping[str, Any]) -> None:
        """Note one field's row of `STATISTICS_SCHEMA`; null times stand for steps that did not run."""
        for times, name in ((self._network, "network"), (self._embedding, "embed")):
            if row[f"{name}_start"] is not None:
                times.extend((row[f"{name}_start"], row[f"{name}_end"]))

    def busy(self) -> Busy:
        """Sum up."""
        network, embedding = (np.array(times, np.float64).reshape(-1, 2) for times in (self._network, self._embedding))
        both = shared_seconds(network, embedding)
        alone = covered_seconds(network), covered_seconds(embedding)
        return Busy(*alone, both=both, either=sum(alone) - both)


def busy_of(rows: Iterable[Mapping[str, Any]]) -> Busy:
    """Busy times from rows of `STATISTICS_SCHEMA`."""
    times = BusyTimes()
    for row in rows:
        times.add(row)
    return times.busy()
