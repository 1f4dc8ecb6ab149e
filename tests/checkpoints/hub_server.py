"""The hub, played by a server here."""

from __future__ import annotations

import hashlib
import importlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

MAIN, OTHER = "a" * 40, "b" * 40
TOKEN = "hf_right"


@dataclass
class Repository:
    files: dict[str, bytes]
    gated: bool = False
    listed: list[str] | None = None
    known: dict[str, Any] = field(default_factory=dict)


@dataclass
class Server:
    """Repositories by id, and each request that came: (method, path, token)."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    fail_after: int | None = None
    held: Callable[[], object] = bool

    def downloads(self) -> list[str]:
        return [path.split("/", 5)[5] for method, path, _ in self.requests if method == "GET"
                and "/resolve/" in path]  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    server_state: Server

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.server_state.requests.append((self.command, path, given))
        parts = path.removeprefix("/api/models").strip("/").split("/")
        repository = self.server_state.repositories.get("/".join(parts[:2]))
        if repository is None:
            self.send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif repository.gated and given != TOKEN:
            self.send(403 if given else 401, b"{}", {"X-Error-Code": "GatedRepo"})
        elif "/tree/" in path:
            self.tree(repository)
        elif path.startswith("/api/"):
            self.list(repository, "/".join(parts[3:]) or "main", "/".join(parts[:2]))
        else:
            self.file(repository, parts, body=body)

    def list(self, repository: Repository, revision: str, id: str) -> None:
        commits = {"main": MAIN, MAIN: MAIN, "v2": OTHER, OTHER: OTHER, "odd": "../../x"}
        if revision not in commits:
            self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        names = repository.listed or list(repository.files)
        siblings = [{"rfilename": n, "size": len(repository.files.get(n, b""))} for n in names]
        answer = {"id": id, "modelId": id, "sha": commits[revision], "siblings": siblings}
        answer |= repository.known
        self.send(200, json.dumps(answer).encode(), {})

    def tree(self, repository: Repository) -> None:
        names = repository.listed or list(repository.files)
        self.send(200, json.dumps([
            {"type": "file", "path": n, "oid": "0" * 40, "size": len(repository.files.get(n, b""))}
            for n in names
        ]).encode(), {})  # fmt: skip

    def file(self, repository: Repository, parts: list[str], *, body: bool) -> None:
        commit = {"main": MAIN, "v2": OTHER}.get(parts[3], parts[3])
        content = repository.files["/".join(parts[4:])]
        content = content.upper() if commit == OTHER else content
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit}
        cut = self.server_state.fail_after
        if body and len(content) == 1000:
            self.server_state.held()
        self.send(200, content, headers, body=body, cut=cut if len(content) == 1000 else None)

    def send(
        self,
        status: int,
        content: bytes,
        headers: dict[str, str],
        *,
        body: bool = True,
        cut: int | None = None,
    ) -> None:
        start = 0
        if body and (wanted := self.headers.get("Range")):
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            status = 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if body:
            self.wfile.write(content[start:cut])


ENVIRONMENT = (
    "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH",
)  # fmt: skip


@contextmanager
def playing(
    repositories: dict[str, dict[str, bytes]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Server]:
    """The hub with these repositories, and a cache in `folder`, for this process and others.

    Its library reads the environment once, and so is read anew, here and in the end.
    """
    state = Server({id: Repository(files) for id, files in repositories.items()})
    handler = type("Bound", (Handler,), {"server_state": state})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as made, monkeypatch.context() as patch:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        patch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{made.server_port}")
        patch.setenv("HF_HOME", str(folder / "hf"))
        for name in ENVIRONMENT:
            patch.delenv(name, raising=False)
        importlib.reload(constants)
        yield state
        made.shutdown()
        thread.join()
    importlib.reload(constants)
