"""Signals as requests to stop: in this process, and not in those that it forks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from lite_dil.base.signals import StopSignal


def test_the_first_signal_is_a_request() -> None:
    told = list[str]()
    with StopSignal("stopping", tell=told.append) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked and told == ["stopping; Ctrl-C again stops at once"]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_worker_ends_by_it() -> None:
    """A pool of the user's code ends its workers so; in a process of its own, since a fork of threads may hang."""
    code = """
import multiprocessing
from lite_dil.base.signals import StopSignal
with StopSignal() as stop:
    for _ in range(30):  # some workers are still beginning when the pool ends
        with multiprocessing.get_context("fork").Pool(4) as pool:
            assert pool.map(abs, [-1, -2]) == [1, 2]
print("ended", stop.asked)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended False\n", "")
