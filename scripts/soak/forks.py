"""Commands in forks of a process that has imported the libraries and computed nothing yet: a tenth of a second each."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple


class Ended(NamedTuple):
    """How a fork ended: its exit code (None if it ran out of time), what it said, and how long it took.

    `code` is minus the signal's number if a signal ended it; `cpu` are CPU seconds.
    """

    code: int | None
    said: str
    seconds: float
    cpu: float


def load() -> None:
    """Import what trainings need, without computing anything: threads do not survive a fork."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["HF_HUB_OFFLINE"] = "1"
    from lite_dil.base.start import start

    start()
    import torch  # noqa: F401

    with contextlib.suppress(OSError):  # 20 times faster than MLX's own products; after torch, which would take it too
        ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
    import transformers.models.llama.modeling_llama  # noqa: F401

    import lite_dil.backends.mlx.backend
    import lite_dil.backends.torch.backend
    import lite_dil.cli.compare
    import lite_dil.cli.export
    import lite_dil.cli.generate
    import lite_dil.recipes.comparison
    import lite_dil.recipes.preference
    import lite_dil.reports.page  # noqa: F401


def call(work: Callable[[], int], log: Path, environment: Mapping[str, str], limit: float) -> Ended:
    """Run `work` in a fork, with its output in the file `log`, and return how it ended; it gets `limit` seconds."""
    began, before = time.monotonic(), _children()
    process = os.fork()
    if not process:
        _child(work, log, environment)
    file = os.pidfd_open(process)
    late = not select.select([file], [], [], limit)[0]
    os.close(file)
    if late:
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    code = None if late else os.waitstatus_to_exitcode(status)
    return Ended(code, log.read_text(encoding="utf-8", errors="replace"), time.monotonic() - began, _children() - before)


def _child(work: Callable[[], int], log: Path, environment: Mapping[str, str]) -> None:
    """Run `work` and end this process."""
    code = 70
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for number, file in enumerate((nothing, out, out)):
            os.dup2(file, number)
        sys.stdin, sys.stdout = os.fdopen(0, encoding="utf-8"), os.fdopen(1, "w", encoding="utf-8")
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", buffering=1)
        os.environ.update(environment)
        code = work()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:  # what a user would see, which the parent looks for
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
