"""lite_dil imports no array library, and `--help` imports nothing heavy; proven in a new interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import lite_dil

ROOT = Path(lite_dil.__file__).parent
CORE = [".".join(("lite_dil", *path.relative_to(ROOT).with_suffix("").parts)) for path in ROOT.rglob("[!_]*.py")]
HEAVY = ("torch", "mlx", "transformers", "peft")
LATE = ("numpy", "yaml", "rich", "jinja2", "prompt_toolkit", "psutil", "huggingface_hub", "matplotlib")


def modules_after(code: str) -> set[str]:
    out = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint('loaded', *sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return {name.partition(".")[0] for name in out.stdout.splitlines()[-1].split()[1:]}


def test_the_core_imports_no_array_library() -> None:
    loaded = modules_after("\n".join(f"import {name}" for name in CORE) + "\nimport lite_dil.backends")
    assert loaded.isdisjoint(HEAVY)
    assert "lite_dil" in loaded


def test_losses_run_on_numpy_without_torch_or_mlx() -> None:
    code = "import numpy, lite_dil.objectives.losses as l; assert l.bce().chosen(numpy.zeros(2)).shape == (2,)"
    assert modules_after(code).isdisjoint(HEAVY)


@pytest.mark.parametrize("command", ["train", "data", "plan", "demo", "chat", "generate", "label", "export"])
def test_help_imports_nothing_heavy(command: str) -> None:
    code = f"import lite_dil.cli.main as c\ntry: c.main(['{command}', '--help'])\nexcept SystemExit as e: assert e.code == 0"
    code += "\nelse: raise AssertionError('it has shown no help')"
    assert modules_after(code).isdisjoint((*HEAVY, *LATE))
