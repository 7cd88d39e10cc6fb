"""The processes that run the commands: one with the libraries loaded, below layer.c, which forks for each."""

from __future__ import annotations

import errno
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LAYER = Path(__file__).with_name("layer.c")
LIMIT = 120  # seconds that a command may take
# What fails, by the error: a full disk still removes files and opens those that are there; one that became read-only syncs.
FAILING = {
    errno.ENOSPC: "CWDTRLF",
    errno.EDQUOT: "CWDTRLF",
    errno.EROFS: "CWDTRLOUX",
    errno.EIO: "CWDTRLOUXFGM",
}


class NotHere(Exception):
    """This machine cannot run these cases; the text says why."""


@dataclass(frozen=True)
class Order:
    """What happens to a command: see `soak_begin` in layer.c. Numbers of events are from 1; 0 is never."""

    argv: Sequence[str]
    folder: str
    output: str
    journal: str
    keys: str = ""
    writers: str = ""
    kill_at: int = 0
    fail_from: int = 0
    fail_until: int = 0
    error: int = 0
    failing: str = ""
    share: int = 0
    slow: int = 0


def build(folder: Path) -> Path:
    """Compile the layer. Raises NotHere."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not sys.platform.startswith("linux") or compiler is None:
        raise NotHere("the layer between lite-dil and the file system needs Linux and a C compiler (cc)")
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / "layer.so"
    command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(made), str(LAYER), "-ldl", "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NotHere(f"{compiler} does not compile {LAYER.name}: {done.stderr.strip()[-500:]}")
    return made


class Warm:
    """The forking process; `cpu` is what its commands have taken, in seconds."""

    def __init__(self, layer: Path, said: Path) -> None:
        self._layer, self._said, self.cpu = layer, said, 0.0
        self._start()

    def _start(self) -> None:
        quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "NO_COLOR": "1"}
        with self._said.open("ab") as said:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("server.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                env={**os.environ, **quiet, "LD_PRELOAD": str(self._layer)},
                start_new_session=True,
            )
        if self._answer(300) != "ready":
            raise RuntimeError(f"the forking process did not start: {self._said}")

    def make(self, place: Path) -> None:
        """Write what the commands read, by `lite_dil`'s libraries."""
        if self._ask({"make": str(place)}) != 0:
            raise RuntimeError(f"the models could not be made: {self._said}")

    def run(self, order: Order) -> int | None:
        """Return a command's exit code, or minus the signal that ended it; None if it hung."""
        return self._ask(asdict(order))

    def _ask(self, order: dict[str, Any]) -> int | None:
        assert self._process.stdin is not None
        self._process.stdin.write((json.dumps(order) + "\n").encode())
        self._process.stdin.flush()
        answer = self._answer(LIMIT)
        if not answer:
            self.close()
            self._start()
            return None
        found = json.loads(answer)
        self.cpu += found["cpu"]
        return int(found["code"])

    def _answer(self, seconds: float) -> str:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        return self._process.stdout.readline().decode().strip() if ready else ""

    def close(self) -> None:
        """End the process, and what it runs."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
