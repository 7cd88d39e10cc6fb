"""Kills, power cuts and failing disks at the writes of every command, each followed by the same command again.

The libraries are loaded once, in two processes that fork for each case. Linux with a C compiler only.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue

from soak.row import Row
from soak.writes.cases import BOTH, ERROR, ERROR_KILL, KILL, POWER, SLOW, Case, Outcome, Trial, keep
from soak.writes.commands import Command, commands
from soak.writes.journal import Entry, Tree, tree_of
from soak.writes.states import unlike
from soak.writes.warm import FAILING, NotHere, Warm, build

WRITERS, TWICE = "who writes", "twice the same"
# How many cases of each kind a command has: spread over all that it writes, and of kills at most one for each.
LONG = {KILL: 100, POWER: 120, BOTH: 16, ERROR: 64, ERROR_KILL: 16, SLOW: 1}
SHORT = {KILL: 2, POWER: 2, BOTH: 1, ERROR: 1, ERROR_KILL: 1}
IN_SHORT = ("train, cpu", "train, mlx", "label, cpu", "export --format gguf")
# What each kind is, in the table.
TEXTS = {
    WRITERS: "who changes the folder",
    TWICE: "the same command twice",
    KILL: "a kill at a write",
    POWER: "a power cut at a write",
    BOTH: "a kill and a power cut, one of them during what was started next",
    ERROR: "a write that fails (ENOSPC, EDQUOT, EROFS, EIO; one, or all from there on)",
    ERROR_KILL: "a write that fails, and a kill right after",
    SLOW: "a slow disk",
}


class _Found:
    """What became of the cases of one kind, over all commands."""

    def __init__(self) -> None:
        self.outcomes, self.failures, self.commands, self.seconds = Counter[str](), list[str](), list[str](), 0.0

    def add(self, command: str, outcomes: Iterable[str], failures: Iterable[str], seconds: float = 0.0) -> None:
        counted = Counter(outcomes)
        self.outcomes += counted
        self.failures += [f"{command}, {failure}" for failure in failures]
        self.commands.append(f"{command} {counted.total()}")
        self.seconds += seconds


def rows(output: Path, *, short: bool) -> Iterator[Row]:
    """Yield a row for each kind of case, with the CPU seconds of its cases."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    try:
        layer = build(output)
    except NotHere as reason:
        print(f"writes: left out, {reason}", file=sys.stderr)
        return
    found: dict[str, _Found] = defaultdict(_Found)
    with ExitStack() as stack:
        servers = [Warm(layer, output / f"server-{number}.txt") for number in range(1 if short else 2)]
        for server in servers:
            stack.callback(server.close)
        servers[0].make(output)
        for command in commands(output):
            if not short or command.name in IN_SHORT:
                _Commanded(command, output, servers).take(SHORT if short else LONG, found)
    for kind, each in found.items():
        what = f"{TEXTS[kind]}: {'; '.join(each.commands)}"
        yield Row("writes", what, each.outcomes, each.failures, round(each.seconds, 1))


class _Commanded:
    """One command and its cases."""

    def __init__(self, command: Command, output: Path, servers: Sequence[Warm]) -> None:
        self.command, self.output, self.servers = command, output, servers
        self.free: SimpleQueue[Warm] = SimpleQueue()
        for server in servers:
            self.free.put(server)

    def take(self, most: dict[str, int], found: dict[str, _Found]) -> None:
        """Run the command to its end twice, then all cases."""
        first, name = self._trial(self.servers[0]), self.command.name
        writers = self.output / "writers"
        writers.unlink(missing_ok=True)
        entries = first.uninterrupted(writers=str(writers))
        reference = tree_of(first.folder)
        if not first.made.exists():
            shutil.copytree(first.folder, first.made)
        found[WRITERS].add(name, *_writers(writers, entries))
        first.uninterrupted()
        differs = list(unlike(reference, tree_of(first.folder)))
        found[TWICE].add(name, ["failed" if differs else "equal"], differs)
        with ThreadPoolExecutor(len(self.servers)) as pool:
            for kind, number in most.items():
                cases = list(_cases(kind, number, entries, random.Random(f"{name} {kind}")))
                done = list(pool.map(lambda case: self._one(case, reference), cases))
                failures = [f"{case}: {'; '.join(outcome.problems)[:300]}" for case, outcome, _ in done if outcome.problems]
                seconds = sum(cpu for *_, cpu in done)
                found[kind].add(name, [outcome.what for _, outcome, _ in done], failures, seconds)
                print(f"# {name}, {kind}: {len(done)} cases, {seconds:.0f} s of CPU", file=sys.stderr, flush=True)
                for failure in failures:
                    print(f"#   {failure}", file=sys.stderr, flush=True)

    def _trial(self, server: Warm, reference: Tree | None = None) -> Trial:
        place = self.output / f"place-{self.servers.index(server)}"
        place.mkdir(exist_ok=True)
        return Trial(self.command, server, place, self.output / "made", reference or {})

    def _one(self, case: Case, reference: Tree) -> tuple[Case, Outcome, float]:
        server = self.free.get()
        try:
            before, trial = server.cpu, self._trial(server, reference)
            outcome = trial.take(case)
            if outcome.problems:
                keep(trial, case, outcome.problems, self.output / "failed")
            return case, outcome, server.cpu - before
        finally:
            self.free.put(server)


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
