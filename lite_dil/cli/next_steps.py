"""What to do after a training: the last lines of ``lite-dil train`` and ``demo``."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from lite_dil.base.shell import command
from lite_dil.models.options import ModelOptions, trusting
from lite_dil.reports.run_report import REPORT
from lite_dil.runs.folder import unused


def lines(run: Path, options: ModelOptions) -> list[str]:
    """Return the next steps for the finished run in folder `run`, as commands to type in this folder."""
    adapter, output = ["--adapter", str(run), *trusting(options)], str(unused(Path("my-model")))
    format = "adapter" if options.trust_remote_code else "ollama"  # other programs do not know a model with its own code
    return [
        "next:",
        f"  report  {(run / REPORT).resolve().as_uri()}",
        f"  chat    {command(*program(), 'chat', *adapter, '--compare')}",
        f"  export  {command(*program(), 'export', *adapter, '--format', format, '--output', output)}",
    ]


def program() -> list[str]:
    """Return the words that start this program from a shell: its name if that finds it, else the way to it."""
    here, called = Path(sys.executable), Path(sys.argv[0])
    script = called if called.stem == "lite-dil" else here.with_name("lite-dil.exe" if os.name == "nt" else "lite-dil")
    found = shutil.which("lite-dil")
    if found and script.exists() and Path(found).samefile(script):
        return ["lite-dil"]
    return [_short(script)] if script.exists() else [_short(here), "-m", "lite_dil"]


def _short(path: Path) -> str:
    """Return the path from this folder if it is below it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
