"""A Google Cloud Storage server on loopback: the emulator of PyPI, and what it leaves out.

Added here, as the real service does it: generations in the headers of a download and as conditions
of writes and deletions (412), key ranges and pages of listings, 416 for a range past the end, no
more than 32 objects joined at once. tensorstore and google-cloud-storage both talk to it.
"""

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from functools import partial
from http.server import ThreadingHTTPServer
from typing import Any
from unittest import mock
from urllib.parse import parse_qs, unquote, urlparse

from gcp_storage_emulator.handlers import buckets, objects
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

from mtp_model.files.objects import _client, _store

BUCKET = "bucket"
_OBJECTS = "/storage/v1/b/"
_PAGE = 100
_MOST_JOINED = 32


def key_of(address: str) -> str:
    """The name of an object of the bucket, of its address."""
    return address.removeprefix(f"gs://{BUCKET}/")


class _Storage(Storage):
    """In memory; the emulator would write all that it knows anew at every change."""

    def _write_config_to_file(self) -> None:
        pass


class GcsServer:
    """What a test may look at and break. `log` holds (method, key) of every request.

    The next write of an object in `lost` is done and answered by 503. What is written to an object
    in `damaged` is stored with its first byte changed, once.
    """

    def __init__(self) -> None:
        self.storage = _Storage(use_memory_fs=True)
        self.lock = threading.RLock()
        self.log: list[tuple[str, str]] = []
        self.lost: set[str] = set()
        self.damaged: set[str] = set()
        buckets.create_bucket(BUCKET, self.storage)

    def keys(self, folder: str = "") -> list[str]:
        """Names of all objects of the bucket whose name begins with `folder`, sorted."""
        with self.lock:
            found = self.storage.objects.get(BUCKET, {})
            return sorted(key for key in found if key.startswith(folder))

    def content(self, key: str) -> bytes:
        """An object's bytes."""
        with self.lock:
            return self.storage.get_file(BUCKET, key)

    def contents(self, folder: str) -> dict[str, bytes]:
        """Bytes of all objects below a folder, by their names in it."""
        prefix = folder.rstrip("/") + "/"
        return {key.removeprefix(prefix): self.content(key) for key in self.keys(prefix)}

    def put(self, key: str, content: bytes) -> None:
        """Write an object, with a new generation."""
        with self.lock:
            resource = objects._make_object_resource("", BUCKET, key, None, str(len(content)))
            self.storage.create_file(BUCKET, key, content, objects._checksums(content, resource))

    def delete(self, key: str) -> None:
        """Delete an object."""
        with self.lock:
            self.storage._hard_delete_file(BUCKET, key)

    def generation(self, key: str) -> str:
        """An object's generation, "0" where there is none."""
        return self.storage.objects.get(BUCKET, {}).get(key, {}).get("generation", "0")


class _Handler(RequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer is one packet
    disable_nagle_algorithm = True

    def __init__(self, gcs: GcsServer, *args: Any):
        self.gcs = gcs
        super().__init__(gcs.storage, *args)

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a client that was killed
            super().handle()

    def do_GET(self) -> None:  # noqa: N802
        key = self._key()
        with self.gcs.lock:
            self.gcs.log.append(("GET", key))
            if not key:
                self._list()
            elif self._is_past_the_end(key):
                self._answer(416, b"Requested range not satisfiable")
            else:
                super().do_GET()

    def do_POST(self) -> None:  # noqa: N802
        key, _, verb = self._key().rpartition("/")
        with self.gcs.lock:
            if verb == "compose":
                self.gcs.log.append(("COMPOSE", key))
                self._compose(key)
            elif "/rewriteTo/" in self._key():
                target = self._key().partition(f"/rewriteTo/b/{BUCKET}/o/")[2]
                self.gcs.log.append(("REWRITE", target))
                self._change(target, super().do_POST)
            else:
                self.gcs.log.append(("POST", self._query("name")))
                self._change(self._query("name"), super().do_POST)

    def do_DELETE(self) -> None:  # noqa: N802
        with self.gcs.lock:
            self.gcs.log.append(("DELETE", self._key()))
            self._change(self._key(), super().do_DELETE)

    def send_response(self, code: int, message: str | None = None) -> None:
        super().send_response(code, message)
        if self.command == "GET" and self._key():
            self.send_header("x-goog-generation", self.gcs.generation(self._key()))

    def _compose(self, key: str) -> None:
        parts = [part["name"] for part in json.loads(self._body())["sourceObjects"]]
        if len(parts) > _MOST_JOINED:
            self._answer(400, b"too many source components")
            return
        missing = [part for part in parts if self.gcs.generation(part) == "0"]
        if missing:
            self._answer(404, b"no such object")
            return
        self.gcs.put(key, b"".join(self.gcs.content(part) for part in parts))
        self._finish_change(key)

    def _finish_change(self, key: str) -> None:
        """Answer for an object that was written."""
        if key in self.gcs.damaged:
            self.gcs.damaged.remove(key)
            whole = self.gcs.content(key)
            self.gcs.put(key, bytes([whole[0] ^ 1]) + whole[1:])
        if key in self.gcs.lost:
            self.gcs.lost.remove(key)
            self._answer(503, b"")
        else:
            self._answer(200, json.dumps(self.gcs.storage.objects[BUCKET][key]).encode())

    def _change(self, key: str, do: Any) -> None:
        needed = self._query("ifGenerationMatch")
        if needed and needed != self.gcs.generation(key):
            self._body()
            self._answer(412, b"conditionNotMet")
        elif self.command == "POST" and self._query("uploadType") == "media":
            self.gcs.put(key, self._body())  # the emulator itself takes no empty object
            self._finish_change(key)
        else:
            do()

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _list(self) -> None:
        token = bytes.fromhex(self._query("pageToken")).decode()
        first = max(self._query("startOffset"), token)
        end = self._query("endOffset") or "\U0010ffff"
        keys = [key for key in self.gcs.keys(self._query("prefix")) if first <= key < end]
        page = {"items": [self.gcs.storage.objects[BUCKET][key] for key in keys[:_PAGE]]}
        # As the service's: without letters that clients would have to escape, which they don't.
        more = {"nextPageToken": keys[_PAGE].encode().hex()} if len(keys) > _PAGE else {}
        self._answer(200, json.dumps(page | more).encode())

    def _is_past_the_end(self, key: str) -> bool:
        wanted = self.headers.get("Range", "").removeprefix("bytes=").partition("-")[0]
        stored = self.gcs.storage.objects.get(BUCKET, {}).get(key)
        return bool(wanted and stored) and int(wanted) >= int(stored["size"])

    def _key(self) -> str:
        return unquote(urlparse(self.path).path.removeprefix(f"{_OBJECTS}{BUCKET}/o").lstrip("/"))

    def _query(self, name: str) -> str:
        return parse_qs(urlparse(self.path).query).get(name, [""])[0]

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # clients that are not accepted at once wait for a second


@contextlib.contextmanager
def gcs_server() -> Iterator[GcsServer]:
    """A server that this process and those that it starts take for Google Cloud Storage."""
    gcs = GcsServer()
    server = _Server(("127.0.0.1", 0), partial(_Handler, gcs))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = {
        "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{server.server_port}",
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
        "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{server.server_port}",
    }
    try:
        with mock.patch.dict(os.environ, address):
            yield gcs
    finally:
        _store.cache_clear()
        _client.cache_clear()
        server.shutdown()
        server.server_close()
