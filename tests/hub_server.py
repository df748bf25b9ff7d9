"""A loopback Hub for the unmodified huggingface_hub client: repositories, commits, refs and LFS objects in memory.

Point the client at it with HF_ENDPOINT=server.url and HF_HUB_DISABLE_XET=1. It follows the answers of huggingface.co
as far as publishing and loading models and datasets need them. A dataset's name begins with "datasets/".
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_files import Commit, Repository, tree, upload_mode


TOKEN = "hf_" + "a1B2" * 8
REPOSITORY = r"/((?:datasets/)?[^/]+/[^/]+)"
Answer = tuple[int, Any]


@dataclass
class Fault:
    """What goes wrong with requests that have `at` in "METHOD path"."""

    at: str
    skip: int = 0  # such requests that go well before
    times: int = 1  # such requests that go wrong then
    status: int = 0  # answer with this one
    retry_after: str = ""  # and this header
    cut: bool = False  # break the connection when half of the answer is sent
    short: bool = False  # give half of the bytes asked for as if they were all
    pause: float = 0.0  # seconds before the second half of the answer
    trickle: float = 0.0  # seconds between 32 pieces of that half


class HubServer(ThreadingHTTPServer):
    """Its public attributes may be read and set by tests at any time."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # LFS content by its SHA-256
        self.requests: list[str] = []  # "METHOD path"
        self.token = ""  # if set, what every request must carry but those that read from public repositories
        self.may_write = True
        self.break_at = ""  # break the connection once, at the next request that has this in "METHOD path"
        self.break_after = False  # only when it is carried out, so that just the answer is lost
        self.break_amid = False  # only when half of the answer is sent
        self.down = False  # answer nothing any more
        self.faults: list[Fault] = []
        self.ends = threading.Event()  # pauses are over then

    def uploads(self) -> list[str]:
        """The LFS objects that were sent, by their SHA-256, each as often as it was."""
        return [each.removeprefix("PUT /lfs/") for each in self.requests if each.startswith("PUT /lfs/")]

    def breaks(self, request: str) -> bool:
        found = bool(self.break_at) and self.break_at in request
        self.break_at = "" if found else self.break_at
        return found

    def fault(self, request: str) -> Fault | None:
        """What goes wrong with this request."""
        for fault in [each for each in self.faults if each.at in request]:
            if fault.skip > 0:
                fault.skip -= 1
            elif fault.times > 0:
                fault.times -= 1
                return fault
        return None


