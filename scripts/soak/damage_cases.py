"""Every damage to every file of a world, what reads the file, and what became of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from soak.damage_world import World
from soak.damages import Damage, damages

# What reads each file: patterns of paths in the world, with the commands; the first of them gets the most cases.
READERS = (
    ("run/checkpoints/step-2/*", ("whole", "resume")),
    ("run/checkpoints/*", ()),  # of the checkpoint before, to which a damaged one falls back
    ("run/*", ("resume",)),
    ("done/adapter/*", ("generate", "export", "merge", "train on")),
    ("done/config.yaml", ("runs", "report", "generate", "export")),
    ("done/checkpoints/step-3/digests.json", ("runs", "report")),
    ("done/checkpoints/step-3/progress.json", ("runs", "report")),
    ("done/checkpoints/*", ()),
    ("done/*", ("report", "runs", "resume finished")),
    ("sampled.jsonl", ("train",)),
    ("cache/rates.json", ("plan",)),
    ("cache/*", ("train", "resume")),
    ("answers.jsonl", ("generate on",)),
    ("labels*.jsonl", ("label",)),
    ("compared/runs/*/result.json", ("compare",)),
    ("compared/runs/*/samples.jsonl", ("compare",)),
    ("compared/runs/*/metrics.jsonl", ("compare",)),
    ("compared/runs/*/report.json", ("compare",)),
    ("compared/runs/*", ()),  # as those of other runs; a comparison that is done does not read them
    ("compared/*", ("compare",)),
)
# Of these another file of the same kind gets the most cases.
TWINS = ("run/report.json", "run/report_samples.jsonl", "run/held_out_pairs.json", "compared/runs/dpo-seed1/")
# Written for people and other programs; lite-dil does not read them.
NOT_READ = (".md", ".html", ".png", "table.json", "curves.json")
# What may be missing, so that a command goes on without it: reports are written where there is room for them.
OPTIONAL = ("done/report_samples.jsonl", "done/held_out_pairs.json", "done/report.json", "cache/rates.json")
# People write and edit these: what still has the right form is taken as theirs.
EDITED = ("labels.jsonl", "labels.bad.jsonl")
# A list of runs says so of a damaged one, and then which of its files do not fit each other.
_LISTED: dict[bool, tuple[str, ...]] = {True: ('"state": "damaged"',), False: ()}
# Commands whose cases take longest.
TRAIN = {"resume", "resume finished", "train", "train on", "compare"}
# Bits flipped in a file, for the first command that reads it, and for others; most files are the same on both backends.
FLIPS = {"cpu": (50, 5), "mlx": (8, 2)}
SHORT = {"cpu": 24, "mlx": 8}  # cases of the short form


def cases(world: World, wanted: Callable[[str], bool]) -> Iterator[dict[str, Any]]:
    """Go through the files of a world whose paths are `wanted`; yield what became of each case."""
    found = [each for each in _cases(world) if wanted(each[0])]
    for path, name, what, damage in found[:: len(found) // SHORT[world.backend] if world.short else 1]:
        yield case(world, path, name, what, damage)


def _cases(world: World) -> Iterator[tuple[str, str, str, Damage]]:
    """Yield each damage to each file for each command that reads it."""
    made = world.root / "made"
    for path in sorted(path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file()):
        if path.endswith((*NOT_READ, ".lock")):
            continue
        names: tuple[str, ...] = next(names for pattern, names in READERS if _matches(path, pattern))
        for name in names:
            most = name == names[0] and not path.startswith(TWINS) and (world.backend == "cpu" or name not in TRAIN)
            for what, damage in damages(made / path, world.other / path, FLIPS[world.backend][not most]):
                # The flips of sealed files are left to `whole`, which is the part of resuming that reads them.
                if not ("flipped" in what and name == "resume" and "/checkpoints/" in path):
                    yield path, name, what, damage


def _matches(path: str, pattern: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), path) is not None


def case(world: World, path: str, name: str, what: str, damage: Damage) -> dict[str, Any]:
    """Damage a file, run a command, and return what became of it."""
    (whole, said), command = world.undamaged(name), world.commands[name]
    world.fresh()
    damaged = world.here / path
    damage(damaged)
    ended = world.run(command.work)
    anew = [line for line in ended.said.splitlines() if _figureless(line) not in {_figureless(old) for old in said}]
    named = any(text in line for line in anew for text in (damaged.name, str(damaged.parent), *_LISTED[name == "runs"]))
    failure = ""
    if ended.code is None:
        outcome = failure = "took longer than a minute"
    elif "Traceback" in ended.said or ended.code not in (0, 2):
        outcome = failure = f"ended with {ended.code}"
    elif ended.code == 2:
        outcome = "refused"
        failure = "" if named else "refused without naming the file"
    else:
        try:
            same = command.result(world.here) == whole
        except (OSError, ValueError) as error:
            same, named, anew = False, False, [repr(error)]
        outcome = ("said, and equal" if named else "equal") if same else "said, and went on with what is whole"
        if not same and not named:
            outcome, failure = _unsaid(path, what)
    if failure:
        failure = f"{path}, {what}, {name}: {failure}: {' | '.join(anew[-3:])}"
    return {
        "backend": world.backend,
        "command": name,
        "path": path,
        "outcome": outcome,
        "failure": failure,
        "seconds": ended.seconds,
        "cpu": ended.cpu,
    }


def _unsaid(path: str, what: str) -> tuple[str, str]:
    """Return the outcome of what came out otherwise and was not said, and why it is a failure, if it is one."""
    if path in OPTIONAL and what == "deleted":
        return "goes on without it", ""
    if path == "cache/rates.json":
        return "measured anew", ""
    if path in EDITED:
        return "taken as edited", ""
    return "silently wrong", "silently wrong"


def _figureless(line: str) -> str:
    return re.sub(r"[\d.]+", "0", line)
