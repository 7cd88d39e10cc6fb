"""Run the checks in a separate process, and continue with the rest if one of them crashes it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import NamedTuple

from lite_dil.base.files import scratch_file
from lite_dil.doctor.checks import CHECKS
from lite_dil.models.find import cache_dir

NAMES = tuple(CHECKS)
LIMIT = 600  # seconds for all checks, including imports and compilation


class Checked(NamedTuple):
    """A finished check: `ok` is None if nothing was computed."""

    name: str
    ok: bool | None
    text: str
    seconds: float


def names_for(backend: str, four_bits: bool) -> list[str]:
    """Return the checks for this backend.

    Args:
        four_bits: whether the packages for --4bit are installed.
    """
    left_out = {"offloads"} if backend != "cuda" else set()
    return [name for name in NAMES if name not in left_out and (name != "4 bits" or four_bits)]


def examine(backend: str, names: list[str]) -> Iterator[Checked]:
    """Yield each check when it is done. One that raises or ends its process fails, with its last line of error."""
    left = list(names)
    while left:
        done = 0
        for checked in _in_a_process(backend, left):
            done += 1
            yield checked
        left = left[done:]


def _in_a_process(backend: str, names: list[str]) -> Iterator[Checked]:
    """Yield the checks up to the first that ends the process, at least one."""
    command = [sys.executable, "-m", "lite_dil.doctor.worker", backend, *names]
    running, ended = names[0], False
    with scratch_file(cache_dir()) as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8") as process:
            limit = threading.Timer(LIMIT, process.kill)
            limit.start()
            try:
                for line in process.stdout or ():
                    said = json.loads(line)
                    if "starts" in said:
                        running = said["starts"]
                    else:
                        yield Checked(**said)
                ended = True
            finally:
                limit.cancel()
                if not ended:
                    process.kill()
        if process.returncode:
            errors.seek(0)
            text = (
                _exception(errors.read().decode(errors="replace"))
                or f"its process ended with code {process.returncode}, within {LIMIT} s"
            )
            yield Checked(running, False, text, 0.0)


def _exception(text: str) -> str:
    """Return the last line of a traceback that names an exception, else the last line of the text."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt|Exit)\b", line)]
    return re.sub(r"^lite_dil[\w.]*: ", "", (named or lines or [""])[-1])
