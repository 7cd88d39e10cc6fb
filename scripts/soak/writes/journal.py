"""What a process did to a folder, as layer.c noted it, and the states that a power cut may leave of it.

A file system promises little of what was not synced. Of a file's content any first part may be there, with bytes torn or
zeroed; of a folder's names, any first part of the changes since the folder itself was synced. Syncing a file does not keep its
name.
"""

from __future__ import annotations

import random
import shutil
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

_HEAD = struct.Struct("<qqqiiII")
NAMES = "CDUXRL"  # changes of names; the others are of content


class Entry(NamedTuple):
    """A change: its letter as in layer.c, the file's number, paths, a place or length in the file, and the bytes written."""

    event: int
    kind: str
    file: int
    path: str
    other: str
    at: int
    data: bytes


def read(path: Path) -> list[Entry]:
    """Return the entries of a journal."""
    content, start, found = path.read_bytes(), 0, []
    while start < len(content):
        event, at, length, kind, file, one, two = _HEAD.unpack_from(content, start)
        start += _HEAD.size
        names = content[start : start + one].decode(), content[start + one : start + one + two].decode()
        start += one + two
        data = content[start : start + length] if chr(kind) == "W" else b""
        start += len(data)
        found.append(Entry(event, chr(kind), file, *names, at, data))
    return found


@dataclass
class File:
    """A file's content: as it was last synced, and the changes since."""

    synced: bytes = b""
    changes: list[Entry] = field(default_factory=list)

    def content(self, changes: Sequence[Entry] | None = None) -> bytes:
        """Return the content after some of the changes, by default all."""
        content = bytearray(self.synced)
        for change in self.changes if changes is None else changes:
            if change.kind == "T":
                del content[change.at :]
                content.extend(bytes(change.at - len(content)))
            else:
                content.extend(bytes(max(0, change.at - len(content))))
                content[change.at : change.at + len(change.data)] = change.data
        return bytes(content)


Tree = dict[str, File | None]  # by path; None is a folder


def tree_of(root: Path) -> Tree:
    """Return what is in a folder, as synced."""
    found = ((path, path.relative_to(root).as_posix()) for path in sorted(root.rglob("*")))
    return {name: None if path.is_dir() else File(path.read_bytes()) for path, name in found}


class Disk:
    """A folder as a process changed it: `before` is what was there, all of it synced."""

    def __init__(self, root: Path, before: Tree, entries: Sequence[Entry]) -> None:
        self.root = f"{root}/"
        self._start = dict(before)
        self._files: dict[int, File] = {}
        self._names: list[tuple[Entry, bool]] = []  # the changes of names, and whether they are synced
        now = dict(before)
        for entry in entries:
            self._take(entry, now)
        self.now = now

    def _take(self, entry: Entry, now: Tree) -> None:
        if entry.kind == "O":
            self._files.setdefault(entry.file, now[self._inner(entry.path)] or File())
        elif entry.kind == "C":
            self._files[entry.file] = File()
        elif entry.kind in "WT":
            self._files[entry.file].changes.append(entry)
        elif entry.kind == "F":
            file = self._files[entry.file]
            file.synced, file.changes = file.content(), []
        elif entry.kind == "G":
            self._names = [(each, kept or entry.path in _folders(each)) for each, kept in self._names]
        elif entry.kind == "M":
            raise ValueError(f"{entry.path} is written through a memory map, which this layer does not see")
        if entry.kind in NAMES and entry.path:
            self._names.append((entry, False))
            self._rename(entry, now)

    def _rename(self, entry: Entry, names: Tree) -> None:
        """Apply a change of names."""
        if entry.kind == "L":
            raise ValueError(f"{entry.path}: a link")
        path = self._inner(entry.path)
        if entry.kind == "C":
            names[path] = self._files[entry.file]
        elif entry.kind == "D":
            names[path] = None
        elif entry.kind in "UX":
            names.pop(path, None)
        elif path in names:
            target = self._inner(entry.other)
            for name in [name for name in names if name == target or name.startswith(f"{target}/")]:
                del names[name]
            for name in [name for name in names if name == path or name.startswith(f"{path}/")]:
                names[target + name[len(path) :]] = names.pop(name)

    def lasting(self) -> Tree:
        """Return the names that a power cut leaves in any case."""
        names = dict(self._start)
        for entry, kept in self._names:
            if kept:
                self._rename(entry, names)
        return names

    def _inner(self, path: str) -> str:
        return path.removeprefix(self.root)

    def after_power_cut(self, draw: random.Random) -> Tree:
        """Return one of the states that a power cut may leave now."""
        folders = {folder for entry, _ in self._names for folder in _folders(entry)}
        pending = {folder: [e for e, kept in self._names if not kept and folder in _folders(e)] for folder in sorted(folders)}
        if draw.random() < 0.3:  # in the order in which they were made, as with a journal of the file system's own
            left = [entry for entry, kept in self._names if not kept]
            first = set(map(id, left[: draw.randint(0, len(left))]))
        else:
            cuts = {folder: set(map(id, some[: draw.randint(0, len(some))])) for folder, some in pending.items()}
            first = {id(e) for e, kept in self._names if not kept and all(id(e) in cuts[folder] for folder in _folders(e))}
        names = dict(self._start)
        for entry, kept in self._names:
            if kept or id(entry) in first:
                self._rename(entry, names)
        while lost := [name for name in names if "/" in name and name.rpartition("/")[0] not in names]:
            for name in lost:  # its folder's own name is not there
                del names[name]
        lasting: dict[int, File] = {}
        return {
            name: None if file is None else lasting.setdefault(id(file), File(_torn(file, draw)))
            for name, file in names.items()
        }


def _folders(entry: Entry) -> list[str]:
    """Return the folders whose lists of names an entry changes."""
    return [path.rpartition("/")[0] for path in (entry.path, entry.other) if path]


def _torn(file: File, draw: random.Random) -> bytes:
    """Return what a power cut may leave of a file's content."""
    changes = file.changes
    how = draw.choice(["kept", "lost", "torn", "zeroed"]) if changes else "kept"
    if how == "kept":
        return file.content()
    if how == "lost":
        return file.synced
    if how == "zeroed":  # the length is there, the bytes are not
        return file.synced[: len(file.content())] + bytes(max(0, len(file.content()) - len(file.synced)))
    number = draw.randrange(len(changes))
    last = changes[number]
    part = last._replace(data=last.data[: draw.randint(0, len(last.data))])
    return file.content([*changes[:number], part])


def write_tree(tree: Tree, root: Path) -> None:
    """Make a folder what `tree` says, and nothing else."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    for name, file in sorted(tree.items()):
        if file is None:
            (root / name).mkdir()
        else:
            (root / name).write_bytes(file.content())


def differences(one: Tree, other: Tree) -> Iterator[str]:
    """Yield what differs between two trees."""
    for name in sorted(one.keys() | other.keys()):
        sides = [None if (file := tree.get(name)) is None else file.content() for tree in (one, other)]
        if name not in one or name not in other or sides[0] != sides[1]:
            yield name
