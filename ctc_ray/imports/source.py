"""What a source of single-cell images is: which files, of which kind, and the shape and type of the crops in its arrays."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ctc_ray.config import ImportCropsConfig
from ctc_ray.errors import CartridgeError, ConfigError, MissingInputError, SchemaError
from ctc_ray.records import digest_of
from ctc_ray.storage import Store, split_uri

Kind = Literal["table", "npz", "parquet"]
NPZ, PARQUET = ".npz", ".parquet"
CHANNEL_COUNTS = (3, 4)


@dataclass(frozen=True)
class Source:
    """Files of one kind below one folder.

    Attributes:
        store: of the folder.
        files: paths below it, sorted.
        kind: `table` (of image files), `npz` or `parquet` (of crops).
        name: of the file or folder, for messages and label events.
    """

    store: Store
    files: tuple[str, ...]
    kind: Kind
    name: str


@dataclass(frozen=True)
class CropLayout:
    """How an array or column holds its crops.

    Attributes:
        shape: of one crop, axes as stored.
        dtype: numpy name.
        channels_last: whether the channels are the last axis (else the first).
    """

    shape: tuple[int, int, int]
    dtype: str
    channels_last: bool

    @property
    def channels(self) -> int:
        """Number of channels C of a stored crop."""
        return self.shape[-1 if self.channels_last else 0]

    def channels_first(self, crop: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """View a stored crop as (C, H, W)."""
        return np.moveaxis(crop, -1, 0) if self.channels_last else crop


def open_source(uri: str, section: ImportCropsConfig) -> Source:
    """Find the files of a source.

    Args:
        uri: a CSV, Parquet or npz file, or a folder that holds files of one of these kinds (subfolders are searched too).
        section: names of columns and arrays.

    Raises:
        MissingInputError: there is nothing, or no such file in the folder.
        ConfigError: a folder holds several kinds.
        SchemaError: a Parquet file holds neither crops nor image paths.
    """
    parent, name = split_uri(uri)
    if Store(parent).size(name) is not None:
        store, files = Store(parent), [name]
    else:
        store = Store(uri)
        found = store.list_files(suffix="", recursive=True)
        files = [file for file in found if file.lower().endswith((NPZ, PARQUET, ".csv"))]
        if not files:
            raise MissingInputError(f"{store.describe()} is no file, and no folder with .csv, .parquet or .npz files")
    suffixes = {"." + file.lower().rsplit(".", 1)[-1] if "." in file.rsplit("/", 1)[-1] else "" for file in files}
    if len(suffixes) > 1:
        raise ConfigError(f"{store.describe()} holds {', '.join(sorted(suffixes))} files: import one kind at a time")
    suffix = suffixes.pop()
    kind: Kind = "npz" if suffix == NPZ else "table"  # the reference's tables are CSV without a suffix
    if suffix == PARQUET:
        kind = "parquet" if section.pixels in store.read_schema(files[0]).names else "table"
    return Source(store, tuple(files), kind, name)


def layout_of(source: Source, file: str, section: ImportCropsConfig) -> tuple[CropLayout, int]:
    """Layout of the crops of an npz or Parquet file, and their number N.

    Raises:
        SchemaError: the array or column is missing or cannot hold crops.
        CartridgeError: the file is damaged.
    """
    where = source.store.describe(file)
    crop_shape: tuple[int, ...]
    if source.kind == "npz":
        with source.store.open_input(file) as stream:
            shape, dtype = npz_header(stream, section.pixels, where)[:2]
        if len(shape) != 4:
            raise SchemaError(
                f"{where}: array {section.pixels!r} has shape {shape}, expected (N, C, H, W) or (N, H, W, C)"
            )
        crop_shape, kind, num_rows = shape[1:], str(dtype), shape[0]
    else:
        schema, num_rows = source.store.read_schema(file), source.store.num_rows(file)
        if section.pixels not in schema.names:
            raise SchemaError(f"{where} has no column {section.pixels!r}; it has {', '.join(schema.names)}")
        crop_shape, kind = _column_layout(schema.field(section.pixels), section, where)
    triple = cast("tuple[int, int, int]", tuple(int(side) for side in crop_shape))
    return CropLayout(triple, kind, _channels_last(triple, section, where)), num_rows


def npz_header(stream: Any, array: str, where: str) -> tuple[tuple[int, ...], np.dtype[Any], int, int]:
    """Shape, dtype, bytes of the header, and CRC-32 of one array of an npz file; reads no more than its header.

    Raises:
        SchemaError: there is no such array, or it holds Python objects or is in Fortran order.
        CartridgeError: the file is no npz.
    """
    try:
        with zipfile.ZipFile(stream) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            if array not in names:
                raise SchemaError(f"{where} has no array {array!r}; it has {', '.join(names)}")
            with archive.open(f"{array}.npy") as member:
                shape, fortran, dtype = read_npy_header(member)
                start = member.tell()
            crc = archive.getinfo(f"{array}.npy").CRC
    except (zipfile.BadZipFile, ValueError, EOFError, OSError) as error:
        if isinstance(error, SchemaError):
            raise
        raise CartridgeError(f"{where} cannot be read as npz: {error}") from error
    if dtype.hasobject or (fortran and len(shape) > 1):
        what = "Python objects, which are never loaded" if dtype.hasobject else "Fortran order"
        raise SchemaError(f"{where}: array {array!r} holds {what}: save it as a plain C-ordered array of numbers")
    return shape, dtype, start, crc


def read_npy_header(member: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order and dtype of an npy stream, which then stands at its first value."""
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(member)
    return tuple(shape), bool(fortran), dtype


