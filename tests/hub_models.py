"""A Hub for models on this machine's loopback, and the project's commands run against it as a user's process would.

`ModelHub` speaks what `huggingface_hub` asks when models are pushed and
pulled: repositories, validation of cards, uploads of plain and of large files (git LFS), commits, downloads. Commits
are atomic, as the Hub's. `ModelHub.cut` names uploads that break off in the middle.
"""

import base64
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import yaml
from loopback import LoopbackServer

TOKEN = "hf_" + "Tt0kenOfTheLoopbackHub" * 2  # in the form of a real one
ROOT = Path(__file__).parents[1]


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=lambda: [hashlib.sha1(b"first").hexdigest()])
    branches: set[str] = field(default_factory=lambda: {"main"})


class ModelHub(LoopbackServer):
    """A Hub with one account, ``me``, that `TOKEN` opens.

    Attributes:
        repositories: by id.
        cut: ("large" or "commit", repository id) whose next upload of a large file, or commit, is cut off half-way.
        requests: (method, path) of each request so far.
    """

    def __init__(self) -> None:
        super().__init__(ModelHubHandler)
        self.repositories: dict[str, Repository] = {}
        self.large: dict[tuple[str, str], bytes] = {}
        self.cut: set[tuple[str, str]] = set()
        self.requests: list[tuple[str, str]] = []


