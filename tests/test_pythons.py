"""The other versions of Python that pyproject.toml names, where they are on this machine: sources, help, `plan` and `data`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_pairs

ROOT = Path(__file__).parent.parent
VERSIONS = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
# What `plan` and `data` import, by the requirements in pyproject.toml; neither needs torch, MLX or matplotlib.
PACKAGES = (*("jinja2", "numpy", "nvidia-ml-py", "platformdirs", "psutil", "pyyaml", "rich", "safetensors", "transformers"),)


def interpreter(version: str) -> str:
    """Return the interpreter of that version, from PATH or pyenv, or skip the test."""
    if version == HERE:
        pytest.skip(f"these tests run on Python {version}")
    own = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [shutil.which(f"python{version}"), *sorted(map(str, own.glob(f"{version}.*/bin/python")))]
    for path in filter(None, found):  # pyenv's own commands are there for versions that are not switched on, too
        if subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0:
            return path
    pytest.skip(f"no Python {version} here")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder from which both packages are imported under their names."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "lite_dil").mkdir()
    for path in [*(ROOT / "lite_dil").iterdir(), ROOT / "backends"]:
        (folder / "lite_dil" / path.name).symlink_to(path)
    return folder


def run(python: str, sources: Path, *argv: str, packages: str = "") -> str:
    path = os.pathsep.join(filter(None, (str(sources), packages)))
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env |= {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONWARNINGS": "error::SyntaxWarning"}
    out = subprocess.run([python, *argv], cwd=sources, env=env, capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr
    return out.stdout


@pytest.mark.parametrize("version", VERSIONS)
def test_sources_and_help(version: str, sources: Path) -> None:
    """Without any package."""
    code = """
import pathlib, sys
for path in pathlib.Path("lite_dil").glob("**/*.py"):
    compile(path.read_bytes(), str(path), "exec")
for path in pathlib.Path("lite_dil/backends").resolve().glob("**/*.py"):
    compile(path.read_bytes(), str(path), "exec")
from lite_dil.cli.main import main, parsers
for command in parsers()[1]:
    try:
        main([command, "--help"])
    except SystemExit as end:
        assert end.code == 0
print("compiled")
"""
    said = run(interpreter(version), sources, "-c", code)
    assert said.count("usage: lite-dil ") >= 8 and said.endswith("compiled\n")


@pytest.mark.parametrize("version", VERSIONS[:1])
def test_plan_and_data(version: str, sources: Path, tiny: str, tmp_path: Path) -> None:
    """With the packages that they need, on the oldest, which lacks the most; installing them takes most of the time."""
    python, packages = interpreter(version), str(tmp_path / "packages")
    wanted = re.findall(rf'"((?:{"|".join(PACKAGES)})[<>=][^"]*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert len(wanted) == len(PACKAGES)
    quick = ["-q", "--disable-pip-version-check", "--no-compile", "--only-binary", ":all:", "--root-user-action", "ignore"]
    pip = [sys.executable, "-m", "pip", "--python", python, "install", *quick, "--target", packages, *wanted]
    got = subprocess.run(pip, capture_output=True, text=True, timeout=300, check=False)
    if got.returncode:
        pytest.skip(f"packages for Python {version} cannot be had: {got.stderr.strip().splitlines()[-1]}")
    pairs = str(write_pairs(tmp_path / "pairs.jsonl"))
    plan = ["plan", "--model", tiny, "--backend", "cpu", "--memory", "8", "--json"]
    commands = json.dumps([plan, ["data", pairs, "--model", tiny, "--json"]])
    code = """
import json, sys
from lite_dil.cli.main import main
for argv in json.loads(sys.argv[1]):
    assert main(argv) == 0
"""
    said = run(python, sources, "-c", code, commands, packages=packages)
    found, end = json.JSONDecoder().raw_decode(said)
    assert found["fits"] and json.loads(said[end:])["sources"]
