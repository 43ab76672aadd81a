"""A stand-in for the Hugging Face Hub's API on loopback: repositories, commits and LFS, for one data set or model."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

TOKEN = "hf_aTokenThatNobodyMaySee"
PLACES = {"dataset": "datasets/", "model": ""}
LARGE = (".parquet", ".safetensors", ".gguf")


@dataclass
class Repository:
    """is_private, what its newest commit holds, and its kind: "dataset" or "model"."""

    is_private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    kind: str = "dataset"


@dataclass
class Hub:
    """What the server knows. makes_public: whatever visibility is asked for. forbids_writing: the token may only read."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    makes_public: bool = False
    forbids_writing: bool = False
    url: str = ""


@contextmanager
def hub_server() -> Iterator[Hub]:
    """A running server. It accepts `TOKEN` and nothing else."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        """Silence."""

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.command == "PUT":  # storage asks for no token: its address is the secret
            oid = path.rpartition("/")[2]
            is_whole = hashlib.sha256(body).hexdigest() == oid
            self.hub.objects |= {oid: body} if is_whole else {}
            self._send(200 if is_whole else 400, {})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            # With the token in its words, which a careless proxy may do: the client must not repeat them.
            self._send(401, {"error": f"Invalid credentials: {self.headers.get('Authorization')}"})
        elif path == "/api/validate-yaml":
            self._send(200, {"warnings": [], "errors": []})
        elif self.hub.forbids_writing and self.command == "POST":
            self._send(403, {"error": "You don't have the rights to create a dataset under this namespace"})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        else:
            self._of_repository(path, body)

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        kind = asked.get("type") or "model"
        is_private = asked.get("visibility") == "private" or asked.get("private") is True
        self.hub.repositories[name] = Repository(is_private=is_private and not self.hub.makes_public, kind=kind)
        self._send(200, {"url": f"{self.hub.url}/{PLACES[kind]}{name}", "name": name})

    def _of_repository(self, path: str, body: bytes) -> None:
        match = re.fullmatch(r"(?:/api)?/(?:(datasets|models)/)?([^/]+/[^/]+?)(?:\.git)?(/.*)?", path)
        repository = self.hub.repositories.get(match[2]) if match else None
        kind = "dataset" if match and match[1] == "datasets" else "model"
        if match is None or repository is None or repository.kind != kind:
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return
        name, action = match[2], match[3] or ""
        if action in ("", "/revision/main"):
            self._send(200, {"id": name, "private": repository.is_private, "sha": "0" * 40, "siblings": [], "tags": []})
        elif action.startswith("/tree/main"):
            entries = [
                {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for file, data in repository.files.items()
            ]
            self._send(200, entries)
        elif action == "/preupload/main":
            self._send(200, {"files": [_mode(file["path"]) for file in json.loads(body)["files"]]})
        elif action == "/info/lfs/objects/batch":
            self._send(200, {"transfer": "basic", "objects": [self._object(item) for item in json.loads(body)["objects"]]})
        elif action == "/commit/main":
            self._commit(name, repository, body)
        else:
            self._send(404, {"error": f"no such address: {path}"})

    def _object(self, item: dict[str, Any]) -> dict[str, Any]:
        return {**item, "actions": {"upload": {"href": f"{self.hub.url}/storage/{item['oid']}", "header": {}}}}

    def _commit(self, name: str, repository: Repository, body: bytes) -> None:
        files = dict(repository.files)
        for line in body.splitlines():
            change = json.loads(line)
            value = change["value"]
            if change["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif change["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif change["key"] == "deletedFile":
                del files[value["path"]]
        repository.files = files
        oid = hashlib.sha1(body).hexdigest()
        url = f"{self.hub.url}/{PLACES[repository.kind]}{name}/commit/{oid}"
        self._send(200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def _send(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        message = {"X-Error-Message": value["error"]} if isinstance(value, dict) and "error" in value else {}
        for key, text in {**message, **(headers or {})}.items():
            self.send_header(key, text)
        self.end_headers()
        self.wfile.write(body)


def _mode(path: str) -> dict[str, Any]:
    is_large = path.endswith(LARGE)
    return {"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False, "oid": None}
