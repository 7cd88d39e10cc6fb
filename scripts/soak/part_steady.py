"""Long runs and large data: memory, open files and step time stay flat, and 300,000 pairs start and resume fast."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from soak import tiny_world
from soak.row import Row

STEPS, SHORT_STEPS, PAIRS = 2000, 100, 300_000
LARGE = f"{PAIRS:,} pairs"
# From the second to the last quarter: resident memory may grow by a twentieth and 16 MB, the median step's CPU time by a
# quarter (the machine has other work), and open files not at all.
MEMORY, MEMORY_MB, STEP_TIME = 0.05, 16.0, 0.25
# The first start reads, checks and tokenises all pairs and keeps the tokens: at most so many times what transformers'
# `apply_chat_template` alone takes for them, measured beside it. A start that finds them, and a resume: at most half of the
# first. Seconds would be a bound on the machine.
FIRST, LATER = 3.0, 0.5
ROWS = 3000  # of which transformers' time is measured


class Used(NamedTuple):
    """What a process used: CPU seconds and its peak of resident memory in MB."""

    seconds: float
    memory: float


def pieces(*, short: bool) -> list[str]:
    """Return the names of the pieces."""
    return ["cpu", "mlx"] if short else ["cpu", "mlx", LARGE]


@contextmanager
def opened(output: Path, *, short: bool) -> Iterator[Callable[[str], Iterator[Row]]]:
    """Give a function that yields the row of many steps on a backend, or of the large data."""
    steps = SHORT_STEPS if short else STEPS

    def take(name: str) -> Iterator[Row]:
        yield _pairs(output / "pairs") if name == LARGE else _steps(name, steps, output / name)

    yield take


def _steps(backend: str, steps: int, place: Path) -> Row:
    place.mkdir(parents=True)
    before, worker = _cpu(), Path(__file__).parent / "steady_worker.py"
    done = subprocess.run(
        [sys.executable, str(worker), backend, str(steps), str(place)],
        capture_output=True,
        text=True,
        env={**os.environ, "LITE_DIL_CACHE": str(place / "cache")},
    )
    what, seconds = f"{steps:,} steps on {backend}, second quarter and last", _cpu() - before
    shutil.rmtree(place)
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
    if steps >= STEPS and step_last > step * (1 + STEP_TIME):  # of a few steps it is the machine's other programs
        failures.append(f"steps become slower: {figures}")
    return Row("steady", what, Counter({figures: 1}), failures, seconds)


def _pairs(place: Path) -> Row:
    """Start and resume on many pairs, each by the command in a process of its own."""
    place.mkdir(parents=True)
    run = place / "run"
    model, data = tiny_world.make_model(place / "model"), tiny_world.write_rows(place / "pairs.jsonl", PAIRS)
    plain = _plain(model, data)
    own = ["--data", str(data), "--model", str(model), "--backend", "cpu", "--dtype", "float32", "--eval-fraction", "0"]
    own += ["--report-samples", "0", "--max-steps", "2", "--save-steps", "1", "--batch-size", "2"]
    used = {"start": _used(place, ["train", *own, "--output-dir", str(run)])}
    used["start again"] = _used(place, ["train", *own, "--output-dir", str(place / "again")])
    for path in (run / "checkpoints" / "step-2", run / "adapter"):  # as a kill after the first step leaves it
        shutil.rmtree(path)
    used["resume"] = _used(place, ["train", "--resume", str(run)])
    shutil.rmtree(place)
    first = used["start"].seconds
    allowed = {"start": FIRST * plain, "start again": LATER * first, "resume": LATER * first}
    figures = {
        name: f"{name} {each.seconds:.0f} s of CPU ({each.seconds / first:.0%} of the first start), {each.memory:.0f} MB"
        for name, each in used.items()
    }
    failures = [f"{figures[name]}; at most {most:.0f} s" for name, most in allowed.items() if used[name].seconds > most]
    seconds = sum(each.seconds for each in used.values())
    what = f"{LARGE}; transformers' apply_chat_template alone takes {plain:.0f} s for them"
    return Row("steady", what, Counter(figures.values()), failures, seconds)


def _plain(model: Path, data: Path) -> float:
    """Return the CPU seconds that the rows take, each read, rendered and tokenised with its answers by transformers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    with data.open(encoding="utf-8") as file:
        lines = [next(file) for _ in range(ROWS)]
    began = time.process_time()
    for line in lines:
        row = json.loads(line)
        tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)
        for side in ("chosen", "rejected"):
            tokenizer.apply_chat_template(row["prompt"] + row[side])
    return (time.process_time() - began) * PAIRS / ROWS


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


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
