"""--push-to-hub against a server on this machine: what arrives, what does not, and that the token is shown nowhere."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import WritableHub, serve

TOKEN = "hf_" + "aBcDeFgHiJ" * 3
# A process of its own: huggingface_hub reads its variables when it is imported.
PUSH = """
import sys
from pathlib import Path
from lite_dil.base.errors import UserError
from lite_dil.base.start import start
from lite_dil.export.push import push
start()
try:
    print("at", push(Path(sys.argv[1]), sys.argv[2], len(sys.argv) > 3, print))
except UserError as error:
    sys.exit(f"lite-dil: {error}")
"""


@pytest.fixture
def hub() -> Iterator[tuple[str, Any]]:
    with serve(WritableHub, uploaded={}, private={}, objects={}, seen=[], token=TOKEN) as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An exported adapter."""
    made = tmp_path / "adapter"
    made.mkdir()
    (made / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 40)
    (made / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (made / "README.md").write_text("---\ntags:\n- lite-dil\n---\n\n# tuned\n")
    return made


def run(
    address: str, folder: Path, *words: str, token: str | None = TOKEN, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Push, and look for the token in all that was said and in every file that was written."""
    home = folder.parent / "home"
    home.mkdir(exist_ok=True)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    env |= {"HF_ENDPOINT": address, "HF_HOME": str(home), "HOME": str(home), "HF_HUB_DISABLE_XET": "1", **variables}
    env |= {"HF_TOKEN": token} if token else {}
    command = [sys.executable, "-c", PUSH, str(folder), *words]
    out = subprocess.run(command, capture_output=True, text=True, env=env, cwd=home, timeout=120)
    files = b"".join(path.read_bytes() for path in folder.parent.rglob("*") if path.is_file())
    for secret in (TOKEN, token or TOKEN):
        assert secret not in out.stdout + out.stderr
        assert secret.encode() not in files
    return out


@pytest.mark.parametrize("private", [False, True])
def test_everything_arrives(hub: tuple[str, Any], folder: Path, private: bool) -> None:
    address, server = hub
    out = run(address, folder, "owner/tuned", *["private"] * private)
    assert out.returncode == 0, out.stderr
    assert f"at {address}/owner/tuned" in out.stdout
    assert server.uploaded == {"owner/tuned": {path.name: path.read_bytes() for path in folder.iterdir()}}
    assert server.private == {"owner/tuned": private}
    # The token goes to the hub's own addresses, in a header, and not to the store of large files.
    assert {header for method, _, header in server.seen if method != "PUT"} == {f"Bearer {TOKEN}"}
    assert [header for method, _, header in server.seen if method == "PUT"] == [None]
    assert not any(TOKEN in path for _, path, _ in server.seen)
    assert run(address, folder, "owner/tuned").returncode == 0, "a second time, over what is there"


def test_an_owner_whose_repositories_are_private_keeps_them_so(hub: tuple[str, Any], folder: Path) -> None:
    address, server = hub
    server.default = True
    assert run(address, folder, "owner/tuned").returncode == 0
    assert server.private == {"owner/tuned": True}


def test_with_hf_xet_small_files_arrive_too(hub: tuple[str, Any], folder: Path) -> None:
    """What the hub takes for small goes by the same way; large files of hf_xet would need its own store."""
    address, server = hub
    (folder / "adapter_model.safetensors").unlink()
    out = run(address, folder, "owner/tuned", HF_HUB_DISABLE_XET="0")
    assert out.returncode == 0, out.stderr
    assert server.uploaded["owner/tuned"].keys() == {"README.md", "adapter_config.json"}


def test_a_saved_login_is_used(hub: tuple[str, Any], folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    address, server = hub
    saved = tmp_path_factory.mktemp("login") / "token"
    saved.write_text(TOKEN)
    out = run(address, folder, "owner/tuned", token=None, HF_TOKEN_PATH=str(saved))
    assert out.returncode == 0, out.stderr
    assert len(server.uploaded["owner/tuned"]) == 3


@pytest.mark.parametrize(
    ("words", "token", "message"),
    [
        (("owner/tuned",), None, "not logged in to the hub; `hf auth login`, or set HF_TOKEN"),
        (("owner/tuned",), "hf_" + "wrong" * 6, "the hub does not accept this login; `hf auth login`"),
        (("other/tuned",), TOKEN, "this login may not write there; give another OWNER"),
        (("tuned",), TOKEN, "expected OWNER/NAME (its owner is missing)"),
        (("owner/a--b..c",), TOKEN, "expected OWNER/NAME"),
        (("https://huggingface.co/owner/tuned",), TOKEN, "expected OWNER/NAME"),
    ],
)
def test_what_the_user_must_mend_is_one_line(
    hub: tuple[str, Any], folder: Path, words: tuple[str, ...], token: str | None, message: str
) -> None:
    address, server = hub
    out = run(address, folder, *words, token=token)
    assert out.returncode == 1
    assert message in out.stderr
    assert len(out.stderr.splitlines()) == 1
    assert not server.uploaded
    assert len(list(folder.iterdir())) == 3


def test_what_the_hub_says_is_told_without_the_token(hub: tuple[str, Any], folder: Path) -> None:
    address, server = hub
    server.full = True
    out = run(address, folder, "owner/tuned")
    assert out.returncode == 1
    assert "(no room left for Bearer ***)" in out.stderr
    assert server.uploaded == {"owner/tuned": {}}


def test_no_connection(folder: Path) -> None:
    out = run("http://127.0.0.1:9", folder, "owner/tuned")
    assert out.returncode == 1
    assert "the upload failed" in out.stderr and "check the connection." in out.stderr
    assert f"{folder} is kept" in out.stderr
    assert len(out.stderr.splitlines()) == 1
    out = run("http://127.0.0.1:9", folder, "owner/tuned", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE" in out.stderr


def test_a_public_repository_is_not_taken_for_a_private_one(hub: tuple[str, Any], folder: Path) -> None:
    address, server = hub
    server.uploaded["owner/tuned"], server.private["owner/tuned"] = {}, False
    out = run(address, folder, "owner/tuned", "private")
    assert out.returncode == 1
    assert "public" in out.stderr
    assert server.uploaded == {"owner/tuned": {}}


@pytest.mark.parametrize("name", ["state.pt", "state.safetensors", ".env", "id_rsa", "token.json", "logs/config.json", "link"])
def test_nothing_else_gets_out(hub: tuple[str, Any], folder: Path, name: str) -> None:
    address, server = hub
    if name == "link":
        name = "config.json"
        (folder / name).symlink_to("/etc/passwd")
    else:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    out = run(address, folder, "owner/tuned")
    assert out.returncode == 1
    assert f": {name}" in out.stderr
    assert not server.uploaded
