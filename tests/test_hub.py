"""Hub ids, against a server on this machine that answers as the Hugging Face hub does, for one model and one data set."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from conftest import write_pairs

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Repositories are folders: {"models/owner/tiny": ..., "datasets/owner/prefs": ...}."""

    repositories: dict[str, Path]

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


@pytest.fixture
def endpoint(tiny: str, tmp_path: Path) -> Iterator[str]:
    (tmp_path / "prefs").mkdir()
    write_pairs(tmp_path / "prefs" / "train.jsonl", 8)
    write_pairs(tmp_path / "prefs" / "test.jsonl", 4)
    kind = type(
        "OneHub", (Hub,), {"repositories": {"models/owner/tiny": Path(tiny), "datasets/owner/prefs": tmp_path / "prefs"}}
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def train(endpoint: str, home: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: the libraries read these variables when they are imported."""
    env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_ETAG_TIMEOUT": "5"}
    command = [sys.executable, "-m", "lite_dil.cli", "train", *flags, "--max-steps", "1", "--output-dir", str(home / "run")]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


@pytest.mark.parametrize("backend", ["cpu", "mlx"])
def test_model_and_data_from_the_hub(endpoint: str, tmp_path: Path, backend: str) -> None:
    flags = ["--model", "owner/tiny", "--data", "owner/prefs", "--eval-data", "owner/prefs:test", "--backend", backend]
    out = train(endpoint, tmp_path / "home", *flags)
    assert out.returncode == 0, out.stderr
    assert "owner/prefs: 8 pairs" in out.stdout
    assert "owner/prefs:test: 4 pairs" in out.stdout
    assert f"owner/tiny on {backend}" in out.stdout
    assert (tmp_path / "home" / "run" / "adapter").is_dir()


def test_a_config_of_a_data_set_and_its_first_rows(endpoint: str, tmp_path: Path) -> None:
    card = "---\nconfigs:\n- config_name: good\n  data_files:\n  - split: learn\n    path: train.jsonl\n---\n"
    (tmp_path / "prefs" / "README.md").write_text(card)
    flags = ["--model", "owner/tiny", "--backend", "cpu", "--data"]
    out = train(endpoint, tmp_path / "home", *flags, "owner/prefs/good:learn", "--max-rows", "3")
    assert "owner/prefs/good:learn: 3 pairs" in out.stdout, out.stderr
    assert not list((tmp_path / "home").glob("datasets/**/*.arrow"))  # streamed
    out = train(endpoint, tmp_path / "other", *flags, "owner/prefs/good")
    assert out.returncode == 2
    assert "cannot be loaded from the hub" in out.stderr and "name it as owner/prefs/good:SPLIT" in out.stderr
    assert "Traceback" not in out.stderr


@pytest.mark.parametrize("backend", ["cpu", "mlx"])
def test_ids_that_the_hub_does_not_have(endpoint: str, tmp_path: Path, backend: str) -> None:
    for flags, message in (
        (["--model", "owner/none", "--data", "owner/prefs"], "--model owner/none: its tokenizer cannot be loaded"),
        (["--model", "owner/tiny", "--data", "owner/none"], "owner/none: cannot be loaded from the hub"),
        (["--model", "owner/tiny", "--data", "owner/prefs:dev"], "owner/prefs:dev: cannot be loaded from the hub"),
    ):
        out = train(endpoint, tmp_path / "home", *flags, "--backend", backend)
        assert out.returncode == 2, out.stderr
        assert message in out.stderr
        assert "Traceback" not in out.stderr
