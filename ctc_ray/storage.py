"""Files below one URI, on a local disk or in object storage: every write is atomic, every path relative."""

from __future__ import annotations

import contextlib
import io
import json
import os
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from ctc_ray.errors import ConfigError, CtcRayError, MissingInputError, SchemaError

_TEMPORARY_MARK = ".tmp-"


class StorageError(CtcRayError, OSError):
    """A file cannot be written or read: permissions, a full disk, a lost connection."""


def _resolve(uri: str) -> tuple[fs.FileSystem, str]:
    """Split a URI or a local path into a pyarrow file system and the path in it."""
    if "://" not in uri:
        return fs.LocalFileSystem(), str(Path(uri).expanduser().absolute())
    scheme = urlsplit(uri).scheme
    try:
        filesystem, root = _open_azure(uri) if scheme == "az" else fs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError(
            f"cannot open {without_secrets(uri)!r}: {error}. Give a local path or a URI such as s3://bucket/cohort ({scheme}:// failed)"
        ) from error
    return filesystem, root.rstrip("/")


def _open_azure(uri: str) -> tuple[fs.FileSystem, str]:
    """Open `az://container/path`, which names no account: that and its key come from the environment, as Azure's tools have it.

    Without key and SAS token Azure's default credentials hold (a login, a managed identity).
    """
    account = os.environ.get("AZURE_STORAGE_ACCOUNT") or os.environ.get("AZURE_STORAGE_ACCOUNT_NAME")
    if not account:
        raise ConfigError(
            f"{without_secrets(uri)} names no storage account: set AZURE_STORAGE_ACCOUNT, or write "
            "abfss://container@account.dfs.core.windows.net/path"
        )
    parts = urlsplit(uri)
    key, token = os.environ.get("AZURE_STORAGE_KEY"), os.environ.get("AZURE_STORAGE_SAS_TOKEN")
    return fs.AzureFileSystem(account, account_key=key, sas_token=None if key else token), parts.netloc + parts.path


def without_secrets(uri: str) -> str:
    """The URI without user, password and query values: fit for messages, records and reports."""
    if "://" not in uri:
        return uri
    scheme, rest = uri.split("://", 1)
    address = rest.partition("?")[0]
    netloc, slash, path = address.partition("/")
    if scheme in ("abfs", "abfss"):  # container[:key]@account
        container, at, account = netloc.rpartition("@")
        netloc = f"{container.partition(':')[0]}{at}{account}"
    else:
        netloc = netloc.rpartition("@")[2]
    return f"{scheme}://{netloc}{slash}{path}"


def split_uri(uri: str) -> tuple[str, str]:
    """Split a path or URI into that of its folder and the last name; a query (`?endpoint_override=...`) stays with the folder.

    Args:
        uri: `data/cells.npz`, `s3://bucket/cells.npz?region=eu-central-1`.
    """
    if "://" not in uri:
        path = Path(uri).expanduser().absolute()
        return str(path.parent), path.name
    address, mark, query = uri.partition("?")
    folder, _, name = address.rstrip("/").rpartition("/")
    return f"{folder}{mark}{query}", name


