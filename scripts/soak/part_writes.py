"""Kills, power cuts and failing disks at the writes of every command, each followed by the same command again.

The libraries are loaded once, in two processes that fork for each case. Linux with a C compiler only.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue

from soak.row import Row
from soak.writes.cases import BOTH, ERROR, ERROR_KILL, KILL, POWER, SLOW, Case, Outcome, Trial, keep
from soak.writes.commands import Command, commands
from soak.writes.journal import Entry, tree_of
from soak.writes.states import unlike
from soak.writes.warm import FAILING, NotHere, Warm, build

JOBS = 2
# Cases of a command with N events, at most: in the long form and in the short one.
LONG = {KILL: 130, POWER: 130, BOTH: 20, ERROR: 80, ERROR_KILL: 16, SLOW: 1}
SHORT = {KILL: 3, POWER: 3, BOTH: 1, ERROR: 2, ERROR_KILL: 0, SLOW: 0}
# What the short form runs: one of each kind of writer.
IN_SHORT = ("train, cpu", "train, mlx", "generate, cpu", "label, cpu", "export --format merged")


def rows(output: Path, *, short: bool) -> Iterator[Row]:
    """Yield a row for each command and kind of case."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    try:
        layer = build(output)
    except NotHere as reason:
        print(f"writes: {reason}", file=sys.stderr)
        return
    make = f"import sys; sys.path[:0] = {sys.path!r}; from pathlib import Path; from soak.writes import commands as c"
    subprocess.run([sys.executable, "-c", f"{make}; c.make(Path(sys.argv[1]))", str(output)], check=True, capture_output=True)
    with ExitStack() as stack, ThreadPoolExecutor(JOBS) as pool:
        warms: SimpleQueue[Warm] = SimpleQueue()
        for number in range(JOBS):
            warms.put(made := Warm(layer, output / f"server-{number}.txt"))
            stack.callback(made.close)
        for command in commands(output):
            if not short or command.name in IN_SHORT:
                yield from _command(command, output, warms, pool, SHORT if short else LONG)


def _command(
    command: Command, output: Path, warms: SimpleQueue[Warm], pool: ThreadPoolExecutor, most: dict[str, int]
) -> Iterator[Row]:
    """Yield the rows of one command."""
    warm = warms.get()
    trial = Trial(command, warm, output / "first", output / "made")
    entries = trial.uninterrupted(writers=str(output / "first" / "writers")) if trial.place.mkdir(exist_ok=True) is None else []
    reference = tree_of(trial.folder)
    if not trial.made.exists():
        shutil.copytree(trial.folder, trial.made)
    yield _writers_row(command, output / "first" / "writers", entries)
    (output / "first" / "writers").unlink()
    trial.uninterrupted()
    warms.put(warm)
    if found := list(unlike(reference, tree_of(trial.folder))):
        yield Row("writes", f"{command.name}: twice the same", Counter(failed=1), found)
        return

    def one(case: Case) -> tuple[Case, Outcome, float]:
        warm = warms.get()
        try:
            before = warm.cpu
            mine = Trial(command, warm, output / f"worker-{id(warm)}", output / "made", reference)
            mine.place.mkdir(exist_ok=True)
            outcome = mine.take(case)
            if outcome.problems:
                keep(mine, case, outcome.problems, output / "failed")
            return case, outcome, warm.cpu - before
        finally:
            warms.put(warm)

    for kind, number in most.items():
        cases = list(_cases(kind, number, entries, random.Random(f"{command.name} {kind}")))
        began, done = time.monotonic(), list(pool.map(one, cases))
        outcomes = Counter(outcome.what for _, outcome, _ in done)
        failures = [f"{case}: {'; '.join(outcome.problems)[:400]}" for case, outcome, _ in done if outcome.problems]
        if done:
            print(f"# {command.name}, {kind}: {sum(cpu for *_, cpu in done):.0f} s of CPU", file=sys.stderr, flush=True)
            yield Row("writes", f"{command.name}: {kind}", outcomes, failures, time.monotonic() - began)


def _cases(kind: str, number: int, entries: Sequence[Entry], draw: random.Random) -> Iterator[Case]:
    """Yield at most `number` cases of a kind, spread over all events; a kill also after the last one."""
    last = max(entry.event for entry in entries)
    if kind in (ERROR, ERROR_KILL):
        for turn in range(number):
            error = list(FAILING)[turn % len(FAILING)]
            fitting = sorted({entry.event for entry in entries if entry.kind in FAILING[error]})
            piece = len(fitting) * turn // number, max(len(fitting) * turn // number + 1, len(fitting) * (turn + 1) // number)
            yield Case(kind, draw.choice(fitting[slice(*piece)]), turn, error, on=turn // len(FAILING) % 2 == 1)
        return
    events = list(range(1, last + 1 + (kind != SLOW)))
    count = min(number, len(events))
    for turn in range(count):
        yield Case(kind, draw.choice(events[len(events) * turn // count : len(events) * (turn + 1) // count]), turn)


def _writers_row(command: Command, path: Path, entries: Sequence[Entry]) -> Row:
    """Return a row on who made each change: base/files, or others in a temporary file or folder that it made and renames."""
    others = {entry.event: entry.other for entry in entries if entry.other}
    outcomes, failures, temporary = Counter[str](), list[str](), set[str]()
    for line in path.read_text().splitlines():
        event, kind, name, ours, where = json.loads(line)
        if ours:
            outcomes["base/files"] += 1
            if kind in "CD" and _hidden(name) == name:
                temporary.add(name)
            continue
        inside = [_hidden(each) in temporary for each in (name, others.get(event, "")) if each]
        if all(inside):
            outcomes["others in its temporary files and folders"] += 1
        else:
            outcomes["others elsewhere"] += 1
            failures.append(f"{kind} {name} by {' < '.join(reversed(where))}")
    return Row("writes", f"{command.name}: who writes", outcomes, failures)


def _hidden(path: str) -> str:
    """Return the part of a path up to the first temporary name of base/files, or nothing."""
    parts = path.split("/")
    ends = [number for number, part in enumerate(parts, 1) if part.startswith(".") and part.endswith(".partial")]
    return "/".join(parts[: ends[0]]) if ends else ""
