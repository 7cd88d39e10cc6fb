"""scripts/gpu_day.py: starts the checks' processes, stops those that take too long, and writes down what came of them."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_day_costs import limit
from gpu_day_record import FAILED, LEFT_OUT, Check, Record

OF_CARD = 0.9  # of its memory, that the checks of one moment may take
LOG = 4000  # characters of what a failed check printed


@dataclass
class Running:
    """A check whose process runs."""

    check: Check
    process: subprocess.Popen[bytes]
    result: Path
    log: Path
    since: float
    limit: float


class Run:
    """A part's checks.

    Args:
        command: makes one of them, with --worker.
        slower: how many times longer a check takes here than on an H200.
        gib: the card's memory, 0 without one.
        jobs: how many run at a time.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        record: Record,
        command: list[str],
        slower: float,
        gib: float,
        jobs: int,
        say: Callable[[str], None],
    ) -> None:
        self.options, self.record, self.command, self.say = options, record, command, say
        self.slower, self.gib, self.jobs = slower, gib, jobs
        self.until = time.time() + 60 * options.minutes
        self.running: dict[str, Running] = {}

    def all(self, left: dict[str, Check]) -> None:
        """Run as many of these checks as time allows."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                while left or self.running:
                    self.start(left, Path(folder))
                    time.sleep(0.1)
                    self.collect()
            finally:
                for one in self.running.values():
                    stop(one)

    def start(self, left: dict[str, Check], folder: Path) -> None:
        """Start the checks that may start now; leave out those for which no time is left."""
        for key, check in list(left.items()):
            needed, remaining = self.seconds(check), self.until - time.time()
            if remaining < needed:
                del left[key]
                reason = f"needs about {needed:.0f} s, and {max(0.0, remaining):.0f} s were left; the same command does it"
                self.end(key, LEFT_OUT, reason=reason)
            elif self.has_room(check):
                del left[key]
                self.running[key] = self.started(key, check, folder)
            elif check.first:  # nothing that needs it may overtake it
                return

    def has_room(self, check: Check) -> bool:
        """Return whether a check may run beside those that are running."""
        others = [one.check for one in self.running.values()]
        if check.first or any(one.first for one in others):
            return not others
        return not others or (len(others) < self.jobs and sum(one.gib for one in (check, *others)) <= OF_CARD * self.gib)

    def seconds(self, check: Check) -> float:
        """Return the seconds that a check takes here."""
        return min(check.seconds, 15.0) if self.options.tiny else check.seconds * self.slower

    def started(self, key: str, check: Check, folder: Path) -> Running:
        """Start a check's process."""
        result, log = (folder / f"{len(list(folder.iterdir()))}.{kind}" for kind in ("result", "log"))
        seconds = limit(self.seconds(check), self.options.patience)
        environment = dict(os.environ, PYTHONUNBUFFERED="1")
        if not key.startswith("speed"):  # where everything is as a user has it
            environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else each process starts one a core
        if self.jobs > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.jobs)))
        command = [*self.command, "--worker", key, str(result), str(seconds)]
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, env=environment
            )
        return Running(check, process, result, log, time.time(), seconds)

    def collect(self) -> None:
        """Record the results of checks that ended, and stop those beyond their limit."""
        for key, one in list(self.running.items()):
            took, cut, late = time.time() - one.since, "", False
            if one.process.poll() is None:
                late = time.time() > self.until
                if not late and took <= one.limit:
                    continue
                cut = f"stopped after {took:.0f} s, when the part's time was up" if late else f"not done after {took:.0f} s"
            del self.running[key]
            stop(one)
            lines, log = read(one.result), tail(one.log)
            end = lines.pop() if lines and "status" in lines[-1] else None
            if end is None:
                last = (log.strip().splitlines() or ["it printed nothing"])[-1]
                reason = cut or f"its process ended with code {one.process.returncode}: {last}"
                end = {"status": LEFT_OUT if late else FAILED, "reason": reason}
            failed = end["status"] == FAILED or bool(cut)
            self.end(key, end["status"], lines, end["reason"], took, log if failed else "")

    def end(self, key: str, status: str, findings: Any = (), reason: str = "", seconds: float = 0.0, log: str = "") -> None:
        """Record a check's result and print it."""
        self.record.end(key, status, findings, reason, seconds, log)
        self.say(f"  {key}: {status}, {seconds:.0f} s {reason}".rstrip())


def stop(one: Running) -> None:
    """Kill a process and its children."""
    if one.process.poll() is None:
        os.killpg(one.process.pid, signal.SIGKILL)
    one.process.wait()


def read(result: Path) -> list[dict[str, Any]]:
    """Return the lines of a result; the last may be cut."""
    found = []
    for line in result.read_text(encoding="utf-8").splitlines() if result.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def tail(log: Path) -> str:
    """Return the end of what a check printed."""
    return log.read_text(encoding="utf-8", errors="replace")[-LOG:]
