"""Commands that people are told to type: they name where lite-dil came from, and a shell reads them as meant."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from lite_dil.base.install import install
from lite_dil.base.shell import command


def installed_from(origin: dict[str, Any] | None, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make lite-dil's installation one that pip recorded with this origin (PEP 610), or with none."""
    folder = place / "site" / "lite_dil-9.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: lite-dil\nVersion: 9\n")
    if origin is not None:
        (folder / "direct_url.json").write_text(json.dumps(origin))
    monkeypatch.syspath_prepend(str(place / "site"))


@pytest.mark.parametrize("editable", [True, False])
def test_from_a_clone(editable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clone = tmp_path / "my clone"
    clone.mkdir()
    (clone / "pyproject.toml").touch()
    info = {"editable": True} if editable else {}
    installed_from({"url": clone.as_uri(), "dir_info": info}, tmp_path, monkeypatch)
    flag = ["-e"] if editable else []
    assert shlex.split(install("gguf")) == ["pip", "install", *flag, f"{clone}[gguf]"]
    monkeypatch.chdir(clone)
    assert install("gguf") == f'pip install {"-e " if editable else ""}".[gguf]"'
    (clone / "pyproject.toml").unlink()  # the clone was moved away
    assert install("gguf") == 'pip install -e ".[gguf]"'


def test_from_a_repository_and_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address, wheel = "https://example.com/x", tmp_path / "lite_dil-9-py3-none-any.whl"
    wheel.touch()
    for number, (origin, url) in enumerate(
        (
            ({"url": address, "vcs_info": {"vcs": "git", "commit_id": "0"}}, f"git+{address}"),
            ({"url": address, "vcs_info": {"vcs": "git", "commit_id": "0", "requested_revision": "v1"}}, f"git+{address}@v1"),
            ({"url": wheel.as_uri(), "archive_info": {}}, wheel.as_uri()),
        )
    ):
        installed_from(origin, tmp_path / str(number), monkeypatch)
        *pip, package = shlex.split(install("cuda"))
        found = Requirement(package)
        assert (pip, found.name, found.extras, found.url) == (["pip", "install"], "lite-dil", {"cuda"}, url)
    wheel.unlink()
    assert install("cuda") == 'pip install -e ".[cuda]"'


def test_the_index_is_never_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where pip recorded nothing either: a stranger may own the name there."""
    installed_from(None, tmp_path, monkeypatch)
    assert install("mlx") == 'pip install -e ".[mlx]"'


def test_a_shell_reads_a_command_as_it_was_meant() -> None:
    words = ["a", "b c", 'quote"s', "it's", "$HOME", "`x`", "back\\slash", "-m", "é", "*", "", "x[y]", "!1", "~"]
    out = subprocess.run(["sh", "-c", f"printf '%s\\n' {command(*words)}"], capture_output=True, text=True)
    assert out.stdout.split("\n")[:-1] == words
    assert command("lite-dil", "chat", "--adapter", "runs/my run") == 'lite-dil chat --adapter "runs/my run"'
