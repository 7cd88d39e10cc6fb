"""Long runs and large data: memory, open files and step time stay flat, and 300,000 pairs start and resume fast."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from soak import tiny_world
from soak.row import Row

STEPS, SHORT_STEPS, PAIRS = 2000, 100, 300_000
# From the second to the last quarter: resident memory may grow by a twentieth and 16 MB, the median step's CPU time by a
# quarter (the machine has other work), and open files not at all.
MEMORY, MEMORY_MB, STEP_TIME = 0.05, 16.0, 0.25
# CPU seconds for 300,000 pairs: half of 86 and 78, from before the tokens were kept on disk.
START, RESUME = 43.0, 39.0


class Used(NamedTuple):
    """What a process used: CPU seconds and its peak of resident memory in MB."""

    seconds: float
    memory: float


def rows(output: Path, *, short: bool) -> Iterator[Row]:
    """Yield a row for each backend, and one for the large data."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    for backend in ("cpu", "mlx"):
        yield _steps(backend, SHORT_STEPS if short else STEPS, output / backend)
    if not short:
        yield _pairs(output / "pairs")
    shutil.rmtree(output)


def _steps(backend: str, steps: int, place: Path) -> Row:
    place.mkdir()
    began, worker = time.monotonic(), Path(__file__).parent / "steady_worker.py"
    done = subprocess.run(
        [sys.executable, str(worker), backend, str(steps), str(place)],
        capture_output=True,
        text=True,
        env={**os.environ, "LITE_DIL_CACHE": str(place / "cache")},
    )
    what, seconds = f"{steps:,} steps on {backend}, second quarter and last", time.monotonic() - began
    if done.returncode:
        return Row("steady", what, Counter({"ended": 1}), done.stderr.splitlines()[-1:] or ["ended"], seconds)
    _, (memory, files, step), _, (memory_last, files_last, step_last) = json.loads(done.stdout.splitlines()[-1])
    figures = (
        f"{memory:.0f} and {memory_last:.0f} MB resident, {files} and {files_last} open files, "
        f"{1000 * step:.1f} and {1000 * step_last:.1f} ms of CPU a step"
    )
    failures = []
    if memory_last > memory * (1 + MEMORY) + MEMORY_MB:
        failures.append(f"resident memory grows: {figures}")
    if files_last > files:
        failures.append(f"open files grow: {figures}")
    if step_last > step * (1 + STEP_TIME):
        failures.append(f"steps become slower: {figures}")
    return Row("steady", what, Counter({figures: 1}), failures, seconds)


def _pairs(place: Path) -> Row:
    """Start and resume on many pairs, each by the command in a process of its own."""
    place.mkdir()
    began, run = time.monotonic(), place / "run"
    model, data = tiny_world.make_model(place / "model"), tiny_world.write_rows(place / "pairs.jsonl", PAIRS)
    own = ["--data", str(data), "--model", str(model), "--backend", "cpu", "--dtype", "float32", "--eval-fraction", "0"]
    own += ["--report-samples", "0", "--max-steps", "2", "--save-steps", "1", "--batch-size", "2"]
    used = {"start": _used(place, ["train", *own, "--output-dir", str(run)])}
    used["start again"] = _used(place, ["train", *own, "--output-dir", str(place / "again")])
    for path in (run / "checkpoints" / "step-2", run / "adapter"):  # as a kill after the first step leaves it
        shutil.rmtree(path)
    used["resume"] = _used(place, ["train", "--resume", str(run)])
    allowed = {"start": START, "start again": START, "resume": RESUME}
    figures = {name: f"{name}: {each.seconds:.0f} s of CPU, {each.memory:.0f} MB" for name, each in used.items()}
    failures = [f"{figures[name]}; at most {most:.0f} s" for name, most in allowed.items() if used[name].seconds > most]
    return Row("steady", f"{PAIRS:,} pairs", Counter(figures.values()), failures, time.monotonic() - began)


def _used(place: Path, argv: Sequence[str]) -> Used:
    """Run the command; return what it used. Raises RuntimeError if it fails."""
    environment = {**os.environ, "LITE_DIL_CACHE": str(place / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    log = place / "log"
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, "-m", "lite_dil", *argv], stdout=file, stderr=file, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise RuntimeError(log.read_text())
    return Used(usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**10)
