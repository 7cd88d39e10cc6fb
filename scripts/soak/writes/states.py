"""What a command must have left: the same files as the uninterrupted one, except for what a clock decides."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from soak.writes.journal import Entry, File, Tree

# What a clock or the machine decides, in a line of metrics; a run that comes second finds the reference in the cache.
MEASURED = {"tokens_per_second", "examples_per_second", "seconds_per_step", "peak_memory_mb", "reference_passes"}
# Files that hold times besides what metrics.jsonl has, and a memo by the files' own times: they are there or not.
TIMED = {"report.html", "report.json", "rates.json", "files.json"}
_STEP = re.compile(r".*/checkpoints/step-(\d+)")
_WENT_ON = re.compile(r"(?:continuing after|the run is finished:) step (\d+)")


def unlike(reference: Tree, now: Tree, leave: str = "-", cut: bool = False) -> Iterator[str]:
    """Yield what differs from the uninterrupted command's folder; not below `leave`.

    After a power `cut` the cache may lack records that were not synced and that the rest of the run does not need.
    """
    for name in sorted(reference.keys() | now.keys()):
        if name.startswith(leave):
            continue
        if name not in reference:
            yield f"{name} is left over"
        elif name not in now:
            yield f"{name} is missing"
        else:
            one, other = _figures(name, reference[name]), _figures(name, now[name])
            if not (other <= one if cut and isinstance(other, set) else other == one):
                yield f"{name} differs"


def _figures(path: str, file: File | None) -> Any:
    """Return what of a file a clock does not decide."""
    if file is None:
        return None
    name, content = path.rpartition("/")[2], file.content()
    if name in TIMED:
        return bool(content)
    try:
        if name == "metrics.jsonl":
            lines = [json.loads(line) for line in content.splitlines()]
            return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]
        if name == "progress.json":  # it has the size and digest of metrics.jsonl
            return {**json.loads(content), "metrics": None}
        if name == "digests.json":
            found = json.loads(content)
            return found["options"], {**found["files"], "progress.json": None}
    except ValueError:
        return content
    if name.endswith(".logps"):  # records of 32 bytes, in any order; torn ones are ignored by who reads them
        records = {content[start : start + 32] for start in range(0, len(content), 32)}
        return {
            record
            for record in records
            if len(record) == 32 and zlib.crc32(record[:28]) == int.from_bytes(record[28:], "little")
        }
    return content


def promised(entries: Sequence[Entry], power: bool) -> int:
    """Return the newest step whose checkpoint was finished; before a power cut, also synced."""
    steps, waiting = [0], list[tuple[str, int]]()
    for entry in entries:
        if entry.kind == "R" and (found := _STEP.fullmatch(entry.other)):
            waiting.append((entry.other.rpartition("/")[0], int(found[1])))
        if entry.kind == "G" or not power:
            steps += [step for folder, step in waiting if not power or folder == entry.path]
    return max(steps)


def went_on(said: str) -> int:
    """Return the step after which a command says that it goes on, or 0."""
    found = _WENT_ON.search(said)
    return int(found[1]) if found else 0


def rows_of(tree: Tree, name: str, synced: bool = False) -> set[bytes]:
    """Return the whole lines of a file; of what was synced, if asked."""
    file = tree.get(name)
    content = b"" if file is None else file.synced if synced else file.content()
    return {line for line in content[: content.rfind(b"\n") + 1].split(b"\n") if line.strip(b"\0")}
