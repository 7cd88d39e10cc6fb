"""A wheel built from the sources, installed into an empty environment."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, **environment: str) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    out = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=env, cwd=ROOT.anchor)
    assert out.returncode == 0, out.stdout + out.stderr
    return out.stdout


def test_every_package_is_listed() -> None:
    """What setuptools is not told of works in an editable installation and is missing from the wheel."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = [path.parent for top in ("lite_dil", "backends") for path in (ROOT / top).rglob("__init__.py")]
    found = [".".join(folder.relative_to(ROOT).parts) for folder in folders]
    assert sorted(listed) == sorted(f"lite_dil.{name}" if name.startswith("backends") else name for name in found)


def test_wheel_in_an_empty_environment(tmp_path: Path) -> None:
    # A copy, so that no build folder is left in (or taken from) the sources.
    sources = tmp_path / "sources"
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True).stdout
    for name in tracked.splitlines():
        if (ROOT / name).is_file():
            (sources / name).parent.mkdir(parents=True, exist_ok=True)
            (sources / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, sources)
    (wheel,) = tmp_path.glob("lite_dil-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "lite_dil").rglob("*.py")} <= set(names)
    assert {f"lite_dil/{path.relative_to(ROOT)}" for path in (ROOT / "backends").rglob("*.py")} <= set(names)
    assert {f"lite_dil/data/short_answers/{split}.jsonl" for split in ("train", "test")} <= set(names)
    templates = {str(path.relative_to(ROOT)) for path in (ROOT / "lite_dil" / "reports" / "templates").iterdir()}
    assert "lite_dil/reports/templates/report.html" in templates <= set(names)
    assert "lite_dil/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "scripts/", "backends/")) for name in names)

    environment = tmp_path / "empty"
    run(sys.executable, "-m", "venv", environment)
    scripts = environment / ("Scripts" if os.name == "nt" else "bin")
    run(scripts / "python", "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel)
    assert "usage: lite-dil train" in run(scripts / "lite-dil", "train", "--help")
    assert "--4bit" in run(scripts / "lite-dil", "demo", "--help")
    # The backends package needs numpy, which is lent to the empty environment here.
    where = run(
        scripts / "python",
        "-c",
        "import lite_dil.backends as b, lite_dil; print(b.__file__, lite_dil.__file__)",
        PYTHONPATH=sysconfig.get_path("purelib"),
    )
    assert all(str(environment) in path or "__editable__" in path for path in where.split()), where
