"""A process that has imported the libraries, below layer.c, and done nothing else: it forks one for each command.

It reads one JSON object per line, an Order's fields, and answers each with one that has the command's exit code, or minus the
number of the signal that ended it, and its CPU seconds.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).parents[2])  # scripts/

from lite_dil.base.start import start  # noqa: E402

start()

import transformers.models.llama.modeling_llama  # noqa: E402, F401
from soak.writes import commands  # noqa: E402

import lite_dil.backends.torch.backend  # noqa: E402
import lite_dil.backends.torch.export  # noqa: E402
import lite_dil.backends.torch.generate  # noqa: E402
import lite_dil.backends.torch.load  # noqa: E402
import lite_dil.backends.torch.lora  # noqa: E402
import lite_dil.base.files  # noqa: E402
import lite_dil.cli.export  # noqa: E402
import lite_dil.cli.generate  # noqa: E402
import lite_dil.cli.label  # noqa: E402
import lite_dil.recipes.preference  # noqa: E402
from lite_dil.__main__ import main  # noqa: E402
from lite_dil.data import token_cache  # noqa: E402
from lite_dil.reports import charts  # noqa: E402

with suppress(ImportError):
    import lite_dil.backends.mlx.backend
    import lite_dil.backends.mlx.load

SEEN = ctypes.CFUNCTYPE(None, ctypes.c_long, ctypes.c_int, ctypes.c_char_p)
FILES = lite_dil.base.files.__file__
LIBRARY = str(Path(os.__file__).parent)  # Python's own: its modules write on behalf of who calls them


class _Chart(str):
    """An SVG, which is no text to be escaped."""

    def __html__(self) -> str:
        return self


def _undrawn(make: object, salt: str = "", text: str = "") -> Any:
    """A chart without curves: drawing them is most of what a run of a tiny model takes, and writes nothing."""
    return _Chart(f'<svg data-chart="{salt}"></svg>')


def _writers(path: Path) -> Any:
    """Return what notes who makes each change: whether it is base/files, and the innermost lines of Python on the stack."""

    def seen(event: int, kind: int, name: bytes) -> None:
        stack = [(frame.filename, frame.lineno or 0) for frame in traceback.extract_stack(limit=60)[:-1]]
        callers = [file for file, _ in stack if not file.startswith((LIBRARY, "<")) or "site-packages" in file]
        ours = callers[-1:] == [FILES]
        where = [f"{Path(file).name}:{line}" for file, line in stack[-4:]]
        with path.open("a") as out:
            out.write(json.dumps([event, chr(kind), name.decode(), ours, where]) + "\n")

    return SEEN(seen)


def _child(order: dict[str, Any]) -> None:
    """Run a command below the layer, in the forked process, or make what all of them read."""
    if "make" in order:
        commands.make(Path(order["make"]))
        os._exit(0)
    out = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    given = os.open(os.devnull, os.O_RDONLY)
    if order["keys"]:
        given, write = os.pipe()
        os.write(write, order["keys"].encode())
        os.close(write)
    for number, file in ((0, given), (1, out), (2, out)):
        os.dup2(file, number)
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(0, encoding="utf-8"),
        os.fdopen(1, "w", encoding="utf-8"),
        os.fdopen(2, "w", encoding="utf-8", buffering=1),
    )
    os.chdir(order["folder"])
    os.environ["LITE_DIL_CACHE"] = str(Path(order["folder"], "cache"))
    sys.argv = ["lite-dil", *order["argv"]]
    journal = os.open(order["journal"], os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_TRUNC, 0o666)
    note: Callable[..., None] | None = _writers(Path(order["writers"])) if order["writers"] else None
    ctypes.CDLL(None).soak_begin(
        os.fsencode(order["folder"]),
        journal,
        ctypes.c_long(order["kill_at"]),
        ctypes.c_long(order["fail_from"]),
        ctypes.c_long(order["fail_until"]),
        order["error"],
        order["failing"].encode(),
        order["share"],
        ctypes.c_long(order["slow"]),
        note or SEEN(),
    )
    try:
        code = main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code or 0)


def serve() -> None:
    charts.svg = _undrawn  # type: ignore[assignment]
    token_cache.SMALL = 0  # the tokens of our few rows are kept, as those of large data are
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        process = os.fork()
        if not process:
            try:
                _child(json.loads(line))
            finally:
                os._exit(70)
        _, status, used = os.wait4(process, 0)
        cpu = used.ru_utime + used.ru_stime
        answers.write(json.dumps({"code": os.waitstatus_to_exitcode(status), "cpu": cpu}) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
