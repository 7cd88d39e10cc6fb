"""Real processes without the six seconds of CPU that importing torch, transformers and MLX takes in each.

A server that has imported them, and done nothing else, forks one for each call: with its own standard streams, environment,
folder, limits and signals, as a new interpreter has them. What is about imports, the hub's variables (read at import) or
Python's own start and end needs a new interpreter, by subprocess.
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver, reduction
from pathlib import Path
from typing import Any

MAIN = "import sys; from lite_dil.__main__ import main; sys.exit(main())"
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["preloaded"])


def _start() -> None:
    """Start the server, if it is not there; in Python 3.11 it does not see the path that it is given."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *([before] if before else [])])
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before:
            os.environ["PYTHONPATH"] = before


class _Shared:
    """An open file that goes along to the new process, where it is a number again."""

    def __init__(self, file: int) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return _number, (reduction.DupFd(self.file),)


def _number(file: Any) -> int:
    return file.detach()


def _child(code: str, argv: Sequence[str], env: dict[str, str], cwd: str, files: Sequence[Any], terminal: bool) -> None:
    assert "preloaded" in sys.modules, "the server could not import it, and says nothing of that"
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    if terminal:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin = os.fdopen(0, encoding="utf-8")
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", buffering=1 if os.isatty(1) else -1)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1)
    sys.argv = ["-c", *argv]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


class Process:
    """A running process; `files` are its standard input, output and error, which the caller closes."""

    def __init__(
        self,
        argv: Sequence[str],
        files: Sequence[int],
        code: str = MAIN,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        terminal: bool = False,
    ) -> None:
        _start()
        shared = [_Shared(file) for file in files]
        there = dict(os.environ if env is None else env)
        self._process = _CONTEXT.Process(target=_child, args=(code, argv, there, str(cwd or os.getcwd()), shared, terminal))
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float = 300) -> int:
        """Return the exit code, when it has ended."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return self._process.exitcode

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def send_signal(self, number: int) -> None:
        """Send a signal, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


def on_terminal(argv: Sequence[str], **more: Any) -> tuple[Process, int]:
    """Start a process on a terminal of its own; return it, and the terminal's other end."""
    master, slave = os.openpty()
    try:
        return Process(argv, (slave, slave, slave), terminal=True, **more), master
    finally:
        os.close(slave)


class Piped(Process):
    """A process with pipes: what it says is read as it comes. `out` is a file that takes its standard output instead."""

    def __init__(self, argv: Sequence[str], input: str = "", out: int | None = None, **more: Any) -> None:
        (stdin, write), (said, stdout), (failed, stderr) = os.pipe(), os.pipe(), os.pipe()
        super().__init__(argv, (stdin, stdout if out is None else out, stderr), **more)
        for file in (stdin, stdout, stderr):
            os.close(file)
        self.stdout = self.stderr = ""

        def read(file: int, name: str) -> None:
            with open(file, encoding="utf-8") as pipe:
                setattr(self, name, pipe.read())

        self._readers = [threading.Thread(target=read, args=part) for part in ((said, "stdout"), (failed, "stderr"))]
        for reader in self._readers:
            reader.start()
        with contextlib.suppress(BrokenPipeError), open(write, "w", encoding="utf-8") as pipe:
            pipe.write(input)

    def done(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Return how it ended and what it said."""
        code = self.wait(timeout)
        for reader in self._readers:
            reader.join()
        return subprocess.CompletedProcess((), code, self.stdout, self.stderr)


def run(*argv: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run the program, or other `code`, to its end; see `Piped` and `Process`."""
    return Piped(argv, **more).done()


def spent() -> float:
    """Return the CPU seconds of the server and of its processes that have ended."""
    server = forkserver._forkserver._forkserver_pid
    if server is None:
        return 0.0
    with open(f"/proc/{server}/stat") as file:
        return sum(map(int, file.read().rpartition(")")[2].split()[11:15])) / os.sysconf("SC_CLK_TCK")
