"""Kills, power cuts and failing disks at the writes of every command, each followed by the same command again.

The libraries are loaded once, in a process that forks for each case. Linux with a C compiler only.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from soak.row import Row
from soak.writes.cases import BOTH, ERROR, ERROR_KILL, KILL, POWER, SLOW, Case, Trial, keep
from soak.writes.commands import Command, commands
from soak.writes.journal import Entry, tree_of
from soak.writes.states import unlike
from soak.writes.warm import FAILING, NotHere, Warm, build

WRITERS, TWICE = "who changes the folder", "the same command twice"
# How many cases of each kind a command has: spread over all that it writes, and of kills at most one for each.
LONG = {KILL: 21, POWER: 21, BOTH: 3, ERROR: 8, ERROR_KILL: 2, SLOW: 1}
SHORT = {KILL: 2, POWER: 2, BOTH: 1, ERROR: 1, ERROR_KILL: 1}
IN_SHORT = ("train, cpu", "train, mlx", "label, cpu", "export --format gguf")
# What each kind is, in the table.
TEXTS = {
    KILL: "a kill at a write",
    POWER: "a power cut at a write",
    BOTH: "a kill and a power cut, one of them during what was started next",
    ERROR: "a write that fails (ENOSPC, EDQUOT, EROFS, EIO; one, or all from there on)",
    ERROR_KILL: "a write that fails, and a kill right after",
    SLOW: "a slow disk",
}


def pieces(*, short: bool) -> list[str]:
    """Return the commands' names."""
    return list(IN_SHORT) if short else [command.name for command in commands(Path())]


@contextmanager
def opened(output: Path, *, short: bool) -> Iterator[Callable[[str], Iterator[Row]]]:
    """Give a function that yields the rows of a command's cases; it yields none where they cannot be run."""
    try:
        layer = build(output)
    except NotHere as reason:
        print(f"writes: left out, {reason}", file=sys.stderr)
        yield lambda name: iter(())
        return
    server = Warm(layer, output / "server.txt")
    try:
        server.make(output)
        named = {command.name: command for command in commands(output)}
        first = Trial(named["train, cpu"], server, output / "place", output / "made")
        first.uninterrupted()
        shutil.copytree(first.folder, first.made)
        yield lambda name: _rows(named[name], server, output, SHORT if short else LONG)
    finally:
        server.close()


def _rows(command: Command, server: Warm, output: Path, most: dict[str, int]) -> Iterator[Row]:
    """Run the command to its end twice, then all cases."""
    trial = Trial(command, server, output / "place", output / "made")
    (writers := output / "writers").unlink(missing_ok=True)
    before = server.cpu
    entries = trial.uninterrupted(writers=str(writers))
    reference = tree_of(trial.folder)
    outcomes, failures = _writers(writers, entries)
    yield Row("writes", WRITERS, Counter(outcomes), failures, server.cpu - before, command.name)
    before = server.cpu
    trial.uninterrupted()
    differs = list(unlike(reference, tree_of(trial.folder)))
    yield Row("writes", TWICE, Counter(["failed" if differs else "equal"]), differs, server.cpu - before, command.name)
    trial.reference = reference
    for kind, number in most.items():
        found, failures, before = Counter[str](), list[str](), server.cpu
        for case in _cases(kind, number, entries, random.Random(f"{command.name} {kind}")):
            outcome = trial.take(case)
            found[outcome.what] += 1
            if outcome.problems:
                failures.append(f"{case}: {'; '.join(outcome.problems)[:300]}")
                keep(trial, case, outcome.problems, output.parent / "failed")
                print(f"{command.name}, {failures[-1]}", file=sys.stderr, flush=True)
        yield Row("writes", TEXTS[kind], found, failures, round(server.cpu - before, 1), command.name)


def _cases(kind: str, number: int, entries: Sequence[Entry], draw: random.Random) -> Iterator[Case]:
    """Yield `number` cases of a kind, spread over all events; of a kill or power cut also one after the last."""
    last = max(entry.event for entry in entries)
    if kind in (ERROR, ERROR_KILL):
        for turn in range(number):
            error = list(FAILING)[turn % len(FAILING)]
            fitting = sorted({entry.event for entry in entries if entry.kind in FAILING[error]})
            piece = len(fitting) * turn // number, max(len(fitting) * turn // number + 1, len(fitting) * (turn + 1) // number)
            yield Case(kind, draw.choice(fitting[slice(*piece)]), turn, error, on=turn // len(FAILING) % 2 == 1)
        return
    events = list(range(1, last + 1 + (kind != SLOW)))
    count = min(number, len(events)) if kind == KILL else number
    for turn in range(count):
        start = len(events) * turn // count
        yield Case(kind, draw.choice(events[start : max(start + 1, len(events) * (turn + 1) // count)]), turn)


def _writers(path: Path, entries: Sequence[Entry]) -> tuple[list[str], list[str]]:
    """Return who made each change, and those made past base/files, except in temporary files and folders that it renames."""
    others = {entry.event: entry.other for entry in entries if entry.other}
    outcomes, failures, temporary = list[str](), list[str](), set[str]()
    for line in path.read_text().splitlines():
        event, kind, name, ours, where = json.loads(line)
        if ours and kind in "CD" and _hidden(name) == name:
            temporary.add(name)
        inside = all(_hidden(each) in temporary for each in (name, others.get(event, "")) if each)
        outcomes.append(
            "base/files" if ours else "others in its temporary files and folders" if inside else "others elsewhere"
        )
        if not ours and not inside:
            failures.append(f"{kind} {name} by {' < '.join(reversed(where))}")
    return outcomes, failures


def _hidden(path: str) -> str:
    """Return the part of a path up to the first temporary name of base/files, or nothing."""
    parts = path.split("/")
    ends = [number for number, part in enumerate(parts, 1) if part.startswith(".") and part.endswith(".partial")]
    return "/".join(parts[: ends[0]]) if ends else ""
