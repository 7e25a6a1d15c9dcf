"""A cohort on S3, against a real server; Google and Azure as far as their addresses go."""

from __future__ import annotations

import importlib.util
import io
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from pyarrow import fs

from ctc_ray.cohort import Cohort
from ctc_ray.config import load_config
from ctc_ray.errors import ConfigError, MissingInputError
from ctc_ray.progress import Progress
from ctc_ray.schema import DUPLICATES_SCHEMA
from ctc_ray.storage import StorageError, Store, split_uri, without_secrets

LARGE = bytes(12 * 2**20)
"""Two parts of an upload."""


def _beside(name: str) -> ModuleType:
    """A module that stands beside this one."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    pytest.importorskip("moto.server", reason="the S3 server comes with the test extra")
    os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
    with _beside("s3_server").serving() as running:
        yield running


@pytest.fixture
def s3(server: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The server, found by the environment as AWS's own tools find one."""
    names = _beside("s3_server")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", names.KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", names.SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{server.host}")
    server.refuse = lambda method, query: False
    for key in server.object_names():
        server.client.delete_object(Bucket=names.BUCKET, Key=key)
    return server


def test_s3_store_behaves_as_a_local_one(s3: Any, tmp_path: Path) -> None:
    seen = []
    for store in (Store("s3://bucket/cohort"), Store(tmp_path / "cohort")):
        store.write_bytes("a/b.bin", b"one")
        store.write_bytes("a/b.bin", b"two and more")
        for name in ("007", "12", "Müller 3"):
            store.write_bytes(f"cells/{name}/part-000.parquet", b"x")
        store.write_json("a/c.json", {"k": [1]})
        store.delete("a/none")
        store.delete_folder("a/nothing")
        store.delete_folder("cells/12")
        with pytest.raises(MissingInputError, match="absent"):
            store.read_bytes("absent")
        listed = [store.list_files(recursive=True), store.list_folders("cells"), store.list_files("nowhere")]
        seen.append(
            (listed, store.read_bytes("a/b.bin"), store.size("a/b.bin"), store.size("a"), store.exists("cells/12"))
        )
    assert seen[0] == seen[1]
    assert seen[0][0][0] == ["a/b.bin", "a/c.json", "cells/007/part-000.parquet", "cells/Müller 3/part-000.parquet"]
    assert "cohort/a/b.bin" in s3.object_names()


