"""Every file that the product writes, by one module: what is to hold of all of them is said and done here alone.

`replace_file`, `replace_folder` and `work_folder` raise DiskFailed. The other functions raise the system's OSError; they are
called within `lite_dil.base.disk.writing`, which knows what the file is for.
"""

from __future__ import annotations

import glob
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

from lite_dil.base.disk import writing

# A new file or folder appears whole: it is made under a hidden name beside its own, then renamed.


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file, whole or not at all. Raises DiskFailed."""
    with writing(path), replacing(path) as part:
        write(part, content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the name of a file that takes the place of `path` when the block ends well, and is gone where it does not.

    For what opens its file itself, as libraries and other programs do.
    """
    _sweep(path)
    part = partial(path)
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _sweep(path: Path) -> None:
    """Remove what processes that were killed left of `path`."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        number = left.name.removesuffix(".partial").rpartition(".")[2]
        if number.isdecimal() and not _runs(int(number)):
            left.unlink(missing_ok=True)


def _runs(number: int) -> bool:
    """Return whether a process of this number runs, as far as can be told."""
    if os.name != "posix":
        return True
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def partial(path: Path) -> Path:
    """Return the name under which this process makes the file `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def replace_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Write a folder by `fill`, whole or not at all; the one that was there is not lost before. Raises DiskFailed."""
    new, old = (target.with_name(f".{target.name}.{what}") for what in ("partial", "old"))
    with writing(target):
        if old.exists() and not target.exists():  # a process was killed between the two renames below
            old.rename(target)
        try:
            for left in (new, old):
                shutil.rmtree(left, ignore_errors=True)
            new.mkdir(parents=True)
            fill(new)
            if target.exists():
                target.rename(old)
            new.rename(target)
        finally:
            if old.exists() and not target.exists():
                old.rename(target)
            for left in (new, old):  # what was not finished takes no room
                shutil.rmtree(left, ignore_errors=True)


@contextmanager
def work_folder(target: Path, what: str | Path = "", place: str = "") -> Iterator[Path]:
    """Give a new hidden folder on the disk of `target`, beside it, which is gone when the block ends.

    Raises DiskFailed of `what`, `target` where nothing is given, if it cannot be made; `place` as for `writing`.
    """
    with writing(what or target, place):
        make_folder(target.parent)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def scratch_file(folder: Path) -> IO[bytes]:
    """Return a file in `folder`, to write and read, that has no name and is gone when it is closed."""
    make_folder(folder)
    return tempfile.TemporaryFile(dir=folder)


# Files in a folder that is not in its place yet, or that nobody reads back.


def write(path: Path, content: str | bytes, sync: bool = False) -> None:
    """Write a file, text as UTF-8 with line feeds; with `sync` it is on the disk on return."""
    with create(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
        if sync:
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def create(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write it from its start, for libraries that stream; Python's own says why where it cannot be written."""
    with path.open("wb") as file:
        yield file


def copy(source: Path, target: Path) -> None:
    """Copy what a file holds, or a whole folder."""
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)


# Files that grow.


@contextmanager
def appending(path: Path, read: bool = False) -> Iterator[io.FileIO]:
    """Open a file for `append`, and with `read` to read it too."""
    with path.open("a+b" if read else "ab", buffering=0) as file:
        yield file


def append(file: io.FileIO, data: bytes, sync: bool = False) -> None:
    """Append all of `data`, or nothing, to a file of `appending`; with `sync` it is on the disk on return."""
    written = 0
    try:
        while written < len(data):  # a disk that is nearly full takes a part, and says why only the next time
            written += file.write(data[written:])
        if sync:
            os.fsync(file.fileno())
    except OSError:
        with suppress(OSError):
            if file.tell() == os.fstat(file.fileno()).st_size:  # nobody has added to it meanwhile
                file.truncate(file.tell() - written)
        raise


def cut(path: Path, size: int) -> None:
    """Cut a file down to its first `size` bytes."""
    os.truncate(path, size)


# Folders and names.


def make_folder(path: Path) -> None:
    """Make a folder and those above it, unless it is there."""
    path.mkdir(parents=True, exist_ok=True)


def move(source: Path, target: Path) -> None:
    """Give a file or folder another name on the same disk; a folder that holds something is not replaced."""
    source.rename(target)


def remove(path: Path) -> None:
    """Remove a file or link, unless it is gone, or a folder with all that it holds."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
