"""What a run of the tests takes of the processors: in all, and its ten dearest tests.

Seconds of CPU are the same on a busy machine and on a quiet one. Those of a test include its fixtures and child processes.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import blas
import pytest
import warm

DEAREST = 10


def spent() -> float:
    """Return the CPU seconds of this process and of its children that have ended."""
    return sum(os.times()[:4]) + warm.spent()


class CpuTime:
    """A plugin of pytest, for one process or pytest-xdist's workers, which send what they took to the first process."""

    def __init__(self) -> None:
        self.began, self.before = time.monotonic(), spent()
        self.workers = 0.0
        self.tests: Counter[str] = Counter()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Iterator[None]:
        """Note the time since the last report: a test has three, of set-up, call and tear-down."""
        report = yield
        now = spent()
        report.cpu, self.before = now - self.before, now
        return report

    def pytest_collection_finish(self) -> None:
        self.before = spent()  # imports are no test's

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.tests[report.nodeid] += getattr(report, "cpu", 0.0)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["cpu"] = spent()

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.workers += getattr(node, "workeroutput", {}).get("cpu", 0.0)  # a worker that crashed sends nothing

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        own = sum(os.times()[:2]) if self.workers else spent()  # workers that have ended are children, too
        total, wall = own + self.workers, time.monotonic() - self.began
        terminalreporter.section(f"CPU time: {total / 60:.1f} minutes in {wall / 60:.1f} minutes, {blas.NAME}")
        for name, seconds in self.tests.most_common(DEAREST):
            terminalreporter.write_line(f"{seconds:6.1f} s {name}")
        if path := os.environ.get("TESTS_CPU"):
            with open(path, "w", encoding="utf-8") as file:
                file.writelines(f"{seconds:.3f} {name}\n" for name, seconds in self.tests.most_common())
