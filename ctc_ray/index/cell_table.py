"""The cells behind the positions of an index, in an Arrow file that opens memory-mapped and is searched without being read."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from ctc_ray.errors import SchemaError
from ctc_ray.index.build import CELLS_FILE, LOOKUP_FILE
from ctc_ray.storage import Store

Int64 = npt.NDArray[np.int64]
CELLS_SCHEMA = pa.schema(
    [
        ("position", pa.int64()),
        ("cell_id", pa.string()),
        ("patient", pa.string()),
        ("physical_id", pa.string()),
        ("field", pa.int16()),
        ("row", pa.float32()),
        ("col", pa.float32()),
        ("cluster", pa.int16()),
    ]
)
"""`cells.parquet`: which cell stands at which position; `cluster` is null, since an index belongs to no latent map."""
_PLACE = ("field", "row", "col")


class CellTable:
    """Cells by position, positions by cell id.

    Args:
        table: as `lookup_table` makes it.
    """

    def __init__(self, table: pa.Table) -> None:
        self._table = table.combine_chunks()
        self._ids = self._column("cell_id")
        self._order: Int64 = self._array("order")
        self.physical: npt.NDArray[np.int32] = self._array("physical")
        """Number of the physical cell (N,) of each position."""
        self.patient_code: npt.NDArray[np.int32] = self._array("patient_code")
        """Place in `patients` (N,) of each position."""
        metadata = table.schema.metadata or {}
        self.patients: list[str] = metadata[b"patients"].decode().split("\n") if len(self) else []
        self.largest_group = int(metadata[b"largest_group"])
        """Detections of the physical cell that has most."""

    @classmethod
    def open(cls, store: Store, folder: str) -> CellTable:
        """Open the table of an index; one of version 1 is made from `cells.parquet`, which takes longer.

        Raises:
            MissingInputError: there is no table.
            SchemaError: it is damaged.
        """
        path = f"{folder}/{LOOKUP_FILE}"
        if not store.exists(path):
            cells = pl.DataFrame(pl.from_arrow(store.read_table(f"{folder}/{CELLS_FILE}")))
            return cls(lookup_table(cells.sort("position")))
        try:
            source = pa.memory_map(str(store.local_path(path))) if store.is_local else store.open_input(path)
            return cls(pa.ipc.open_file(source).read_all())
        except (pa.ArrowInvalid, KeyError) as error:
            raise SchemaError(
                f"{store.describe(path)} is damaged: run `ctc-ray index` with --force ({error})"
            ) from error

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def positions_of(self, cell_ids: Sequence[str]) -> Int64:
        """Positions (len(cell_ids),), -1 where a cell is not in the index."""
        return np.array([self._position(name) for name in cell_ids], np.int64)

    def at(self, positions: Int64) -> pl.DataFrame:
        """Columns cell_id, patient, field, row, col of some positions, in their order."""
        chosen = pa.array(positions)
        names = np.array(self.patients, object)
        columns = {name: self._column(name).take(chosen) for name in ("cell_id", *_PLACE)}
        frame = pl.DataFrame({name: pl.Series(name, column) for name, column in columns.items()})
        patients = pl.Series("patient", names[self.patient_code[positions]].tolist(), pl.String)
        return frame.with_columns(patients).select("cell_id", "patient", *_PLACE)

    def ids(self) -> pl.Series:
        """All cell ids (N,) by position."""
        return pl.Series("cell_id", self._ids)

    def of_patients(self, patients: Collection[str]) -> npt.NDArray[np.bool_]:
        """Which positions (N,) are of some patients; unknown ones have none."""
        codes = [number for number, name in enumerate(self.patients) if name in set(patients)]
        return np.isin(self.patient_code, codes)

    def _position(self, name: str) -> int:
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            if self._ids[int(self._order[middle])].as_py() < name:
                low = middle + 1
            else:
                high = middle
        found = int(self._order[low]) if low < len(self) else -1
        return found if found >= 0 and self._ids[found].as_py() == name else -1

    def _column(self, name: str) -> pa.Array:
        column = self._table.column(name)
        return column.chunk(0) if column.num_chunks else pa.array([], column.type)

    def _array(self, name: str) -> Any:
        return self._column(name).to_numpy(zero_copy_only=True)


def lookup_table(cells: pl.DataFrame) -> pa.Table:
    """Table of `LOOKUP_FILE` from the cells of an index.

    Args:
        cells: columns of `CELLS_SCHEMA`; row i is position i.

    Returns:
        cell_id, field, row, col, physical (number of the physical cell), patient_code, and order: positions sorted by
        cell_id. Patients and the largest number of detections of one physical cell stand in the metadata.
    """
    patients = sorted(cells["patient"].unique())
    groups = pl.concat_str("patient", pl.lit("/"), pl.coalesce("physical_id", "cell_id"))
    codes = pl.col("patient").replace_strict(patients, list(range(len(patients))), return_dtype=pl.Int32)
    frame = cells.select(
        "cell_id",
        *_PLACE,
        physical=groups.rank("dense").cast(pl.Int32) if cells.height else pl.lit(None, pl.Int32),
        patient_code=codes,
        order=pl.col("cell_id").arg_sort().cast(pl.Int64),
    )
    sizes = np.bincount(frame["physical"].to_numpy()) if cells.height else np.ones(1, np.int64)
    types = [("cell_id", pa.large_string()), ("field", pa.int16()), ("row", pa.float32()), ("col", pa.float32())]
    types += [("physical", pa.int32()), ("patient_code", pa.int32()), ("order", pa.int64())]
    metadata = {"patients": "\n".join(patients), "largest_group": str(int(sizes.max()))}
    return frame.rechunk().to_arrow().cast(pa.schema(types)).replace_schema_metadata(metadata)


def encode_lookup(cells: pl.DataFrame) -> pa.Buffer:
    """Bytes of `LOOKUP_FILE`: one uncompressed record batch, so that columns are used where they lie."""
    table = lookup_table(cells).combine_chunks()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()
