"""A server on this machine that answers as the Hugging Face hub does: it gives files of folders, and takes uploads."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import unquote, urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Repositories are folders: {"models/owner/tiny": ..., "datasets/owner/prefs": ...}."""

    repositories: dict[str, Path]
    card: Mapping[str, str] = MappingProxyType({})

    def do_GET(self) -> None:
        self._answer(unquote(urlsplit(self.path).path).strip("/"))

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name, files = self._repository(urlsplit(self.path).path.strip("/").removeprefix("api/"))
        paths = asked.get("paths", [])
        self._send(200, json.dumps([self._entry(name, f) for f in files if f in paths]).encode())

    def log_message(self, *_: object) -> None:
        pass

    def _repository(self, path: str) -> tuple[str, list[str]]:
        name = "/".join(path.split("/")[:3])
        folder = self.repositories.get(name)
        return name, sorted(f.name for f in folder.iterdir()) if folder else []

    def _entry(self, name: str, file: str) -> dict[str, object]:
        content = (self.repositories[name] / file).read_bytes()
        return {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def _answer(self, path: str) -> None:
        if path.startswith("api/"):
            path = path.removeprefix("api/")
            name, files = self._repository(path)
            if not files:
                self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif "/tree/" in path and not path.partition("/tree/")[2].endswith((SHA, "main")):
                self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})  # a sub-folder: there are none
            elif "/tree/" in path:
                self._send(200, json.dumps([self._entry(name, file) for file in files]).encode())
            else:
                _, _, repo = name.partition("/")
                info = {"id": repo, "sha": SHA, "private": False, "tags": [], "siblings": [{"rfilename": f} for f in files]}
                info["cardData"] = dict(self.card)
                self._send(200, json.dumps(info).encode())
            return
        name = path if path.startswith("datasets/") else f"models/{path}"
        name, files = self._repository(name)
        file = path.rpartition("/")[2]
        if not files:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif file not in files:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": SHA})
        else:
            content = (self.repositories[name] / file).read_bytes()
            self._send(200, content, {"X-Repo-Commit": SHA, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})

    def _send(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for key, value in {**(headers or {}), "Content-Length": str(len(body)), "Content-Type": "application/json"}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class Busy(Hub):
    """Refuses the first `busy` questions for a file."""

    busy = 2

    def do_HEAD(self) -> None:
        if "/resolve/" in self.path and self.busy:
            type(self).busy -= 1
            self._send(503, b"")
        else:
            super().do_HEAD()


class Echo(Hub):
    """Refuses every request with `status`, and repeats the login, also kept in `seen`, in body and headers."""

    status: int
    seen: list[str]

    def do_GET(self) -> None:
        sent = str(self.headers["Authorization"])
        self.seen.append(sent)
        error = f"no access for {sent}"
        self._send(self.status, json.dumps({"error": error}).encode(), {"X-Error-Message": error, "X-Request-Id": sent})

    def do_POST(self) -> None:
        self.do_GET()


class WritableHub(Hub):
    """Takes uploads: what was committed is in `uploaded`, by repository and name; `seen` has every request's headers."""

    uploaded: dict[str, dict[str, bytes]]
    private: dict[str, bool]
    objects: dict[str, bytes]
    seen: list[tuple[str, str, str | None]]
    token: str
    owner, default = "owner", False  # whether this owner's new repositories are private where nothing is said
    full = False

    def do_GET(self) -> None:
        self._note()
        name = urlsplit(self.path).path.removeprefix("/api/models/")
        if self._refused(name):
            return
        if name not in self.uploaded:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        info = {"id": name, "sha": SHA, "private": self.private[name], "tags": [], "siblings": []}
        self._send(200, json.dumps(info).encode())

    def do_POST(self) -> None:
        self._note()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = urlsplit(self.path).path.strip("/")
        if path == "api/validate-yaml":
            self._send(200, b'{"errors": [], "warnings": []}')
        elif path == "api/repos/create":
            self._create(json.loads(body))
        elif self._refused(path.removeprefix("api/models/")):
            pass
        elif "/preupload/" in path:
            modes = [
                {"path": f["path"], "uploadMode": self._mode(f["path"]), "shouldIgnore": False, "oid": None}
                for f in json.loads(body)["files"]
            ]
            self._send(200, json.dumps({"files": modes}).encode())
        elif path.endswith("info/lfs/objects/batch"):
            href = f"http://{self.headers['Host']}/objects/"
            objects = [{**o, "actions": {"upload": {"href": href + o["oid"]}}} for o in json.loads(body)["objects"]]
            self._send(200, json.dumps({"transfer": "basic", "objects": objects}).encode())
        else:
            self._commit("/".join(path.split("/")[2:4]), body)

    def do_PUT(self) -> None:
        self._note()
        self.objects[self.path.rpartition("/")[2]] = self.rfile.read(int(self.headers["Content-Length"]))
        self._send(200, b"{}")

    def _note(self) -> None:
        self.seen.append((self.command, self.path, self.headers["Authorization"]))

    def _mode(self, name: str) -> str:
        return "lfs" if name.endswith((".safetensors", ".gguf")) else "regular"

    def _refused(self, name: str) -> bool:
        if self.headers["Authorization"] != f"Bearer {self.token}":
            # A server may well repeat what it was sent.
            told = f"Invalid credentials in Authorization header: {self.headers['Authorization']}"
            self._send(401, json.dumps({"error": told}).encode(), {"X-Error-Message": told})
        elif not name.startswith(self.owner + "/"):
            told = f"Forbidden for {self.headers['Authorization']}"
            self._send(403, json.dumps({"error": told}).encode(), {"X-Error-Message": told})
        else:
            return False
        return True

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization', self.owner)}/{asked['name']}"
        if self._refused(name):
            return
        new = name not in self.uploaded
        if new:
            self.uploaded[name] = {}
            private = asked.get("private", {"private": True, "public": False}.get(asked.get("visibility")))
            self.private[name] = self.default if private is None else private
        answer = {"url": f"http://{self.headers['Host']}/{name}"}
        self._send(200 if new else 409, json.dumps(answer).encode())

    def _commit(self, name: str, body: bytes) -> None:
        if self.full:
            told = f"no room left for {self.headers['Authorization']}"
            self._send(400, json.dumps({"error": told}).encode(), {"X-Error-Message": told})
            return
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.uploaded[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.uploaded[name][value["path"]] = self.objects[value["oid"]]
        answer = {"commitUrl": f"http://{self.headers['Host']}/{name}/commit/{SHA}", "commitOid": SHA}
        self._send(200, json.dumps(answer).encode())


@contextmanager
def serve(kind: type[Hub], **attributes: Any) -> Iterator[tuple[str, Any]]:
    """Serve with these attributes; yield the address, and the class that has them."""
    own = type("OneHub", (kind,), attributes)
    server = ThreadingHTTPServer(("127.0.0.1", 0), own)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", own
    finally:
        server.shutdown()
        server.server_close()
