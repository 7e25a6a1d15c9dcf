"""Published StarDist models by name: fetched once, verified at every use."""

from __future__ import annotations

import hashlib
import http.client
import io
import os
import urllib.request
import zipfile
from collections.abc import Mapping
from pathlib import Path
from zlib import error as ZlibError  # noqa: N812  # the class is named in lower case

from ctc_ray.errors import WeightsError
from ctc_ray.segment.atomic_file import write_atomic

DOWNLOAD_TIMEOUT_S = 60.0
MAX_ARCHIVE_BYTES = 200_000_000
"""A longer answer is not read to its end; the published archives have 5 to 6 MB."""
RELEASE_URL = "https://github.com/stardist/stardist-models/releases/download/v0.1"
REGISTRY: Mapping[str, str] = {
    "2D_versatile_fluo": "4ad678d0758eed6e55625f1b5ae30771e59adb79f1239e09b9772eac8846c3dd",
    "2D_versatile_he": "f1696ef0631bd7e1c0e5c0d3017e2b4c6a95e284c6aab9c22fc2f08317817b28",
    "2D_paper_dsb2018": "4c11cf68512341d9e8ce3d1278c64ceb8ac400582739f85fcab079a2e82840d2",
    "2D_demo": "a1efaebd7103db6236655bf158b6e21cf5b38d58ec77a509802244a89a260fa4",
}
"""Published 2D models and the sha256 of their archives. Source: stardist 0.9.2 `models/__init__.py`; copied, because
importing that module needs TensorFlow. The parity tests compare it with the package's own."""
MEMBERS = ("config.json", "thresholds.json", "weights_best.h5")
"""What is taken from an archive; nothing else is unpacked, wherever its name points."""


def download(name: str, cache: Path | None = None, *, release_url: str = RELEASE_URL) -> Path:
    """Fetch a published model once and return its folder.

    The archive is kept and its checksum verified at every call, so that a damaged cache mends itself.

    Args:
        name: a key of `REGISTRY`.
        cache: where models are kept; default `$XDG_CACHE_HOME/ctc_ray/stardist` or `~/.cache/ctc_ray/stardist`.
        release_url: folder that holds `python_<name>.zip`, for a mirror.

    Raises:
        WeightsError: the name is unknown, the network does not allow it, or the archive is not the published one.
    """
    if name not in REGISTRY:
        raise WeightsError(f"no published 2D StarDist model is named {name!r}; there are {', '.join(REGISTRY)}")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = (cache or base / "ctc_ray" / "stardist") / name
    kept = folder / f"python_{name}.zip"
    try:
        archive = kept.read_bytes() if kept.is_file() else b""
        if _sha256(archive) != REGISTRY[name]:
            archive = _fetch(f"{release_url}/python_{name}.zip", name)
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(kept, archive)
        _unpack(archive, folder)
    except OSError as error:
        raise WeightsError(
            f"the published model {name!r} cannot be kept in {folder}: {error}. Set XDG_CACHE_HOME to a folder that can "
            "be written"
        ) from error
    return folder


def _fetch(url: str, name: str) -> bytes:
    """The verified archive."""
    try:
        with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT_S) as response:
            archive: bytes = response.read(MAX_ARCHIVE_BYTES)
            announced = response.headers.get("Content-Length")
    except (http.client.HTTPException, OSError, ValueError) as error:  # URLError and time-outs are OSErrors
        raise WeightsError(
            f"the published model {name!r} could not be fetched from {url}: {error}. "
            f"Fetch and unpack it by hand and give the folder instead of the name"
        ) from error
    if len(archive) == MAX_ARCHIVE_BYTES:
        raise WeightsError(f"{url} gave more than {MAX_ARCHIVE_BYTES} bytes; the published model {name!r} has fewer")
    if announced is not None and announced.isdigit() and len(archive) < int(announced):
        raise WeightsError(
            f"the published model {name!r} arrived in part from {url}: {len(archive)} of {announced} bytes; try again"
        )
    found = _sha256(archive)
    if found != REGISTRY[name]:
        raise WeightsError(
            f"{url} gave an archive with sha256 {found}, expected {REGISTRY[name]}; nothing was unpacked"
        )
    return archive


def _unpack(archive: bytes, folder: Path) -> None:
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as members:
            contents = {wanted: members.read(wanted) for wanted in MEMBERS}
    except (KeyError, zipfile.BadZipFile, ZlibError) as error:
        raise WeightsError(f"the archive of {folder.name} does not hold {', '.join(MEMBERS)}: {error}") from error
    for member, content in contents.items():
        target = folder / member
        if not target.is_file() or target.read_bytes() != content:
            write_atomic(target, content)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
