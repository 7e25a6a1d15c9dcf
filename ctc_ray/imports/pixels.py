"""Reading the crops of some rows of a source: image files, npz arrays, Parquet columns.

A reader belongs to one worker and keeps its file open: rows come in rising order, so that compressed arrays are gone through
once and no more than a few crops are held. A row that cannot be read gives its error in place of its crop.
"""

from __future__ import annotations

import contextlib
import io
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ctc_ray.config import ImportCropsConfig
from ctc_ray.errors import CartridgeError, CtcRayError, SchemaError
from ctc_ray.imports.source import CropLayout, Source, layout_of, parquet_file, read_npy_header
from ctc_ray.storage import Store, split_uri

Crop = npt.NDArray[Any]
MAX_SIDE_PX = 4096
"""A single-cell image is smaller; a larger one is a field, or a header that lies."""
_BATCH_ROWS = 500
_GREY_MODES = ("L", "I;16", "I;16B", "I;16L", "I", "F")


class CropReader(Protocol):
    """Gives the crop of each row, (C, H, W) in the source's channel order and number type, or why there is none."""

    def read(self, rows: pl.DataFrame) -> Iterator[Crop | CtcRayError]:
        """Yield one answer a row of `ROW_SCHEMA`, in order."""
        ...


def reader_of(source: Source, section: ImportCropsConfig) -> CropReader:
    """The reader of a source's kind."""
    if source.kind == "table":
        return ImageReader(source, section.image_root)
    return NpzReader(source, section) if source.kind == "npz" else ParquetReader(source, section)


class ImageReader:
    """Image files, one a channel, as PNG, TIFF or whatever Pillow reads as one grey channel."""

    def __init__(self, source: Source, image_root: str | None) -> None:
        self._source = source
        self._root = Store(image_root) if image_root else None
        self._stores: dict[str, Store] = {}

    def read(self, rows: pl.DataFrame) -> Iterator[Crop | CtcRayError]:
        """Yield the stacked channels of each row; see `CropReader`."""
        for row in rows.iter_rows(named=True):
            try:
                yield self._stack(row["file"], row["paths"])
            except CtcRayError as error:
                yield error

    def _stack(self, file: str, paths: list[str]) -> Crop:
        planes = [self._plane(file, path) for path in paths]
        shapes, kinds = {plane.shape for plane in planes}, {str(plane.dtype) for plane in planes}
        if len(shapes) > 1 or len(kinds) > 1:
            raise SchemaError(
                f"the channels differ in size or type: {sorted(shapes)}, {', '.join(sorted(kinds))} ({', '.join(paths)})"
            )
        return np.stack(planes)

    def _plane(self, file: str, path: str) -> Crop:
        store, name = self._locate(file, path)
        data, where = store.read_bytes(name), store.describe(name)
        try:
            with Image.open(io.BytesIO(data)) as image:
                if max(image.size) > MAX_SIDE_PX:
                    raise SchemaError(f"{where} is {image.size[1]} x {image.size[0]} px: that is no single cell")
                if image.mode not in _GREY_MODES:
                    raise SchemaError(f"{where} is an image of mode {image.mode}, expected one grey channel")
                plane = np.asarray(image)
        except SchemaError:
            raise
        except Exception as error:  # decoders of damaged files raise anything; one file must not end the run
            raise CartridgeError(f"{where} cannot be decoded: {type(error).__name__}: {error}") from error
        return plane.astype(plane.dtype.newbyteorder("="), copy=False)

    def _locate(self, file: str, path: str) -> tuple[Store, str]:
        """Store and path below it of an image: absolute, a URI, or relative to the table (or `image_root`)."""
        if "://" in path or path.startswith("/"):
            parent, name = split_uri(path)
            if parent not in self._stores:
                self._stores[parent] = Store(parent)
            return self._stores[parent], name
        if self._root is not None:
            return self._root, path
        folder, _, _ = file.rpartition("/")
        return self._source.store, f"{folder}/{path}" if folder else path


