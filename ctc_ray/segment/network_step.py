"""Second step of a field: from its pixels to StarDist's candidates."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import torch

from ctc_ray.schema import Channel
from ctc_ray.segment.model import StarDist
from ctc_ray.segment.plan import Settings
from ctc_ray.segment.read_step import IMAGE_SCHEMA, pixels_of

_BYTES = pa.large_binary()
CANDIDATE_SCHEMA = pa.schema(
    [
        *IMAGE_SCHEMA,
        ("prob", _BYTES),
        ("dist", _BYTES),
        ("points", _BYTES),
        ("n_rays", pa.int32()),
        ("dropped", pa.int32()),
        ("network_node", pa.string()),
        ("network_pid", pa.int64()),
        ("network_start", pa.float64()),
        ("network_end", pa.float64()),
    ]
)
"""Arrays of `Candidates` as bytes: prob float32 (M,), dist float32 (M, n_rays), points int64 (M, 2). `network_*`: who ran the
network on the field, and from when to when, in seconds since 1970 by that machine's clock."""


class CandidateFinder:
    """Second step, the network: (task, image) -> (task, image, candidates)."""

    def __init__(
        self,
        settings: Settings,
        num_threads: int,
        identify: Callable[[], tuple[str, int]] | None = None,
        device: str | None = None,
    ) -> None:
        """Load the weights once.

        Args:
            settings: of the stage.
            num_threads: of this process.
            identify: gives node and process id of the worker.
            device: where the network runs; None for the GPU where there is one.
        """
        self._node, self._pid = identify() if identify else ("local", os.getpid())
        torch.set_num_threads(num_threads)
        self._settings = settings
        self._model = StarDist.load(
            settings.weights,
            device=device,
            precision=settings.precision,
            percentiles=settings.percentiles,
            skip_background=settings.skip_background,
        )

    def __call__(self, fields: pa.Table) -> pa.Table:
        """Add candidates to a table of `IMAGE_SCHEMA`."""
        return pa.Table.from_pylist([self._find(row) for row in fields.to_pylist()], schema=CANDIDATE_SCHEMA)

    def _find(self, row: dict[str, Any]) -> dict[str, Any]:
        if row["image"] is None:
            return row
        started, began = time.monotonic(), time.time()
        found = self._model.candidates(
            pixels_of(row)[Channel.CK],
            prob_thresh=self._settings.prob_thresh,
            max_candidates=self._settings.max_candidates,
        )
        row |= {"prob": found.prob.tobytes(), "dist": found.dist.tobytes(), "points": found.points.tobytes()}
        row |= {"n_rays": found.dist.shape[1], "network_node": self._node, "network_pid": self._pid}
        row |= {"network_start": began, "network_end": time.time()}
        return row | {"dropped": found.num_dropped, "seconds": row["seconds"] + time.monotonic() - started}
