"""Digests of the crops that readers saw, shard by shard, without holding a patient's pixels."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ctc_ray.errors import LabelError
from ctc_ray.labels.events import crop_digest
from ctc_ray.schema import unpack_pixels
from ctc_ray.storage import Store


def read_crops(store: Store, paths: Sequence[str], cell_ids: Collection[str]) -> tuple[list[str], list[np.ndarray]]:
    """Read the crops of some cells.

    Args:
        store: where the shards lie.
        paths: shards of one patient.
        cell_ids: cells wanted; those not there are left out.

    Returns:
        Ids found, in the order of the shards, and their crops (C, 48, 48). Row groups without a wanted cell are not decoded.
    """
    wanted = pa.array(sorted(cell_ids), pa.string())
    names: list[str] = []
    crops: list[np.ndarray] = []
    for path in paths:
        with store.open_input(path) as stream:
            file = pq.ParquetFile(stream)
            for group in range(file.num_row_groups):
                mask = pc.is_in(file.read_row_group(group, columns=["cell_id"])["cell_id"], value_set=wanted)
                if not pc.any(mask).as_py():
                    continue
                table = file.read_row_group(group, columns=["cell_id", "pixels"])
                pixels = unpack_pixels(table["pixels"], table.schema.field("pixels"))
                for index in np.flatnonzero(mask.to_numpy()):
                    names.append(table["cell_id"][int(index)].as_py())
                    crops.append(pixels[index].copy())  # a view would keep the whole row group alive
    return names, crops


def digest_crops(store: Store, paths: Sequence[str], cell_ids: Collection[str]) -> dict[str, str]:
    """cell_id -> `crop_digest` of its pixels.

    Raises:
        LabelError: a cell is in none of the shards.
    """
    names, crops = read_crops(store, paths, cell_ids)
    found = {name: crop_digest(crop) for name, crop in zip(names, crops, strict=True)}
    lost = sorted(set(cell_ids) - set(found))
    if lost:
        raise LabelError(f"{len(lost)} cells, the first {lost[0]}, are not in {', '.join(paths) or 'any shard'}")
    return found
