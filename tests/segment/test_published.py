"""Published models: fetched once from a server, verified, refused where anything is wrong."""

from __future__ import annotations

import hashlib
import io
import shutil
import socket
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from ctc_ray.errors import WeightsError
from ctc_ray.segment import published
from ctc_ray.segment.network import NetworkConfig, StarDistNetwork
from ctc_ray.segment.published import download
from ctc_ray.segment.weights import Thresholds, load_weights, save_keras_folder

NAME = "2D_demo"
SMALL = NetworkConfig(unet_n_depth=1, unet_n_filter_base=2, net_conv_after_unet=3, n_rays=4)


class Server:
    """A release page on this machine that gives one answer, whole or cut, and counts who asks."""

    def __init__(self) -> None:
        self.answer = b""
        self.announced: int | None = None
        self.status = 200
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                self.send_response(outer.status)
                self.send_header("Content-Length", str(outer.announced or len(outer.answer)))
                self.end_headers()
                self.wfile.write(outer.answer)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v0.1"


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def model_files(tmp_path: Path) -> dict[str, bytes]:
    torch.manual_seed(0)
    save_keras_folder(StarDistNetwork(SMALL), Thresholds(0.4, 0.3), tmp_path / "made")
    files = {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
    shutil.rmtree(tmp_path / "made")
    return files


@pytest.fixture
def publish(server: Server, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, bytes]], None]:
    """Let the server offer an archive whose checksum is the registered one."""

    def offer(files: dict[str, bytes]) -> None:
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        server.answer = content.getvalue()
        monkeypatch.setattr(published, "REGISTRY", {NAME: hashlib.sha256(server.answer).hexdigest()})

    return offer


def test_published_model_is_fetched_once_and_read(
    tmp_path: Path, server: Server, publish: Callable[..., None], model_files: dict[str, bytes]
) -> None:
    publish(model_files)
    folder = download(NAME, tmp_path, release_url=server.url)
    assert download(NAME, tmp_path, release_url=server.url) == folder
    assert server.asked == [f"/v0.1/python_{NAME}.zip"]
    loaded = load_weights(folder)
    assert loaded.network.config == SMALL
    assert loaded.thresholds == Thresholds(0.4, 0.3)


def test_kept_model_needs_no_network(
    tmp_path: Path, server: Server, publish: Callable[..., None], model_files: dict[str, bytes]
) -> None:
    publish(model_files)
    folder = download(NAME, tmp_path, release_url=server.url)
    assert download(NAME, tmp_path, release_url="http://127.0.0.1:9/nothing") == folder


@pytest.mark.parametrize("damaged", ["weights_best.h5", f"python_{NAME}.zip"])
def test_damaged_cache_mends_itself(
    tmp_path: Path, server: Server, publish: Callable[..., None], model_files: dict[str, bytes], damaged: str
) -> None:
    publish(model_files)
    folder = download(NAME, tmp_path, release_url=server.url)
    (folder / damaged).write_bytes(b"damaged")
    download(NAME, tmp_path, release_url=server.url)
    assert (folder / "weights_best.h5").read_bytes() == model_files["weights_best.h5"]


def test_dead_port_says_what_to_do(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(WeightsError, match="by hand"):
        download(NAME, tmp_path, release_url=f"http://127.0.0.1:{port}")
    assert not (tmp_path / NAME).exists()


def test_missing_page_says_so(tmp_path: Path, server: Server) -> None:
    server.status = 404
    with pytest.raises(WeightsError, match="404"):
        download(NAME, tmp_path, release_url=server.url)


def test_silent_server_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "DOWNLOAD_TIMEOUT_S", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(WeightsError, match="timed out"):
            download(NAME, tmp_path, release_url=f"http://127.0.0.1:{silent.getsockname()[1]}")


def test_truncated_download_is_refused(
    tmp_path: Path, server: Server, publish: Callable[..., None], model_files: dict[str, bytes]
) -> None:
    publish(model_files)
    server.announced, server.answer = len(server.answer), server.answer[:-50]
    with pytest.raises(WeightsError, match=r"could not be fetched|in part"):
        download(NAME, tmp_path, release_url=server.url)
    assert not (tmp_path / NAME).exists()


def test_changed_archive_is_refused(
    tmp_path: Path, server: Server, publish: Callable[..., None], model_files: dict[str, bytes]
) -> None:
    publish(model_files)
    server.answer = server.answer[:-1] + b"x"
    with pytest.raises(WeightsError, match="sha256"):
        download(NAME, tmp_path, release_url=server.url)
    assert not (tmp_path / NAME).exists()


def test_endless_answer_is_not_read_to_its_end(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answer = b"0" * 5000
    monkeypatch.setattr(published, "MAX_ARCHIVE_BYTES", 1000)
    with pytest.raises(WeightsError, match="more than 1000 bytes"):
        download(NAME, tmp_path, release_url=server.url)


def test_archive_unpacks_nothing_but_the_weight_files(
    tmp_path: Path, server: Server, publish: Callable[..., None], model_files: dict[str, bytes]
) -> None:
    strangers = dict.fromkeys(("../escaped", "../../escaped", str(tmp_path / "absolute"), "a/b/stranger"), b"x")
    publish(strangers | model_files)
    folder = download(NAME, tmp_path / "deep" / "cache", release_url=server.url)
    written = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {*model_files, f"python_{NAME}.zip"}
    assert folder == tmp_path / "deep" / "cache" / NAME


@pytest.mark.parametrize("lost", published.MEMBERS)
def test_archive_without_a_file_is_refused(
    tmp_path: Path, server: Server, publish: Callable[..., None], model_files: dict[str, bytes], lost: str
) -> None:
    publish({name: data for name, data in model_files.items() if name != lost})
    with pytest.raises(WeightsError, match=lost):
        download(NAME, tmp_path, release_url=server.url)


def test_answer_that_is_no_archive_is_refused(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answer = b"<html>log in first</html>"
    monkeypatch.setattr(published, "REGISTRY", {NAME: hashlib.sha256(server.answer).hexdigest()})
    with pytest.raises(WeightsError, match="does not hold"):
        download(NAME, tmp_path, release_url=server.url)


def test_cache_that_cannot_be_written_is_named(
    tmp_path: Path, server: Server, publish: Callable[..., None], model_files: dict[str, bytes]
) -> None:
    publish(model_files)
    (tmp_path / NAME).write_text("a file where the folder belongs")
    with pytest.raises(WeightsError, match="XDG_CACHE_HOME"):
        download(NAME, tmp_path, release_url=server.url)


def test_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="2D_versatile_he"):
        download("2D_versatile_hE", tmp_path)


def test_processes_that_fetch_at_once_all_get_the_model(
    tmp_path: Path, server: Server, publish: Callable[..., None], model_files: dict[str, bytes]
) -> None:
    publish(model_files)
    fetch = partial(download, NAME, tmp_path, release_url=server.url)
    threads = [threading.Thread(target=fetch) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert load_weights(tmp_path / NAME).network.config == SMALL
    assert sorted(path.name for path in (tmp_path / NAME).iterdir()) == sorted({*model_files, f"python_{NAME}.zip"})