class ModelHubHandler(BaseHTTPRequestHandler):
    hub: ModelHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Silence."""

    def answer(self, status: int, content: Any = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def cut_off(self, what: str, repo_id: str) -> bool:
        """If this upload is to break off: take half of it, close the connection, and let the next one through."""
        if (what, repo_id) not in self.hub.cut:
            return False
        self.hub.cut.remove((what, repo_id))
        self.rfile.read(int(self.headers["Content-Length"]) // 2)
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)
        return True

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def handle_request(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.hub.requests.append((self.command, path))
        for method, pattern, answer in ROUTES:
            if self.command in method and (match := re.fullmatch(pattern, path)):
                answer(self, *match.groups())
                return
        self.body()
        self.answer(404, {"error": f"the loopback Hub has no {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def account(self) -> str | None:
        return "me" if self.headers.get("Authorization") == f"Bearer {TOKEN}" else None

    # ---- repositories ----

    def create(self) -> None:
        wanted = json.loads(self.body())
        repo_id = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if self.account() is None:
            self.answer(401, {"error": "Invalid username or password."})
        elif not repo_id.startswith("me/"):
            self.answer(403, {"error": f"You don't have the rights to create a model under {repo_id}"})
        else:
            status = 409 if repo_id in self.hub.repositories else 200
            private = "private" in (wanted.get("visibility"), wanted.get("private") and "private")
            self.hub.repositories.setdefault(repo_id, Repository(private))
            self.answer(status, {"url": f"{self.hub.url}/{repo_id}", "name": repo_id})

    def repository(self, repo_id: str, *, write: bool = False) -> Repository | None:
        """The repository if this account may use it so; answers if not."""
        repository = self.hub.repositories.get(repo_id)
        if repository is None or ((write or repository.private) and self.account() is None):
            self.body()
            self.answer(401 if self.account() is None else 404, {"error": "Repository not found"},
                        X_Error_Code="RepoNotFound")  # fmt: skip
            return None
        return repository

    def validate(self) -> None:
        """The Hub's check of a card's metadata, as far as its documentation tells it."""
        content = json.loads(self.body())["content"]
        block = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        data = yaml.safe_load(block[1]) if block else None
        errors = [] if isinstance(data, dict) else ["no metadata"]
        for model in (data or {}).get("model-index", []):
            for result in model["results"]:
                errors += [f"no {part}" for part in ("task", "dataset", "metrics") if part not in result]
                errors += [f"{metric}: no figure" for metric in result["metrics"] if "value" not in metric]
                errors += [f"{result['dataset']}: no type" for key in ("type", "name") if key not in result["dataset"]]
        emissions = (data or {}).get("co2_eq_emissions", {"emissions": 0.0})
        errors += [] if isinstance(emissions["emissions"], int | float) else ["emissions are no number"]
        self.answer(400 if errors else 200, {"errors": [{"message": text} for text in errors], "warnings": []})

    # ---- uploads ----

    def preupload(self, repo_id: str, _: str) -> None:
        if (repository := self.repository(repo_id, write=True)) is None:
            return
        files = json.loads(self.body())["files"]
        for file in files:
            file["uploadMode"] = "lfs" if file["path"].endswith(".safetensors") else "regular"
            known = repository.files.get(file["path"])
            if known is not None:
                header = b"" if file["uploadMode"] == "lfs" else f"blob {len(known)}\0".encode()
                file["oid"] = (hashlib.sha1 if header else hashlib.sha256)(header + known).hexdigest()
        self.answer(200, {"files": [{"shouldIgnore": False, **file} for file in files]})

    def large_files(self, repo_id: str) -> None:
        if self.repository(repo_id, write=True) is None:
            return
        objects = json.loads(self.body())["objects"]
        for item in objects:
            if (repo_id, item["oid"]) not in self.hub.large:
                item["actions"] = {"upload": {"href": f"{self.hub.url}/large/{repo_id}/{item['oid']}"}}
        self.answer(200, {"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")

    def large_file(self, repo_id: str, oid: str) -> None:
        if self.cut_off("large", repo_id):
            return
        content = self.body()
        assert hashlib.sha256(content).hexdigest() == oid
        self.hub.large[repo_id, oid] = content
        self.answer(200)

    def branch(self, repo_id: str, name: str) -> None:
        if (repository := self.repository(repo_id, write=True)) is not None:
            self.body()
            there = name in repository.branches
            repository.branches.add(name)
            self.answer(409 if there else 201, {"error": "Reference already exists"} if there else {})

    def known(self, repository: Repository, revision: str | None) -> bool:
        """Whether the repository has this branch or commit; answers if not."""
        if revision is None or revision in repository.branches or revision in repository.commits:
            return True
        self.body()
        self.answer(404, {"error": f"Invalid rev id: {revision}"}, X_Error_Code="RevisionNotFound")
        return False

    def commit(self, repo_id: str, revision: str) -> None:
        if (repository := self.repository(repo_id, write=True)) is None or not self.known(repository, revision):
            return
        if self.cut_off("commit", repo_id):
            return
        lines = [json.loads(line) for line in self.body().splitlines()]
        for line in lines:
            if line["key"] == "file":
                repository.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                repository.files[line["value"]["path"]] = self.hub.large[repo_id, line["value"]["oid"]]
        repository.commits.append(hashlib.sha1(f"{repo_id}{len(repository.commits)}".encode()).hexdigest())
        address = f"{self.hub.url}/{repo_id}/commit/{repository.commits[-1]}"
        self.answer(200, {"commitUrl": address, "commitOid": repository.commits[-1], "success": True})

    # ---- downloads ----

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        if (repository := self.repository(repo_id)) is None:
            return
        commit = repository.commits[-1]
        content = repository.files.get(path)
        if content is None:
            self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        else:
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            self.answer(200, content, ETag=etag, X_Repo_Commit=commit, Accept_Ranges="bytes")

    def information(self, repo_id: str, revision: str | None = None) -> None:
        if (repository := self.repository(repo_id)) is not None and self.known(repository, revision):
            siblings = [{"rfilename": path} for path in repository.files]
            self.answer(200, {"id": repo_id, "sha": repository.commits[-1], "siblings": siblings, "tags": []})

    def tree(self, repo_id: str, _: str, folder: str | None) -> None:
        if (repository := self.repository(repo_id)) is not None:
            files = [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in repository.files.items()
                if folder is None
            ]
            self.answer(200, files)


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES: Any = [
    (("POST",), "/api/repos/create", ModelHubHandler.create),
    (("POST",), "/api/validate-yaml", ModelHubHandler.validate),
    (("POST",), f"/api/models/{NAME}/preupload/(.+)", ModelHubHandler.preupload),
    (("POST",), f"/api/models/{NAME}/branch/(.+)", ModelHubHandler.branch),
    (("POST",), f"/api/models/{NAME}/commit/(.+)", ModelHubHandler.commit),
    (("POST",), f"/{NAME}.git/info/lfs/objects/batch", ModelHubHandler.large_files),
    (("PUT",), rf"/large/{NAME}/(\w+)", ModelHubHandler.large_file),
    (("GET",), f"/api/models/{NAME}(?:/revision/(.+))?", ModelHubHandler.information),
    (("GET",), rf"/api/models/{NAME}/tree/(\w+)(?:/(.+))?", ModelHubHandler.tree),
    (("GET", "HEAD"), f"/{NAME}/resolve/([^/]+)/(.+)", ModelHubHandler.resolve),
]


# ---- a user's process ----


@dataclass
class Ended:
    """How a command ended: exit status, last line of stderr, everything that was printed."""

    status: int
    error: str
    output: str


DRIVER = """
import contextlib, importlib, io, json, os, sys
for module, arguments, token in json.load(sys.stdin):
    out, error, status = io.StringIO(), io.StringIO(), 0
    os.environ["HF_TOKEN"] = token
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            importlib.import_module(module).main(arguments)
        except SystemExit as stop:
            status = stop.code
    print(json.dumps([status, out.getvalue(), error.getvalue()]), file=sys.__stdout__, flush=True)
"""


def run_commands(commands: list[tuple[str, list[Any], str]], variables: dict[str, str]) -> list[Ended]:
    """Run (module, arguments, token), one after the other, in one process that sees ``variables`` before any import."""
    process = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps([[module, [str(part) for part in arguments], token] for module, arguments, token in commands]),
        env=variables | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert TOKEN not in process.stdout + process.stderr
    ended = [json.loads(line) for line in process.stdout.splitlines()]
    return [Ended(status, (error.strip().splitlines() or [""])[-1], out + error) for status, out, error in ended]
