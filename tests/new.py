"""A new interpreter, for what libraries read when they are imported; that takes seconds, so several commands share one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

_CODE = """
import contextlib, io, json, sys
sys.path.append(sys.argv[1])
import undrawn
from lite_dil.cli.main import main
undrawn.undraw()
found = []
for argv in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    found.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(found))
"""


class Done(NamedTuple):
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str


def run(commands: Sequence[Sequence[str]], env: Mapping[str, str]) -> list[Done]:
    """Run commands of lite-dil one after the other; what they say beside sys.stdout and sys.stderr is in the first's `err`."""
    command = [sys.executable, "-c", _CODE, str(Path(__file__).parent)]
    asked = json.dumps(commands)  # not an argument, which a model card would repeat
    done = subprocess.run(command, input=asked, capture_output=True, text=True, env=dict(env), timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    first, *others = (Done(*found) for found in json.loads(done.stdout.splitlines()[-1]))
    return [first._replace(err=first.err + done.stderr), *others]