def test_s3_endpoint_comes_from_either_variable_or_the_uri(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Store("s3://bucket/here").write_bytes("x", b"1")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    assert Store(s3.uri("here")).read_bytes("x") == b"1"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://{s3.host}")
    assert Store("s3://bucket/here").read_bytes("x") == b"1"


def test_s3_secrets_of_a_uri_are_never_shown_and_travel_to_workers(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    store = Store(s3.uri("there", credentials=True))
    store.write_bytes("a", b"1")
    assert pickle.loads(pickle.dumps(store)).read_bytes("a") == b"1"
    assert store.describe("a/b") == "s3://bucket/there/a/b"
    assert store.uri == "s3://bucket/there"
    assert "secret" not in repr(store)


def test_s3_refused_part_leaves_the_former_object_and_no_half_one(s3: Any) -> None:
    store = Store("s3://bucket/cohort")
    store.write_bytes("old.bin", b"old")
    s3.refuse = lambda method, query: method == "PUT" and "partNumber=2" in query
    for name in ("old.bin", "new.bin"):
        with pytest.raises(StorageError, match=rf"cannot write s3://bucket/cohort/{name}"):
            store.write_bytes(name, LARGE)
    s3.refuse = lambda method, query: False
    assert store.read_bytes("old.bin") == b"old"
    assert store.list_files() == ["old.bin"]
    store.write_bytes("new.bin", LARGE)
    assert store.size("new.bin") == len(LARGE)


def test_s3_killed_upload_leaves_the_former_object_and_no_half_one(s3: Any) -> None:
    store = Store("s3://bucket/cohort")
    store.write_bytes("old.bin", b"old")
    reached, release = threading.Event(), threading.Event()

    def stall(method: str, query: str) -> bool:
        if method == "PUT" and "partNumber=2" in query:
            reached.set()
            return release.wait(60)
        return False

    s3.refuse = stall
    script = "from ctc_ray.storage import Store; Store('s3://bucket/cohort').write_bytes('{}', bytes(12 * 2**20))"
    for name in ("old.bin", "new.bin"):
        reached.clear()
        process = subprocess.Popen([sys.executable, "-c", script.format(name)])
        assert reached.wait(120)
        process.send_signal(signal.SIGKILL)
        process.wait()
    release.set()
    time.sleep(0.2)
    s3.refuse = lambda method, query: False
    assert store.read_bytes("old.bin") == b"old"
    assert store.list_files() == ["old.bin"]


def test_s3_without_its_bucket_or_permission_is_one_clear_error(s3: Any) -> None:
    with pytest.raises(StorageError, match=r"cannot write s3://nobucket/cohort/a.*bucket does not exist"):
        Store("s3://nobucket/cohort").write_bytes("a", b"1")
    s3.refuse = lambda method, query: True
    with pytest.raises(StorageError, match=r"cannot look at s3://bucket/cohort.*credentials"):
        Store("s3://bucket/cohort").list_files()
    with pytest.raises(StorageError, match=r"cannot look at s3://bucket/cohort/patients.parquet"):
        Cohort.open("s3://bucket/cohort")


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_crops_to_import_are_read_from_s3(s3: Any, suffix: str) -> None:
    from ctc_ray.imports.pixels import reader_of
    from ctc_ray.imports.rows import read_rows
    from ctc_ray.imports.source import open_source
    from ctc_ray.schema import pack_pixels, pixels_field

    crops = np.random.default_rng(0).integers(0, 256, (5, 3, 48, 48), dtype=np.uint8)
    if suffix == "npz":
        buffer = io.BytesIO()
        np.savez_compressed(buffer, pixels=crops)
        Store("s3://bucket/source").write_bytes("P1.npz", buffer.getvalue())
    else:
        Store("s3://bucket/source").write_table(
            "P1.parquet", pa.table([pack_pixels(crops)], pa.schema([pixels_field()]))
        )
    section = load_config().import_crops
    for uri in (f"s3://bucket/source/P1.{suffix}", s3.uri(f"source/P1.{suffix}"), "s3://bucket/source"):
        source = open_source(uri, section)
        rows = read_rows(source, section).frame
        assert rows["patient"].to_list() == ["P1"] * 5
        assert np.array_equal(np.stack(list(reader_of(source, section).read(rows[1:4]))), crops[1:4])


def test_addresses_of_google_and_azure_open_their_file_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AZURE_STORAGE_ACCOUNT", "AZURE_STORAGE_ACCOUNT_NAME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="AZURE_STORAGE_ACCOUNT"):
        Store("az://box/cohort")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "lab")
    monkeypatch.setenv("AZURE_STORAGE_KEY", "c2VjcmV0")
    cases = {
        "gs://anonymous@box/cohort": ("GcsFileSystem", "gs://box/cohort"),
        "az://box/cohort": ("AzureFileSystem", "az://box/cohort"),
        "abfss://box:c2VjcmV0@lab.dfs.core.windows.net/cohort/": (
            "AzureFileSystem",
            "abfss://box@lab.dfs.core.windows.net/cohort/",
        ),
    }
    for uri, (kind, shown) in cases.items():
        store = Store(uri)
        assert type(store._filesystem) is getattr(fs, kind)
        assert store.full_path("cells/007") == "box/cohort/cells/007"
        assert store.uri == shown
        assert store.describe("cells") == f"{shown.rstrip('/')}/cells"
        assert not store.is_local


def test_split_uri_keeps_the_query_with_the_folder() -> None:
    assert split_uri("s3://b/k/cells.npz?region=x") == ("s3://b/k?region=x", "cells.npz")
    assert split_uri("/data/cells.npz") == ("/data", "cells.npz")
    assert without_secrets("/data/a?b@c") == "/data/a?b@c"


@pytest.mark.ray
@pytest.mark.slow
def test_cohort_on_s3_is_embedded_and_indexed(ray_cluster: None, s3: Any) -> None:
    from ctc_ray.embed.stage import run_embed
    from ctc_ray.index.search import similar
    from ctc_ray.index.stage import run_index
    from ctc_ray.phantom import draw_crops

    cohort = Cohort.open(s3.uri("cohort", credentials=True), create=True)
    cohort.add_patients({"007": "a", "Müller 3": "b"})
    for seed, patient in enumerate(cohort.patient_ids()):
        _beside("cells_cohort").add_patient(cohort, patient, draw_crops(10, seed=seed)[0], shards=2)
        own = pl.from_arrow(cohort.read_columns(f"cells/{patient}", ["cell_id"]))
        own = pl.DataFrame(own).with_columns(physical_id="cell_id")
        cohort.store.write_table(cohort.duplicates_path(patient), own.to_arrow().cast(DUPLICATES_SCHEMA))
    config = load_config(None, ["embed.encoder=default", "embed.unit_cells=4", "index.encoder=default"])
    first = run_embed(config, cohort, progress=Progress(quiet=True))
    assert (first.units_computed, first.units_reused, first.counts["cells"]) == (8, 0, 20)
    again = run_embed(config, cohort, progress=Progress(quiet=True))
    assert (again.units_computed, again.units_reused) == (0, 8)
    assert not any("_parts" in key for key in s3.object_names())
    vectors = pl.DataFrame(pl.from_arrow(cohort.read_columns("embeddings/default/Müller 3", ["cell_id", "embedding"])))
    assert np.isfinite(np.stack(vectors["embedding"].to_numpy())).all()
    run_index(config, cohort)
    found = similar(config, cohort, [vectors["cell_id"][0]], k=3)
    assert found.height == 3
    assert s3.client.list_multipart_uploads(Bucket="bucket").get("Uploads", []) == []
