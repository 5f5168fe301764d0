"""A stand-in for the Hugging Face hub: the part of its HTTP API that pushing and loading a model use.

Repositories live in memory. A commit is whole or not there; large files come by Git LFS, as `huggingface_hub`
sends them without Xet.
"""

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
from urllib.parse import unquote, urlsplit

TOKEN = "hf_letmein"


@dataclass
class Repository:
    private: bool = False
    # Commits, each all its files; and where branches stand.
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        before = self.commits.get(self.branches.get(branch, ""), {})
        number = hashlib.sha1(f"{branch}{len(self.commits)}".encode()).hexdigest()
        self.commits[number], self.branches[branch] = {**before, **files}, number
        return number

    def find(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


class Hub:
    """What the server holds, for tests to look into."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.address = ""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), Content_Type="application/json")

    def _missing(self, code: str) -> None:
        self._send(404, X_Error_Code=code, X_Error_Message=code)

    def _allowed(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _path(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        return path

    def do_POST(self) -> None:
        path, body = self._path(), self._body()
        if not self._allowed():
            return self._json({"error": "Invalid username or password."}, 401)
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            if name in self.hub.repositories:
                return self._json({"url": f"{self.hub.address}/{name}"}, 409)
            private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
            self.hub.repositories[name] = repository = Repository(private)
            repository.commit("main", {".gitattributes": b""})
            return self._json({"url": f"{self.hub.address}/{name}", "name": name})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            files = json.loads(body)["files"]
            modes = {True: "lfs", False: "regular"}
            return self._json({
                "files": [
                    {"path": f["path"], "uploadMode": modes[f["path"].endswith(".safetensors")],
                     "shouldIgnore": False}
                    for f in files
                ]
            })  # fmt: skip
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = [
                {"oid": o["oid"], "size": o["size"],
                 "actions": {"upload": {"href": f"{self.hub.address}/lfs/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]  # fmt: skip
            return self._json({"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", path):
            repository = self.hub.repositories[found[1]]
            if found[2] in repository.branches:
                return self._json({"error": "exists"}, 409)
            repository.branches[found[2]] = repository.branches["main"]
            return self._json({})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            files = {}
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                elif entry["key"] == "lfsFile":
                    files[entry["value"]["path"]] = self.hub.objects[entry["value"]["oid"]]
            number = self.hub.repositories[found[1]].commit(found[2], files)
            address = f"{self.hub.address}/{found[1]}/commit/{number}"
            return self._json({"commitUrl": address, "commitOid": number, "success": True})
        return self._json({"error": f"not in this stand-in: {path}"}, 501)

    def do_PUT(self) -> None:
        path, body = self._path(), self._body()
        oid = path.removeprefix("/lfs/")
        if hashlib.sha256(body).hexdigest() != oid:
            return self._json({"error": "another file"}, 400)
        self.hub.objects[oid] = body
        return self._json({})

    def do_HEAD(self) -> None:
        self._get()

    def do_GET(self) -> None:
        self._get()

    def _get(self) -> None:
        path = self._path()
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/(?:revision|tree)/([^/]+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = found or file
        repository = None if match is None else self.hub.repositories.get(match[1])
        if match is None or repository is None or (repository.private and not self._allowed()):
            return self._missing("RepoNotFound")
        number = repository.find((found[3] if found else file[2]) or "main")  # type: ignore[index]
        if number is None:
            return self._missing("RevisionNotFound")
        files = repository.commits[number]
        if file is None:
            rows = [
                {"type": "file", "path": name, "oid": hashlib.sha1(data).hexdigest(), "size": len(data)}
                for name, data in files.items()
            ]
            if found is not None and found[2] and found[2].startswith("/tree/"):
                return self._json(rows)
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            return self._json({"id": match[1], "modelId": match[1], "sha": number, "siblings": siblings})
        if file[3] not in files:
            self._send(404, X_Error_Code="EntryNotFound", X_Repo_Commit=number)
            return None
        data = files[file[3]]
        self._send(
            200, data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit=number,
            Content_Length=str(len(data)), Content_Type="application/octet-stream",
        )  # fmt: skip
        return None


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Serves an empty hub on a free port."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