class _FileReader(ABC):
    """Reads the rows of files one after the other; a row or a file that cannot be read costs its own rows alone."""

    unreadable: ClassVar[tuple[type[Exception], ...]]
    """What reading a damaged file raises."""

    def __init__(self, source: Source, section: ImportCropsConfig) -> None:
        self._source, self._section = source, section
        self._file = ""
        self._layout: CropLayout | None = None

    def read(self, rows: pl.DataFrame) -> Iterator[Crop | CtcRayError]:
        """Yield each row's crop; see `CropReader`."""
        for file, index in rows.select("file", "source_row").iter_rows():
            try:
                if file != self._file:
                    self._switch(file)
                yield self._crop(index)
            except CtcRayError as error:
                yield error
            except self.unreadable as error:
                self._file = ""
                yield CartridgeError(f"{self._source.store.describe(file)} cannot be read: {error}")

    @abstractmethod
    def _switch(self, file: str) -> None:
        """Open another file and set `_file` and `_layout`."""

    @abstractmethod
    def _crop(self, index: int) -> Crop:
        """Read one row of the open file."""


class NpzReader(_FileReader):
    """One array (N, C, H, W) or (N, H, W, C) a file; only forward in the compressed stream."""

    unreadable = (OSError, EOFError, zipfile.BadZipFile, ValueError)

    def __init__(self, source: Source, section: ImportCropsConfig) -> None:
        super().__init__(source, section)
        self._open = contextlib.ExitStack()
        self._member: Any = None
        self._start = 0

    def _switch(self, file: str) -> None:
        self._open.close()
        self._layout, _ = layout_of(self._source, file, self._section)
        stream = self._open.enter_context(self._source.store.open_input(file))
        archive = self._open.enter_context(zipfile.ZipFile(stream))
        self._member = self._open.enter_context(archive.open(f"{self._section.pixels}.npy"))
        read_npy_header(self._member)
        self._start, self._file = self._member.tell(), file

    def _crop(self, index: int) -> Crop:
        layout = self._layout
        if layout is None:
            raise SchemaError("no file is open")
        dtype = np.dtype(layout.dtype)
        size = int(np.prod(layout.shape)) * dtype.itemsize
        self._member.seek(self._start + index * size)  # forward it reads and drops, backward it starts again
        data = self._member.read(size)
        if len(data) != size:
            raise CartridgeError(f"{self._source.store.describe(self._file)} ends before row {index + 1}")
        crop = np.frombuffer(data, dtype).reshape(layout.shape)
        return layout.channels_first(crop.astype(dtype.newbyteorder("="), copy=False))


class ParquetReader(_FileReader):
    """One column of crops a file; row groups are streamed, never held whole."""

    unreadable = (pa.ArrowInvalid, OSError)

    def __init__(self, source: Source, section: ImportCropsConfig) -> None:
        super().__init__(source, section)
        self._parquet: pq.ParquetFile | None = None
        self._ends: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._held: pa.Array | None = None
        self._first = 0
        """Row number of the first value held."""

    def _switch(self, file: str) -> None:
        self._layout, _ = layout_of(self._source, file, self._section)
        self._parquet = parquet_file(self._source.store.open_input(file), self._source.store.describe(file))
        metadata = self._parquet.metadata
        counts = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._held, self._first, self._file = None, 0, file

    def _crop(self, index: int) -> Crop:
        layout, parquet = self._layout, self._parquet
        if layout is None or parquet is None:
            raise SchemaError("no file is open")
        group = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[group - 1]) if group else 0
        if self._held is None or index < self._first or first > self._first + len(self._held):
            groups = list(range(group, len(self._ends)))
            self._batches = parquet.iter_batches(_BATCH_ROWS, row_groups=groups, columns=[self._section.pixels])
            self._held, self._first = pa.array([]), first
        while index >= self._first + len(self._held):
            self._first += len(self._held)
            self._held = next(self._batches).column(0)
        return layout.channels_first(_decode(self._held[index - self._first], layout))


def _decode(value: pa.Scalar, layout: CropLayout) -> Crop:
    """One crop of a column of bytes, lists or tensors."""
    dtype, size = np.dtype(layout.dtype), int(np.prod(layout.shape))
    if not value.is_valid:
        raise SchemaError("the crop is null")
    if isinstance(value, pa.ExtensionScalar):
        value = value.value
    if hasattr(value, "as_buffer"):
        data = value.as_buffer()
        if data.size != size * dtype.itemsize:
            raise SchemaError(f"the crop has {data.size} bytes, {layout.shape} {dtype} needs {size * dtype.itemsize}")
        return np.frombuffer(data, dtype).reshape(layout.shape)
    values = value.values
    if len(values) != size or values.null_count:
        raise SchemaError(
            f"the crop has {len(values)} numbers, {values.null_count} of them null; {layout.shape} needs {size}"
        )
    crop: Crop = values.to_numpy(zero_copy_only=False).reshape(layout.shape)
    return crop
