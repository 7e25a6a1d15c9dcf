"""A real S3 server on loopback, whose answers a test can spoil."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "bucket"
KEY, SECRET = "testing-key", "testing-secret"


class _Quiet(WSGIRequestHandler):
    def log(self, *_: Any) -> None:
        """Say nothing."""


class S3Server:
    """An S3 server with one empty bucket.

    Attributes:
        refuse: asked of every request (method, query); True answers 403, and it may wait before it answers.
    """

    def __init__(self) -> None:
        self.refuse: Callable[[str, str], bool] = lambda method, query: False
        self._application = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Quiet)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.host = f"127.0.0.1:{self._server.server_port}"
        self.client.create_bucket(Bucket=BUCKET)

    @property
    def client(self) -> Any:
        """A boto3 client: what other programs see."""
        where = {"endpoint_url": f"http://{self.host}", "region_name": "us-east-1"}
        return boto3.client("s3", aws_access_key_id=KEY, aws_secret_access_key=SECRET, **where)

    def uri(self, path: str, *, credentials: bool = False) -> str:
        """URI of a path in the bucket that names the endpoint itself."""
        who = f"{KEY}:{SECRET}@" if credentials else ""
        return f"s3://{who}{BUCKET}/{path}?endpoint_override={self.host}&scheme=http&region=us-east-1"

    def object_names(self) -> set[str]:
        """Names of all objects, without the empty ones that stand for folders."""
        found = self.client.list_objects_v2(Bucket=BUCKET).get("Contents", [])
        return {item["Key"] for item in found if not item["Key"].endswith("/")}

    def close(self) -> None:
        """End the server."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if self.refuse(environ["REQUEST_METHOD"], environ.get("QUERY_STRING", "")):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("403 Forbidden", [("Content-Type", "application/xml"), ("Connection", "close")])
            return [b"<Error><Code>AccessDenied</Code><Message>spoilt by the test</Message></Error>"]
        answer: Iterable[bytes] = self._application(environ, start_response)
        return answer


@contextmanager
def serving() -> Iterator[S3Server]:
    """Run a server while the block runs."""
    server = S3Server()
    try:
        yield server
    finally:
        server.close()
