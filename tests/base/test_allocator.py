"""What the start of a process asks of torch's allocator, before torch is imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lite_dil.base import memory
from lite_dil.base.memory import expandable_segments, on_wsl
from lite_dil.base.start import set_allocator

NEW, OLD, ROCM = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"


@pytest.mark.parametrize(
    ("version", "name"),
    [("2.6.0", OLD), ("2.9.1+cu128", OLD), ("2.10.0", NEW), ("2.14.1+cu130", NEW), ("3.0.0a0", NEW)],
)
def test_the_name_that_this_torch_reads(version: str, name: str) -> None:
    environment: dict[str, str] = {}
    set_allocator(environment, version)
    assert environment == {name: "expandable_segments:True"}


@pytest.mark.parametrize("version", ["2.14.1+rocm7.1", "", "unknown"])
def test_other_builds_are_left_alone(version: str) -> None:
    environment: dict[str, str] = {}
    set_allocator(environment, version)
    assert environment == {}


@pytest.mark.parametrize("name", [NEW, OLD, ROCM])
@pytest.mark.parametrize("value", ["", "max_split_size_mb:64"])
def test_what_the_user_set_stays(name: str, value: str) -> None:
    for version in ("2.8.0", "2.14.1"):
        environment = {name: value}
        set_allocator(environment, version)
        assert environment == {name: value}


def test_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    assert on_wsl("5.15.167.4-microsoft-standard-WSL2") and on_wsl("4.4.0-19041-Microsoft")
    assert not on_wsl("6.8.0-45-generic")
    for system, release, grows in (
        ("linux", "6.8.0-45-generic", True),
        ("linux", "5.15.167.4-microsoft-standard-WSL2", False),
        ("win32", "11", False),
        ("darwin", "24.0.0", False),
    ):
        monkeypatch.setattr(sys, "platform", system)
        monkeypatch.setattr(memory.platform, "release", lambda release=release: release)
        assert expandable_segments() == grows


@pytest.mark.skipif(not expandable_segments(), reason="segments cannot grow on this system")
@pytest.mark.parametrize("first", ["", "import torch"])
def test_the_start_asks_before_torch_and_never_imports_it(first: str) -> None:
    code = f"""
{first}
import os, sys
from lite_dil.base.start import start
start()
assert ("torch" in sys.modules) == {bool(first)}
print(sorted(name for name in os.environ if name.endswith("ALLOC_CONF")))
"""
    env = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    assert out.returncode == 0, out.stderr
    from importlib import metadata

    name = NEW if tuple(map(int, metadata.version("torch").split(".")[:2])) >= (2, 10) else OLD
    assert out.stdout.strip() == (str([name]) if not first else "[]")
