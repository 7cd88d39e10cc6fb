"""The pieces of the soak: each is run by a process of its part, is kept when it is done, and is not repeated afterwards."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

from lite_dil.base.hashing import file_pieces, sha256

_ROOT = Path(__file__).parents[2]
_WORKER = Path(__file__).with_name("worker.py")


class Piece(NamedTuple):
    """A part's name, and the name of a piece of it."""

    part: str
    name: str

    def __str__(self) -> str:
        return f"{self.part}: {self.name}"


class Kept:
    """The pieces that are done: JSON files in a folder, each with its rows, its time, the machine, the form and the code."""

    def __init__(self, folder: Path, short: bool) -> None:
        self.folder, self.form = folder, "short" if short else "long"

    @cached_property
    def code(self) -> str:
        """What stands for the code that is tried, and that tries it."""
        tops = [_ROOT / top for top in ("lite_dil", "backends", "scripts/soak")]
        paths = [path for top in tops for path in sorted(top.rglob("*")) if path.suffix in (".py", ".c")]
        return sha256(piece for path in paths for piece in file_pieces(path))

    @cached_property
    def about(self) -> dict[str, str]:
        """The machine and the commit, for people."""
        git = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty=, changed"]
        done = subprocess.run(git, capture_output=True, text=True)
        cores = f"{os.cpu_count()} cores"
        machine = f"{platform.system()} {platform.machine()}, {cores}, Python {platform.python_version()}"
        return {"machine": machine, "commit": done.stdout.strip() or "an unknown commit", "form": self.form, "code": self.code}

    def path(self, piece: Piece) -> Path:
        """Return a piece's file."""
        return self.folder / f"{piece.part}-{re.sub(r'[^a-z0-9]+', '-', piece.name.lower()).strip('-')}.json"

    def find(self, piece: Piece, any_code: bool = False) -> dict[str, Any] | None:
        """Return a piece that is done, in this form, without a failure, and with this code unless `any_code`."""
        try:
            found: dict[str, Any] = json.loads(self.path(piece).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        whole = found["form"] == self.form and not any(row["failures"] for row in found["rows"])
        return found if whole and (any_code or found["code"] == self.code) else None

    def keep(self, piece: Piece, rows: list[dict[str, Any]], began: float) -> dict[str, Any]:
        """Keep the rows of a piece that was begun at the time `began`."""
        times = {"began": _time(began), "ended": _time(time.time())}
        done = self.about | times | {"piece": str(piece), "seconds": round(time.time() - began, 1), "rows": rows}
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.path(piece).with_suffix(".partial")
        part.write_text(json.dumps(done, indent=1), encoding="utf-8")
        part.replace(self.path(piece))
        return done


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def run(pieces: Sequence[Piece], kept: Kept, output: Path, workers: int) -> Iterator[tuple[Piece, dict[str, Any]]]:
    """Run pieces in several processes side by side; yield each, with what is kept of it, when it is done."""
    todo, done = SimpleQueue[Piece](), SimpleQueue[tuple[Piece, dict[str, Any]] | None]()
    for piece in pieces:
        todo.put(piece)

    def work(number: int) -> None:
        worker: _Worker | None = None
        try:
            while True:
                try:
                    piece = todo.get_nowait()
                except Empty:
                    return
                if worker is None or worker.part != piece.part:
                    if worker is not None:
                        worker.close()
                    worker = _Worker(piece.part, output / f"{piece.part}-{number}", kept.form)
                began = time.time()
                rows = worker.run(piece)
                done.put((piece, kept.keep(piece, rows, began)))
                if worker.ended:
                    worker.close()
                    worker = None
        finally:
            if worker is not None:
                worker.close()
            done.put(None)

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, number) for number in range(workers)]
        left = workers
        while left:
            if (each := done.get()) is None:
                left -= 1
            else:
                yield each
        for future in futures:
            future.result()


class _Worker:
    """A process that runs pieces of one part."""

    def __init__(self, part: str, folder: Path, form: str) -> None:
        self.part, self.ended = part, False
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._errors = folder.with_suffix(".log")
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(_WORKER), part, str(folder), form],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def run(self, piece: Piece) -> list[dict[str, Any]]:
        """Return the rows of a piece; of a process that ends, a row that says so."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(f"{piece.name}\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer:
            return json.loads(answer)  # type: ignore[no-any-return]
        self.ended, code = True, self._process.wait()
        said = [line for line in self._errors.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        why = f"the process ended with {code}: {' '.join(said[-1:])} ({self._errors})"
        return [{"part": piece.part, "what": f"{piece.name}, not run to its end", "outcomes": {"ended": 1}, "failures": [why]}]

    def close(self) -> None:
        """End the process, which removes what it made."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