def content_tag(source: Source, file: str, section: ImportCropsConfig) -> str:
    """Digest that changes with the crops of an npz or Parquet file, without reading them: CRC or footer."""
    with source.store.open_input(file) as stream:
        if source.kind == "npz":
            shape, dtype, _, crc = npz_header(stream, section.pixels, source.store.describe(file))
            return digest_of([list(shape), str(dtype), crc])
        size = stream.size()
        stream.seek(size - 8)
        length = int.from_bytes(stream.read(4), "little")
        stream.seek(size - 8 - length)
        return digest_of(bytes(stream.read(length)))


def _column_layout(field: pa.Field, section: ImportCropsConfig, where: str) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of the crops of a Parquet column: from its type, its metadata, or the settings."""
    kind, metadata = field.type, field.metadata or {}
    told: Mapping[str, Any] = {
        "shape": json.loads(metadata[b"shape"]) if b"shape" in metadata else None,
        "dtype": metadata[b"dtype"].decode() if b"dtype" in metadata else None,
    }
    if isinstance(kind, pa.FixedShapeTensorType):
        told = {"shape": kind.shape, "dtype": str(kind.value_type.to_pandas_dtype()().dtype)}
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        if not (pa.types.is_integer(kind.value_type) or pa.types.is_floating(kind.value_type)):
            raise SchemaError(f"{where}: column {field.name!r} is {kind}; store each crop as one flat list or as bytes")
        told = {**told, "dtype": str(np.dtype(kind.value_type.to_pandas_dtype()))}
    elif not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)):
        raise SchemaError(f"{where}: column {field.name!r} is {kind}, expected bytes, lists of numbers or tensors")
    shape, dtype = section.shape or told["shape"], told["dtype"] or section.dtype
    if shape is None or dtype is None or len(shape) != 3:
        raise SchemaError(
            f"{where}: column {field.name!r} ({kind}) does not tell the shape and number type of a crop: "
            "set import_crops.shape (three numbers) and import_crops.dtype"
        )
    return tuple(shape), str(np.dtype(dtype))


def _channels_last(shape: tuple[int, int, int], section: ImportCropsConfig, where: str) -> bool:
    if section.layout != "auto":
        return section.layout == "channels_last"
    first, last = shape[0] in CHANNEL_COUNTS, shape[-1] in CHANNEL_COUNTS
    if first == last:
        raise SchemaError(
            f"{where}: crops have shape {shape}: set import_crops.layout to channels_first or channels_last"
        )
    return last


def read_npz_column(source: Source, file: str, name: str, num_rows: int) -> npt.NDArray[Any] | None:
    """One value a row from an npz file; None where there is no such array.

    Raises:
        SchemaError: the array has another length, more dimensions, or holds Python objects.
    """
    where = source.store.describe(file)
    with source.store.open_input(file) as stream, zipfile.ZipFile(stream) as archive:
        if f"{name}.npy" not in archive.namelist():
            return None
        try:
            with archive.open(f"{name}.npy") as member:
                values: npt.NDArray[Any] = np.lib.format.read_array(member, allow_pickle=False)
        except ValueError as error:
            raise SchemaError(f"{where}: array {name!r} cannot be read: {error}") from error
    if values.shape != (num_rows,):
        raise SchemaError(f"{where}: array {name!r} has shape {values.shape}, expected one value for {num_rows} crops")
    return values


def npz_names(source: Source, file: str) -> list[str]:
    """Names of the arrays of an npz file.

    Raises:
        CartridgeError: the file is no npz.
    """
    try:
        with source.store.open_input(file) as stream, zipfile.ZipFile(stream) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError) as error:
        raise CartridgeError(f"{source.store.describe(file)} cannot be read as npz: {error}") from error


def parquet_file(stream: Any, where: str) -> pq.ParquetFile:
    """Open Parquet.

    Raises:
        CartridgeError: it is damaged.
    """
    try:
        return pq.ParquetFile(stream)
    except (pa.ArrowInvalid, OSError) as error:
        raise CartridgeError(f"{where} cannot be read as Parquet: {error}") from error
