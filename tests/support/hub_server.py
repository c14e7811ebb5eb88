"""A Hub on loopback, for tests: the endpoints of downloads and uploads, with faults on demand.

Two servers, as on the real Hub: one answers for repositories and holds small files, the other is
the storage of large files, reached by redirects to addresses that are signed and that no token may
be sent to.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class Fault:
    """What is wrong with the next answers to a kind of request; an instance serves `times` times.

    status, body: answered instead. drop: no answer at all. keep_bytes: of the body, before the
    connection drops; hang: it stays open, and silent. short: the answer says, in good order, that
    it is shorter. corrupt: one bit is wrong.
    """

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    drop: bool = False
    keep_bytes: int | None = None
    hang: bool = False
    short: bool = False
    corrupt: bool = False
    ignore_range: bool = False
    shift_range: int = 0
    times: int = 1


@dataclass
class Seen:
    """A request and what was sent in answer to it."""

    method: str
    path: str
    headers: dict[str, str]
    status: int = 0
    body_bytes: int = 0

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


@dataclass
class Model:
    """A repository: files by commit, the commit of each branch, who may read it."""

    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    private: bool = False
    gated: bool = False
    listed: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By file, what the list says in place of the truth."""

    def commit(self, files: Files, branch: str = "main") -> str:
        """Make `files` the whole content of a branch."""
        text = repr((sorted(files), [git_blob(content) for content in files.values()]))
        sha = hashlib.sha1(f"{text} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        return sha

    def at(self, revision: str) -> str | None:
        """The commit of a revision."""
        return self.branches.get(revision) or (revision if revision in self.commits else None)


def is_large(file: str) -> bool:
    """Whether a file is kept in large file storage."""
    return file.endswith(".safetensors")


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class HubServer:
    """Both servers while the `with` block lasts. `token` is the one that opens what is closed."""

    def __init__(self, token: str = "hf_valid"):
        self.token = token
        self.models: dict[str, Model] = {}
        self.stored: dict[str, bytes] = {}
        self.seen: list[Seen] = []
        self.signature = 0
        self.over = threading.Event()
        self._faults: list[tuple[re.Pattern[str], Fault]] = []
        self._actions: list[tuple[re.Pattern[str], Callable[[], None]]] = []
        self._lock = threading.Lock()
        self._servers = [self._serve(_Hub), self._serve(_Storage)]
        self.url, self.storage_url = (f"http://127.0.0.1:{s.server_port}" for s in self._servers)

    def __enter__(self) -> "HubServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def add(self, repo_id: str, files: Files, **settings: Any) -> Model:
        """A model whose main branch holds `files`."""
        model = self.models[repo_id] = Model(**settings)
        model.commit(files)
        self.store(files)
        return model

    def store(self, files: Files) -> None:
        """Put the large ones of `files` into storage."""
        self.stored |= {sha256(data): data for name, data in files.items() if is_large(name)}

    def fail(self, request: str, fault: Fault) -> None:
        """Answer the next requests `METHOD /path` that match a regular expression with a fault."""
        self._faults.append((re.compile(request), fault))

    def after(self, request: str, action: Callable[[], None]) -> None:
        """Do something once the answer to the next such request was made."""
        self._actions.append((re.compile(request), action))

    def act_after(self, request: str) -> None:
        """Do what is to be done after a request, once."""
        due = [entry for entry in self._actions if entry[0].search(request)]
        for entry in due:
            self._actions.remove(entry)
            entry[1]()

    def clear_faults(self) -> None:
        """Answer everything in good order again."""
        self._faults.clear()

    def fault_for(self, request: str) -> Fault:
        """The fault for a request, used up; one without faults otherwise."""
        with self._lock:
            for pattern, fault in self._faults:
                if fault.times > 0 and pattern.search(request):
                    fault.times -= 1
                    return fault
        return Fault()

    def requests(self, pattern: str) -> list[Seen]:
        """The requests `METHOD /path` so far that match a regular expression."""
        return [seen for seen in self.seen if re.search(pattern, str(seen))]

    def _serve(self, handler: type["_Handler"]) -> ThreadingHTTPServer:
        bound = type("Handler", (handler,), {"hub": self})
        server = _Server(("127.0.0.1", 0), bound)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        return server


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: clients may hang up."""


class _Handler(BaseHTTPRequestHandler):
    """What both servers share: requests are noted, faults applied, ranges cut."""

    protocol_version = "HTTP/1.1"
    hub: HubServer

    def do_GET(self) -> None:
        self._begin()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Nothing: a test's output is its own."""

    def answer(self, path: str, body: bytes) -> None:
        """Answer one request."""
        raise NotImplementedError

    def _begin(self) -> None:
        parts = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.note = Seen(self.command, unquote(parts.path), headers)
        with self.hub._lock:
            self.hub.seen.append(self.note)
        self.fault = self.hub.fault_for(str(self.note))
        if self.fault.drop:
            self.close_connection = True
        elif self.fault.status or self.fault.body is not None:
            self.send(self.fault.status or 200, self.fault.body or b"", self.fault.headers)
        else:
            self.query = parse_qs(parts.query)
            self.answer(parts.path, body)

    def send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        """Send an answer, with whatever is wrong with it."""
        if self.fault.corrupt:
            body = bytes([body[0] ^ 1]) + body[1:]
        if self.fault.short:
            body = body[: len(body) // 2]
        self.note.status = status
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        if self.fault.keep_bytes is not None:
            body = body[: self.fault.keep_bytes]
            self.close_connection = True
        self.end_headers()
        if self.command != "HEAD":
            self.note.body_bytes = len(body)
            self.wfile.write(body)
        if self.fault.hang:
            self.wfile.flush()
            self.hub.over.wait(60)

    def send_json(self, value: Any, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send_file(self, content: bytes, headers: dict[str, str]) -> None:
        """A file, or the range of it that was asked for."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked or self.fault.ignore_range:
            return self.send(200, content, headers)
        ends = (asked[1], asked[2] or len(content) - 1)
        begin, last = (int(end) + self.fault.shift_range for end in ends)
        place = f"bytes {begin}-{last}/{len(content)}"
        return self.send(206, content[begin : last + 1], {**headers, "Content-Range": place})


class _Hub(_Handler):
    """Repositories: information, small files, redirects to storage, uploads."""

    def answer(self, path: str, body: bytes) -> None:
        routes = [
            (r"/api/repos/create", self._create),
            (r"/api/validate-yaml", lambda _body: self.send_json({"errors": [], "warnings": []})),
            (r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", self._info),
            (r"/api/(datasets/[^/]+/[^/]+)(?:/revision/([^/]+))?", self._info),
            (r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", self._preupload),
            (r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", self._commit),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._lfs_batch),
            (r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
            (r"/verify", lambda _body: self.send_json({})),
        ]
        for pattern, route in routes:
            if match := re.fullmatch(pattern, path):
                groups = [group and unquote(group) for group in match.groups()]
                return route(*groups, *([body] if self.command == "POST" else []))
        return self._refuse(404, "NotFound")

    def _refuse(self, status: int, code: str) -> None:
        self.send(status, b'{"error": "no"}', {"X-Error-Code": code})

    @property
    def _authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _readable(self, repo_id: str, revision: str | None) -> tuple[Model, str] | None:
        """The model and its commit; None when this was refused."""
        model = self.hub.models.get(repo_id)
        if model is None or (model.private and not self._authorized):
            return self._refuse(404 if self._authorized else 401, "RepoNotFound")
        commit = model.at(revision or "main")
        if commit is None:
            return self._refuse(404, "RevisionNotFound")
        return model, commit

    def _info(self, repo_id: str, revision: str | None) -> None:
        if found := self._readable(repo_id, revision):
            model, commit = found
            siblings = [
                _sibling(name, content) | model.listed.get(name, {})
                for name, content in model.commits[commit].items()
            ]
            self.send_json({"id": repo_id, "sha": commit, "siblings": siblings})

    def _resolve(self, repo_id: str, revision: str, file: str) -> None:
        found = self._readable(repo_id, revision)
        if not found:
            return None
        model, commit = found
        if model.gated and not self._authorized:
            return self._refuse(403, "GatedRepo")
        content = model.commits[commit].get(file)
        if content is None:
            return self._refuse(404, "EntryNotFound")
        headers = {"X-Repo-Commit": commit}
        if not is_large(file):
            return self.send_file(content, {**headers, "ETag": f'"{git_blob(content)}"'})
        place = f"{self.hub.storage_url}/{sha256(content)}?signature={self.hub.signature}"
        linked = {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{sha256(content)}"'}
        return self.send(302, b"", {**headers, **linked, "Location": place})

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo_id = f"{asked['organization']}/{asked['name']}"
        if not self._authorized:
            return self._refuse(403, "Forbidden")
        url = f"{self.hub.url}/{repo_id}"
        if repo_id in self.hub.models:
            return self.send_json({"url": url}, 409)
        private = asked.get("visibility") == "private"
        self.hub.add(repo_id, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        return self.send_json({"url": url})

    def _preupload(self, repo_id: str, revision: str, body: bytes) -> None:
        if found := self._readable(repo_id, revision):
            model, commit = found
            answers = []
            for file in json.loads(body)["files"]:
                path, there = file["path"], model.commits[commit].get(file["path"])
                digest = sha256 if is_large(path) else git_blob
                answers.append(
                    {
                        "path": path,
                        "uploadMode": "lfs" if is_large(path) else "regular",
                        "shouldIgnore": False,
                        "oid": None if there is None else digest(there),
                    }
                )
            self.send_json({"files": answers})

    def _lfs_batch(self, _repo_id: str, body: bytes) -> None:
        objects = []
        for wanted in json.loads(body)["objects"]:
            there = wanted["oid"] in self.hub.stored
            upload = {"href": f"{self.hub.storage_url}/{wanted['oid']}?signature=0"}
            actions = {"upload": upload, "verify": {"href": f"{self.hub.url}/verify"}}
            objects.append({**wanted, **({} if there else {"actions": actions})})
        self.send_json({"transfer": "basic", "objects": objects})

    def _commit(self, repo_id: str, revision: str, body: bytes) -> None:
        if not self._authorized:
            return self._refuse(403, "Forbidden")
        model = self.hub.models[repo_id]
        files = dict(model.commits[model.branches[revision]])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                model.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = self.hub.stored[value["oid"]]
        commit = model.commit(files, revision)
        self.hub.act_after(str(self.note))
        url = f"{self.hub.url}/{repo_id}/commit/{commit}"
        return self.send_json({"commitUrl": url, "commitOid": commit, "success": True})


class _Storage(_Handler):
    """Large files by sha256, at addresses that expire."""

    def answer(self, path: str, body: bytes) -> None:
        digest = path[1:]
        if "Authorization" in self.headers:
            return self.send(400, b"a token was sent to storage")
        if self.command == "PUT":
            self.hub.stored[sha256(body)] = body
            return self.send(200 if sha256(body) == digest else 400)
        if self.query["signature"] != [str(self.hub.signature)]:
            return self.send(403, b"expired")
        return self.send_file(self.hub.stored[digest], {"ETag": f'"{digest}"'})


def _sibling(name: str, content: bytes) -> dict[str, Any]:
    sibling = {"rfilename": name, "size": len(content), "blobId": git_blob(content)}
    if is_large(name):
        sibling["lfs"] = {"size": len(content), "sha256": sha256(content), "pointerSize": 134}
    return sibling
