"""The program's start: Ctrl-C while modules are read, and what is shown before the first step is done."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import warm
from conftest import write_pairs

pty = pytest.importorskip("pty")

_MAIN = "from lite_dil.__main__ import main\nsys.exit(main())\n"
# Ctrl-C, for real, when a module is about to be read.
_AT_IMPORT = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1] and sys.meta_path.pop(0) is self:
            del sys.argv[1]
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
"""
_AT_END = "import atexit, os, signal, sys\natexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))\n"


def run(code: str, *argv: str, **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=120, **more)  # type: ignore


@pytest.mark.parametrize(
    ("module", "said"),
    [("lite_dil.cli.main", ""), ("lite_dil.config.train_config", ""), ("lite_dil.cli.chat", "lite-dil: stopped\n")],
)
def test_ctrl_c_while_modules_are_read(module: str, said: str) -> None:
    done = run(_AT_IMPORT + _MAIN, module, "plan", "--model", "./none")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", said)


def test_ctrl_c_while_python_ends() -> None:
    done = run(_AT_END + _MAIN, "plan", "--model", "./none")
    assert done.returncode == 130 and done.stderr.startswith("lite-dil: --model ./none") and "Traceback" not in done.stderr


def test_a_program_that_ignores_ctrl_c_still_does() -> None:
    def ignore() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    done = run(_AT_IMPORT + _MAIN, "lite_dil.config.train_config", "plan", "--model", "./none", preexec_fn=ignore)
    assert done.returncode == 2 and "--model ./none" in done.stderr


def on_terminal(code: str, argv: list[str], until: str = "") -> tuple[int, str]:
    """Run in a terminal; return exit code and output. Ctrl-C is pressed when it shows `until`."""
    process, terminal = warm.on_terminal(argv, code=code, env=os.environ | {"TERM": "xterm", "COLUMNS": "120"})
    shown, deadline = b"", time.monotonic() + 200
    while time.monotonic() < deadline:
        if select.select([terminal], [], [], 1)[0]:
            try:
                shown += os.read(terminal, 4096)
            except OSError:  # its other end is closed
                break
            if until and until.encode() in shown:
                os.write(terminal, b"\x03")
                until = ""
    else:
        process.kill()
    os.close(terminal)
    return process.wait(), shown.decode()


@pytest.fixture
def flags(tiny: str, tmp_path: Path) -> list[str]:
    data = str(write_pairs(tmp_path / "pairs.jsonl", 8))
    made = ["train", "--model", tiny, "--data", data, "--output-dir", str(tmp_path / "run"), "--max-steps", "3"]
    return [*made, "--reference-cache", "off", "--report-samples", "0", "--backend", "cpu"]


CHECKING = "checking that the untrained model is its own reference"
HIDDEN, VISIBLE = "\x1b[?25l", "\x1b[?25h"


def test_a_terminal_shows_what_the_first_step_waits_for(flags: list[str]) -> None:
    code, shown = on_terminal(warm.MAIN, [*flags, "--logging-steps", "3"])
    assert code == 0, shown
    assert shown.index(CHECKING) < shown.index("writing to") < shown.index("the first step takes longest")
    later = shown[shown.rindex("the first step takes longest") :]
    assert re.search(r"3/3.*loss", later) and shown.rindex(HIDDEN) < shown.rindex(VISIBLE)


def test_ctrl_c_during_the_check_leaves_the_terminal_as_it_was(flags: list[str]) -> None:
    slow = "import sys, time\nfrom lite_dil.training.passes import Passes\nPasses.run = lambda *_: time.sleep(100)\n"
    code, shown = on_terminal(slow + warm.MAIN, flags, until=CHECKING)
    assert code == 130, shown
    assert "lite-dil: stopped" in shown and "Traceback" not in shown
    assert shown.rindex(HIDDEN) < shown.rindex(VISIBLE)


def test_a_pipe_gets_a_line_as_each_phase_starts(flags: list[str]) -> None:
    done = warm.run(*flags)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if CHECKING in line] == [f"{CHECKING} ..."]
    assert done.stdout.count("\nstep 1/3: the first step takes longest ...\nstep 1/3  ") == 1
    assert "\x1b" not in done.stdout and done.stderr == ""
