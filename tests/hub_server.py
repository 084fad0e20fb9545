"""A Hub on the loopback interface, for tests over real HTTP: set HF_ENDPOINT to its `url` before anything is imported.

    with HubServer() as hub:
        hub.add("me/photos", {"README.md": b"...", "data/train-0.parquet": path}, gated=True)
        hub.tokens["secret"] = {"me/photos"}         # a token, and the gated repositories it may read
        hub.fail("/resolve/.*parquet", status=503, times=2)
        subprocess.run([...], env=hub_environment(hub.url, home))
        hub.requests                                 # [(method, path), ...]

It speaks what reading needs: repository information, trees, files with ranges, access checks. As on the Hub, everyone
may see a gated repository's information; its files take a token that was granted access. To teach it more, add to
`RequestHandler.ROUTES`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from loopback import LoopbackServer

__all__ = ["Fault", "HubServer", "Repo"]

DATE = "2026-01-01T00:00:00.000Z"


@dataclasses.dataclass
class Repo:
    """A repository at one commit. Files are given as bytes or as the local file that holds them."""

    kind: str
    files: dict[str, bytes | Path]
    gated: bool = False

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr(sorted(self.files)).encode()).hexdigest()

    def read(self, path: str) -> bytes:
        content = self.files[path]
        return content if isinstance(content, bytes) else content.read_bytes()

    def entry(self, path: str) -> dict[str, Any]:
        content = self.read(path)
        return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


@dataclasses.dataclass
class Fault:
    """What goes wrong with requests whose path matches: an HTTP status, or a connection cut after half the body."""

    pattern: str
    status: int | None
    times: int


class HubServer(LoopbackServer):
    """The server; a context manager.

    Attributes:
        repos: by kind and id.
        tokens: token -> ids of the gated repositories it may read.
        requests: (method, path) of every request so far.
    """

    def __init__(self) -> None:
        super().__init__(RequestHandler)
        self.repos: dict[tuple[str, str], Repo] = {}
        self.tokens: dict[str, set[str]] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, repo_id: str, files: dict[str, bytes | Path], *, kind: str = "dataset", gated: bool = False) -> Repo:
        """Host a repository."""
        self.repos[kind, repo_id] = Repo(kind, files, gated)
        return self.repos[kind, repo_id]

    def fail(self, pattern: str, *, status: int | None = None, times: int = 10**9) -> None:
        """Answer the next requests whose path matches with this status; None cuts the connection half-way."""
        self.faults.append(Fault(pattern, status, times))

    def take_fault(self, path: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, path):
                    fault.times -= 1
                    return fault
        return None


class RequestHandler(BaseHTTPRequestHandler):
    """One request; `ROUTES` says which method answers which path."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    ROUTES = (
        ("GET", r"/api/(?P<kind>dataset|model)s/(?P<id>[^/]+/[^/]+)/auth-check", "auth_check"),
        (
            "GET",
            r"/api/(?P<kind>dataset|model)s/(?P<id>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?",
            "tree",
        ),
        ("POST", r"/api/(?P<kind>dataset|model)s/(?P<id>[^/]+/[^/]+)/paths-info/(?P<revision>[^/]+)", "paths_info"),
        ("GET", r"/api/(?P<kind>dataset|model)s/(?P<id>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?", "information"),
        ("GET", r"/(?:(?P<kind>dataset)s/)?(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.*)", "file"),
    )

    def handle_request(self) -> None:
        hub, parts = self.hub, urlsplit(self.path)
        path = unquote(parts.path)
        hub.requests.append((self.command, path))
        self.query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.fault = hub.take_fault(path)
        if self.fault is not None and self.fault.status is not None:
            return self.refuse(self.fault.status, "", f"made to fail with {self.fault.status}")
        for method, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match is not None and method == ("GET" if self.command == "HEAD" else self.command):
                return self.answer(name, **match.groupdict())
        return self.refuse(404, "", f"no route {self.command} {path}")

    do_GET = do_HEAD = do_POST = handle_request

    def answer(self, name: str, id: str, kind: str | None = None, revision: str | None = None, **rest: Any) -> None:
        repo = self.hub.repos.get((kind or "model", id))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        if repo is None:
            return self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        if revision not in (None, "main", repo.sha):
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if repo.gated and name in ("auth_check", "file") and id not in self.hub.tokens.get(token, ()):
            if not token:
                return self.refuse(401, "GatedRepo", f"Access to {id} is restricted. You must be authenticated.")
            return self.refuse(
                403, "GatedRepo", f"Access to {id} is restricted and you are not in the authorized list."
            )
        return getattr(self, name)(repo, id, **rest)  # type: ignore[no-any-return]

    # ---- routes ----

    def auth_check(self, repo: Repo, id: str) -> None:
        self.send(200, b"", "text/plain")

    def information(self, repo: Repo, id: str) -> None:
        siblings = [{"rfilename": path} for path in sorted(repo.files)]
        gated: Any = "auto" if repo.gated else False
        common = {"_id": "0" * 24, "id": id, "author": id.partition("/")[0], "sha": repo.sha, "lastModified": DATE}
        flags = {"private": False, "gated": gated, "disabled": False, "tags": [], "downloads": 0, "likes": 0}
        self.send_json(common | flags | {"createdAt": DATE, "siblings": siblings})

    def tree(self, repo: Repo, id: str, path: str | None) -> None:
        prefix = f"{path.rstrip('/')}/" if path else ""
        below = sorted(name for name in repo.files if name.startswith(prefix))
        if not below:
            return self.refuse(404, "EntryNotFound", f"{path} does not exist on main")
        folders = {name[: len(prefix) + end] for name in below for end in _slashes(name[len(prefix) :])}
        if self.query.get("recursive", "false").lower() not in ("true", "1"):
            below = [name for name in below if "/" not in name[len(prefix) :]]
            folders = {name for name in folders if "/" not in name[len(prefix) :]}
        entries = [{"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in sorted(folders)]
        return self.send_json(entries + [repo.entry(name) for name in below])

    def paths_info(self, repo: Repo, id: str) -> None:
        if self.headers.get("Content-Type", "").startswith("application/json"):
            paths = json.loads(self.body)["paths"]
        else:
            paths = parse_qs(self.body.decode())["paths"]
        self.send_json([repo.entry(path) for path in paths if path in repo.files])

    def file(self, repo: Repo, id: str, path: str) -> None:
        if path not in repo.files:
            return self.refuse(404, "EntryNotFound", f"{path} does not exist")
        content = repo.read(path)
        headers = {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "X-Repo-Commit": repo.sha,
            "Accept-Ranges": "bytes",
        }
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span is None:
            return self.send(200, content, "application/octet-stream", headers)
        first, last = int(span[1]), min(int(span[2] or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return self.send(206, content[first : last + 1], "application/octet-stream", headers)

    # ---- answers ----

    def refuse(self, status: int, code: str, message: str) -> None:
        self.send(status, b"", "text/plain", {"X-Error-Code": code, "X-Error-Message": message} if code else {})

    def send_json(self, content: Any) -> None:
        self.send(200, json.dumps(content).encode(), "application/json")

    def send(self, status: int, content: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Type": kind, "Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault is not None and self.fault.status is None:  # cut
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""


def _slashes(path: str) -> list[int]:
    return [position for position, letter in enumerate(path) if letter == "/"]