@contextmanager
def serve_hub() -> Iterator[HubServer]:
    """A running server on a free port of the loopback interface."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.ends.set()
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_: Any) -> None:
        pass

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        request, size = f"{self.command} {path}", int(self.headers.get("Content-Length") or 0)
        breaks, amid = self.server.breaks(request), self.server.break_amid
        if self.server.down or (breaks and not (self.server.break_after or amid)):
            self.rfile.read(size // 2)
            self.close_connection = True
            return
        body = self.rfile.read(size)
        self.server.requests.append(request)
        status, content = self._refusal(path) or self._answer(path, body)
        fault = self.server.fault(request) or Fault(request, cut=breaks)
        if fault.status:
            status, content = fault.status, {"error": "out of order"}
        self.close_connection = self.close_connection or breaks or fault.cut
        if not breaks or amid:
            self._send(status, content, fault)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _send(self, status: int, content: Any, fault: Fault) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and isinstance(content, bytes):
            first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
            status, data = 206, data[first : last + 1]
        data = data[: len(data) // 2] if fault.short else data
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        if isinstance(content, dict) and "code" in content:
            self.send_header("X-Error-Code", content["code"])
        if status == 401 and "code" not in content:
            self.send_header("X-Error-Message", "Invalid credentials in Authorization header")
        if isinstance(content, bytes):
            self.send_header("X-Repo-Commit", self.commit)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        if fault.retry_after:
            self.send_header("Retry-After", fault.retry_after)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self._send_body(data, fault)

    def _send_body(self, data: bytes, fault: Fault) -> None:
        half, wait = len(data) // 2, self.server.ends.wait
        try:
            self.wfile.write(data[:half])
            wait(fault.pause)
            for begin in range(half, len(data), half // 32 + 1) if fault.trickle else ():
                self.wfile.write(data[begin : begin + half // 32 + 1])
                wait(fault.trickle)
            self.wfile.write(b"" if fault.cut or fault.trickle else data[half:])
        except OSError:  # the client does not wait so long
            self.close_connection = True

    def _refusal(self, path: str) -> Answer | None:
        sent = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if path.startswith("/lfs/"):  # the address itself is the permission, as with signed ones
            return None
        if self.server.token and sent != self.server.token and (sent or self._writes(path)):
            return 401, {"error": f"Invalid username or password: {sent}"}  # the worst case: it repeats the token
        if not self.server.may_write and self.command == "POST":
            return 403, {"error": "You don't have the rights to create a model under this namespace"}
        return None

    def _writes(self, path: str) -> bool:
        return self.command in ("POST", "PUT") and "/paths-info/" not in path

    def _answer(self, path: str, body: bytes) -> Answer:
        if path.startswith("/lfs/"):
            oid = path.removeprefix("/lfs/")
            if hashlib.sha256(body).hexdigest() != oid:
                return 400, {"error": "The content does not have this SHA-256"}
            self.server.objects[oid] = body
            return 200, {}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self._lfs(each) for each in json.loads(body)["objects"]]}
        if match := re.fullmatch(rf"/api{REPOSITORY}(?:/([\w-]+)(?:/(.+))?)?", path.replace("/api/models/", "/api/")):
            name, action, argument = match.groups()
        elif match := re.fullmatch(rf"{REPOSITORY}/resolve/([^/]+)/(.+)", path):
            name, action, argument = match[1], "resolve", (match[2], match[3])
        else:
            return 404, {"error": f"{path} is not served"}
        repository, known = self.server.repositories.get(name), "Authorization" in self.headers
        if repository is None or (repository.private and not known):
            return 404 if known else 401, {"error": "Repository not found", "code": "RepoNotFound"}
        if repository.gated and action in ("resolve", "auth-check"):
            return 403 if known else 401, {"error": f"Access to {name} is restricted", "code": "GatedRepo"}
        return self._repository(name, repository, action, argument, body)

    def _create(self, wanted: dict[str, Any]) -> Answer:
        name = f"{wanted['organization']}/{wanted['name']}"
        name = f"datasets/{name}" if wanted.get("type") == "dataset" else name
        if name in self.server.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{self.server.url}/{name}"}
        self.server.repositories[name] = Repository(wanted.get("visibility") == "private")
        return 200, {"url": f"{self.server.url}/{name}"}

    def _lfs(self, wanted: dict[str, Any]) -> dict[str, Any]:
        there = wanted["oid"] in self.server.objects
        return wanted | ({} if there else {"actions": {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"}}})

    def _repository(self, name: str, repository: Repository, action: str | None, argument: Any, body: bytes) -> Answer:
        if action == "refs":
            kinds = {"branches": ("heads", repository.branches), "tags": ("tags", repository.tags)}
            listed = {
                kind: [{"name": ref, "ref": f"refs/{where}/{ref}", "targetCommit": oid} for ref, oid in refs.items()]
                for kind, (where, refs) in kinds.items()
            }
            return 200, listed | {"converts": []}
        if action == "auth-check":
            return 200, {}
        revision, folder = argument if action == "resolve" else (argument or "main", "")
        if action == "tree":
            revision, _, folder = revision.partition("/")
        if action == "branch":
            repository.branches[argument] = repository.branches["main"]
            return 200, {}
        return self._at(name, repository, action, revision, folder, body)

    def _at(
        self, name: str, repository: Repository, action: str | None, revision: str, path: str, body: bytes
    ) -> Answer:
        commit = repository.at(revision)
        if commit is None:
            return 404, {"error": f"Invalid rev id: {revision}", "code": "RevisionNotFound"}
        if action in (None, "revision"):
            files = [{"rfilename": file} for file in commit.files]
            about = {"id": name.removeprefix("datasets/"), "private": repository.private, "gated": repository.gated}
            return 200, about | {"sha": commit.oid, "siblings": files}
        if action == "tree":
            entries = tree(commit, path, recursive="recursive=true" in urlsplit(self.path).query.lower())
            return (200, entries) if entries else (404, {"error": "no such folder", "code": "EntryNotFound"})
        if action == "paths-info":
            asked = parse_qs(body.decode())["paths"]
            return 200, [entry for entry in tree(commit, "", recursive=True) if entry["path"] in asked]
        if action == "tag":
            tag = json.loads(body)["tag"]
            there = tag in repository.tags
            repository.tags.setdefault(tag, commit.oid)
            return (409, {"error": f"Tag {tag} already exists"}) if there else (200, {})
        if action == "preupload":
            return 200, {"files": [upload_mode(commit, each["path"]) for each in json.loads(body)["files"]]}
        if action == "commit":
            return self._commit(name, repository, revision, commit, body)
        if action == "resolve" and path in commit.files:
            self.commit = commit.oid
            return 200, commit.files[path]
        return 404, {"error": f"{action} {path}: no such entry", "code": "EntryNotFound"}

    def _commit(self, name: str, repository: Repository, branch: str, parent: Commit, body: bytes) -> Answer:
        _, *operations = map(json.loads, body.splitlines())
        changed: dict[str, bytes] = {}
        for operation in operations:
            value = operation["value"]
            large = operation["key"] == "lfsFile"
            if large and value["oid"] not in self.server.objects:
                return 400, {"error": f"{value['path']}: no such LFS object"}
            data = self.server.objects[value["oid"]] if large else base64.b64decode(value["content"])
            changed[value["path"]] = data
        commit = Commit(parent.files | changed, sorted(changed))
        repository.commits.append(commit)
        repository.branches[branch] = commit.oid
        return 200, {"commitUrl": f"{self.server.url}/{name}/commit/{commit.oid}", "commitOid": commit.oid}
