"""One case: a command that something happens to, the same command again, and what became of it."""

from __future__ import annotations

import errno
import random
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from soak.writes.commands import Command, no_keys
from soak.writes.journal import Disk, Entry, Tree, differences, read, tree_of, write_tree
from soak.writes.states import promised, rows_of, unlike, went_on
from soak.writes.warm import FAILING, Order, Warm

KILL, POWER, BOTH, ERROR, ERROR_KILL, SLOW = "kill", "power cut", "kill and power cut", "error", "error and kill", "slow"
_LINE = re.compile(r"^lite-dil: ", re.MULTILINE)


class Case(NamedTuple):
    """What happens at an event: `kind`, and a seed for all else. `error` is a number of errno; `on`: until the end."""

    kind: str
    event: int
    seed: int
    error: int = 0
    on: bool = False

    def __str__(self) -> str:
        error = f" {errno.errorcode[self.error]}{' from there on' if self.on else ''}" if self.error else ""
        return f"{self.kind}{error} at {self.event}, seed {self.seed}"


class Outcome(NamedTuple):
    """What became of a case in a word or two, and what went wrong, if anything."""

    what: str
    problems: list[str]


@dataclass
class Trial:
    """A command, and a folder in which it is run again and again.

    Attributes:
        made: a folder with a finished run, for commands that need one.
        reference: what the uninterrupted command left.
    """

    command: Command
    warm: Warm
    place: Path
    made: Path
    reference: Tree = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.place.mkdir(exist_ok=True)
        self.folder = self.place / "case"
        self.said = ""

    def begin(self) -> None:
        """Make the folder as it is before the command."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        if self.command.run:
            shutil.copytree(self.made / "run", self.folder / "run")
        self.said = ""

    def run(self, argv: list[str], **happens: Any) -> tuple[int | None, list[Entry]]:
        """Run a command; return its exit code and what it did."""
        out, journal = self.place / "said", self.place / "journal"
        out.unlink(missing_ok=True)
        keys = self.command.keys(self.folder)
        order = Order(argv, str(self.folder), str(out), str(journal), keys, **happens)
        code = self.warm.run(order)
        self.said += f"$ lite-dil {' '.join(argv)}\n{out.read_text(errors='replace')}\nexit code {code}\n"
        return code, read(journal)

    def uninterrupted(self, **happens: Any) -> list[Entry]:
        """Run the command to its end; return what it did. Raises RuntimeError if it fails."""
        self.begin()
        before = tree_of(self.folder)
        code, entries = self.run(self.command.argv, **happens)
        if code:
            raise RuntimeError(f"{self.command.name}: exit code {code}\n{self.said}")
        if missed := list(differences(Disk(self.folder, before, entries).now, tree_of(self.folder))):
            raise RuntimeError(f"{self.command.name}: these files were written past the layer: {', '.join(missed)}")
        return entries

    def again(self, draw: random.Random, **happens: Any) -> tuple[int | None, list[Entry]]:
        """Start the command as a user does afterwards."""
        argv = self.command.again[-1]
        if any((self.folder / "run" / "checkpoints").glob("step-*/progress.json")):
            argv = draw.choice(self.command.again)
        return self.run(argv, **happens)

    def take(self, case: Case) -> Outcome:
        """Carry out a case."""
        draw = random.Random(f"{self.command.name} {case}")
        self.begin()
        if case.kind == SLOW:
            self.run(self.command.argv, slow=1000)
            return self._judge("equal", [])
        if case.kind in (ERROR, ERROR_KILL):
            return self._fails(case, draw)
        return self._dies(case, draw)

    def _dies(self, case: Case, draw: random.Random) -> Outcome:
        """A kill or a power cut, or first the one and during what is started next the other."""
        problems, step = list[str](), 0
        order: dict[str, Any] = {"kill_at": case.event, "share": draw.choice([0, 0, 64, 200])}
        for power in {KILL: [False], POWER: [True], BOTH: draw.sample([False, True], 2)}[case.kind]:
            before = tree_of(self.folder)
            if step or problems or self.said:
                _, entries = self.again(draw, **order)
            else:
                _, entries = self.run(self.command.argv, **order)
            lost, promise = self._after(before, entries, power, draw)
            problems += lost
            step = max(step, promise)
            order["kill_at"] = draw.randint(1, max(2, case.event))
        said, now = self._start_again(draw, step, problems)
        how = "went on from a checkpoint, equal" if now else "equal"
        how = "from the checkpoint before" if "going back to" in said else how
        return self._judge(how, problems, cut=case.kind != KILL)

    def _after(self, before: Tree, entries: list[Entry], power: bool, draw: random.Random) -> tuple[list[str], int]:
        """Make the state after a kill or a power cut; return what is lost, and the step that must not be."""
        disk = Disk(self.folder, before, entries)
        state = tree_of(self.folder)
        problems = [f"{name} was written past the layer" for name in differences(disk.now, state)]
        if power:
            state = disk.after_power_cut(draw)
        for name in self.command.added:
            if lost := rows_of(disk.lasting() if power else disk.now, name, synced=power) - rows_of(state, name):
                problems.append(f"{len(lost)} rows of {name} are lost")
        if power:
            write_tree(state, self.folder)
        return problems, promised(entries, power)

    def _fails(self, case: Case, draw: random.Random) -> Outcome:
        """A failing disk, and perhaps a kill soon after."""
        share = draw.choice([0, 0, 100])
        until = 10**9 if case.on else case.event + bool(share)
        happens: dict[str, Any] = {"fail_from": case.event, "fail_until": until, "error": case.error, "share": share}
        if case.kind == ERROR_KILL:
            happens["kill_at"] = case.event + 1 + draw.randint(0, 3)
        code, entries = self.run(self.command.argv, failing=FAILING[case.error], **happens)
        problems = []
        if code not in (0, 2) and not (case.kind == ERROR_KILL and code == -9):
            problems.append(f"exit code {code}")
        if code == 2 and len(_LINE.findall(self.said)) != 1:
            problems.append("not one message")
        self._start_again(draw, promised(entries, power=False), problems)
        how = {0: "ended without, equal", 2: "one message, then equal"}.get(code or 0, "killed, then equal")
        return self._judge(how, problems, leave="-" if code else "cache")

    def _start_again(self, draw: random.Random, step: int, problems: list[str]) -> tuple[str, int]:
        """Start the command again; return what it says, and the step after which it goes on, at least `step`."""
        mark = len(self.said)
        code, _ = self.again(draw)
        said = self.said[mark:]
        # An export that was killed after its end is there, whole.
        if code and not (code == 2 and self.command.argv[0] == "export" and "out already exists" in said):
            problems.append(f"started again, exit code {code}")
        if (now := went_on(said)) < step:
            problems.append(f"step {step} was saved, and it went on after step {now}")
        return said, now

    def _judge(self, what: str, problems: list[str], leave: str = "-", cut: bool = False) -> Outcome:
        """Compare the folder with the uninterrupted command's."""
        if "Traceback" in self.said:
            problems.append("a traceback")
        if "exit code None" in self.said:
            problems.append("hung")
        if self.command.keys is not no_keys and "its last line was cut off and is removed" in self.said:
            # Of two rows of one choice the first is whole: it is kept, that is said, and another choice follows.
            what, leave = "said, with a part of the choice", "labels"
        problems += unlike(self.reference, tree_of(self.folder), leave, cut)
        return Outcome("failed" if problems else what, problems)


def keep(trial: Trial, case: Case, problems: list[str], folder: Path) -> None:
    """Keep what a failed case said."""
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "-", f"{trial.command.name} {case}")
    (folder / f"{name}.txt").write_text("\n".join([*problems, "", trial.said]), encoding="utf-8")