class Store:
    """Files below one URI; picklable, so that Ray workers can write for themselves.

    Paths are relative to the URI and separated by "/". A local write goes to a temporary name in the same folder, is synced
    and renamed; an object is put once. A reader never sees a part of a file.
    """

    def __init__(self, uri: str | Path) -> None:
        self._given = str(uri)
        self.uri = without_secrets(self._given)
        """As messages and reports show it: without credentials and query."""
        self._filesystem, self._root = _resolve(self._given)

    @property
    def address(self) -> str:
        """What opens this store again, from any folder and machine; it may hold credentials, so it is never shown."""
        return self._given if "://" in self._given else self._root

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return (Store, (self.address,))

    def __repr__(self) -> str:
        return f"Store({self.uri!r})"

    @property
    def is_local(self) -> bool:
        """Whether the files lie on a file system that this machine mounts."""
        return isinstance(self._filesystem, fs.LocalFileSystem)

    def full_path(self, path: str = "") -> str:
        """Path inside the file system, for messages and for pyarrow."""
        return f"{self._root}/{path}" if path else self._root

    def describe(self, path: str = "") -> str:
        """How messages name a file: the URI as the user gave it, without credentials and query, and the path."""
        return f"{self.uri.rstrip('/')}/{path}" if path else self.uri

    def local_path(self, path: str = "") -> Path:
        """Path on the local disk.

        Raises:
            ConfigError: the store is not local.
        """
        if not self.is_local:
            raise ConfigError(
                f"{self.uri} is not on a local disk, and this step needs one: copy the folder and give its path"
            )
        return Path(self.full_path(path))

    def exists(self, path: str) -> bool:
        """Whether a file or a folder of that name is there.

        Raises:
            StorageError: the store cannot be asked: no connection, no permission.
        """
        return bool(self._info(path).type != fs.FileType.NotFound)

    def size(self, path: str) -> int | None:
        """Bytes of a file, None where there is no such file; raises as `exists` does."""
        info = self._info(path)
        return int(info.size) if info.type == fs.FileType.File else None

    def _info(self, path: str) -> fs.FileInfo:
        try:
            return self._filesystem.get_file_info(self.full_path(path))
        except OSError as error:
            raise self._unreachable(path, error) from error

    def _unreachable(self, path: str, error: OSError) -> StorageError:
        remedy = "check its permissions" if self.is_local else "check the connection, the endpoint and the credentials"
        return StorageError(f"cannot look at {self.describe(path)}: {error}. Please {remedy}")

    def list_files(self, path: str = "", suffix: str = "", *, recursive: bool = False) -> list[str]:
        """Relative paths of the files below a folder, sorted; temporary files are left out; [] for a missing folder."""
        return [p for p, is_file in self._list(path, recursive=recursive) if is_file and p.endswith(suffix)]

    def list_folders(self, path: str = "") -> list[str]:
        """Names (not paths) of the folders directly below, sorted; [] for a missing folder."""
        return [p.rsplit("/", 1)[-1] for p, is_file in self._list(path, recursive=False) if not is_file]

    def _list(self, path: str, *, recursive: bool) -> list[tuple[str, bool]]:
        selector = fs.FileSelector(self.full_path(path), recursive=recursive, allow_not_found=True)
        start = len(self._root) + 1
        try:
            infos = self._filesystem.get_file_info(selector)
        except OSError as error:
            raise self._unreachable(path, error) from error
        found = [(info.path[start:], info.type == fs.FileType.File) for info in infos]
        return sorted(item for item in found if _TEMPORARY_MARK not in item[0].rsplit("/", 1)[-1])

    def read_bytes(self, path: str) -> bytes:
        """Read one file whole.

        Raises:
            MissingInputError: there is no such file.
            StorageError: it cannot be read.
        """
        with self.open_input(path) as stream:
            return bytes(stream.read())

    def open_input(self, path: str) -> pa.NativeFile:
        """Open a file for random reads; raises as `read_bytes` does."""
        try:
            return self._filesystem.open_input_file(self.full_path(path))
        except FileNotFoundError as error:
            raise MissingInputError(f"{self.describe(path)} does not exist") from error
        except OSError as error:
            raise StorageError(f"cannot read {self.describe(path)}: {error}") from error

    def write_bytes(self, path: str, data: bytes | pa.Buffer) -> int:
        """Write one file atomically, replacing what had the name; returns its bytes.

        Raises:
            StorageError: the file cannot be written; nothing of it is left behind.
        """
        try:
            if self.is_local:
                self._write_local(path, data)
            else:
                with self._filesystem.open_output_stream(self.full_path(path)) as stream:
                    stream.write(data)
        except OSError as error:
            raise StorageError(
                f"cannot write {self.describe(path)}: {error}. Check permissions and free space, then run again"
            ) from error
        return len(data) if isinstance(data, bytes) else data.size

    def _write_local(self, path: str, data: bytes | pa.Buffer) -> None:
        target = Path(self.full_path(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{_TEMPORARY_MARK}{uuid.uuid4().hex[:12]}-{target.name[-80:]}")
        try:
            with temporary.open("wb") as stream:
                stream.write(memoryview(data))
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(target)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise

    def delete(self, path: str) -> None:
        """Delete a file; a missing one is no error."""
        with contextlib.suppress(FileNotFoundError):
            self._filesystem.delete_file(self.full_path(path))

    def delete_folder(self, path: str) -> None:
        """Delete a folder and all below it; a missing one is no error."""
        with contextlib.suppress(FileNotFoundError):
            self._filesystem.delete_dir(self.full_path(path))

    def read_json(self, path: str) -> Any:
        """Read a JSON file.

        Raises:
            MissingInputError: there is no such file.
            SchemaError: it is not JSON.
        """
        try:
            return json.loads(self.read_bytes(path))
        except ValueError as error:
            raise SchemaError(f"{self.describe(path)} is not JSON: {error}") from error

    def write_json(self, path: str, value: Any) -> int:
        """Write a JSON file atomically, keys sorted; returns its bytes."""
        return self.write_bytes(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n")

    def read_table(self, path: str, columns: list[str] | None = None) -> pa.Table:
        """Read one Parquet file.

        Raises:
            MissingInputError: there is no such file.
            SchemaError: it is not Parquet, or a column is missing.
        """
        with self.open_input(path) as stream:
            try:
                return pq.ParquetFile(stream).read(columns=columns)
            except (pa.ArrowInvalid, KeyError, OSError) as error:
                raise SchemaError(f"{self.describe(path)} cannot be read as Parquet: {error}") from error

    def read_schema(self, path: str) -> pa.Schema:
        """Arrow schema of one Parquet file; raises as `read_table` does."""
        with self.open_input(path) as stream:
            try:
                return pq.ParquetFile(stream).schema_arrow
            except (pa.ArrowInvalid, OSError) as error:
                raise SchemaError(f"{self.describe(path)} cannot be read as Parquet: {error}") from error

    def num_rows(self, path: str) -> int:
        """Rows of one Parquet file, from its footer; raises as `read_table` does."""
        with self.open_input(path) as stream:
            try:
                return int(pq.ParquetFile(stream).metadata.num_rows)
            except (pa.ArrowInvalid, OSError) as error:
                raise SchemaError(f"{self.describe(path)} cannot be read as Parquet: {error}") from error

    def write_table(self, path: str, table: pa.Table, *, row_group_size: int = 1000) -> int:
        """Write one Parquet file atomically (zstd level 1, encoded in memory); returns its bytes."""
        return self.write_bytes(path, encode_parquet(table, row_group_size=row_group_size))


def encode_parquet(table: pa.Table, *, row_group_size: int = 1000) -> pa.Buffer:
    """Encode a table as the Parquet bytes that ctc_ray writes: zstd level 1, dictionaries for text columns alone.

    Args:
        table: columns of any type.
        row_group_size: rows a group; 1,000 to 2,000 reads fastest with pixels.
    """
    text = [field.name for field in table.schema if pa.types.is_string(field.type)]
    sink = io.BytesIO()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        compression_level=1,
        use_dictionary=text,
        row_group_size=row_group_size,
        write_statistics=text,
    )
    return pa.py_buffer(sink.getvalue())
