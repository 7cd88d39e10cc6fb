"""Watch one case: what it prints, runs and writes, and how long it takes.

Python's audit hooks see every file that is opened for writing, every process that is started and every pickle that is read.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lite_dil.base.errors import TrainingDiverged, UserError

SECONDS = 10
_RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.startfile", "subprocess.Popen", "pickle.find_class")
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# What the libraries may do: their caches, and the devices that they ask about.
_ALLOWED = ("/dev/", "/proc/", "/sys/")
# Characters that a terminal obeys; a progress line returns to its start.
_OBEYED = {*map(chr, range(0x20)), *map(chr, range(0x7F, 0xA0))} - {"\n", "\t", "\r"}


class Harm(AssertionError):
    """A case did what no input may make lite-dil do."""


class _Watch:
    """What is going on; `None` as its folder means that nobody watches."""

    folder: Path | None = None

    def __init__(self) -> None:
        self.seen: list[str] = []

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        """Note what must not happen."""
        if self.folder is None:
            return
        if event in _RUNS:
            self.seen.append(f"{event} {args[:2]!r}"[:200])
        elif event == "open" and isinstance(args[2], int) and args[2] & _WRITES:
            self._written(args[0])
        elif event in _CHANGES:
            self._written(args[1] if event in ("os.rename", "os.link", "os.symlink") else args[0])

    def _written(self, path: Any) -> None:
        if isinstance(path, (str, bytes)):
            folder, self.folder = self.folder, None  # what follows opens files itself
            where = os.path.realpath(os.fsdecode(path))
            if folder is not None and not where.startswith((str(folder), *_ALLOWED)) and not where.endswith(".pyc"):
                self.seen.append(f"wrote {where!r}"[:200])
            self.folder = folder


_watch = _Watch()
sys.addaudithook(_watch.hook)


def watched(case: Callable[[], Any], folder: Path) -> str:
    """Run a case, which may write below `folder` only, and return "taken" or "refused".

    Raises Harm, or what is no message for the user.
    """
    said = io.StringIO()
    _watch.seen.clear()
    start = time.process_time()
    with _alarm(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        _watch.folder = folder.resolve()
        try:
            code = case()
            outcome = "refused" if code == 2 else "taken"
        except (UserError, TrainingDiverged):  # the command line prints it
            outcome = "refused"
        except SystemExit as error:
            outcome = "refused" if error.code == 2 else "taken"
        finally:
            _watch.folder = None
    if _watch.seen:
        raise Harm("; ".join(_watch.seen))
    if found := sorted(_OBEYED & set(said.getvalue())):
        at = said.getvalue().index(found[0])
        raise Harm(f"printed {found[0]!r} in {said.getvalue()[max(at - 40, 0) : at + 40]!r}")
    if (took := time.process_time() - start) > SECONDS:
        raise Harm(f"took {took:.0f} seconds")
    return outcome


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    """Interrupt what takes twice the time, or what waits for long; C code ends first."""

    def ring(*_: object) -> None:
        raise Harm(f"took more than {2 * SECONDS} seconds")

    timers = {signal.SIGPROF: (signal.ITIMER_PROF, 2 * SECONDS), signal.SIGALRM: (signal.ITIMER_REAL, 20 * SECONDS)}
    before = {number: signal.signal(number, ring) for number in timers}
    for timer, seconds in timers.values():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer, _ in timers.values():
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
