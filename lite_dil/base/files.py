"""All writing of files goes through this module, so that its guarantees hold for every file.

`replace_file`, `replace_folder` and `work_folder` raise DiskFailed. The other functions raise OSError and are called within
`lite_dil.base.disk.writing`, which knows what the file is for.
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

# A new file or folder appears complete or not at all: it is written under a hidden name next to its own, then renamed.


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file completely or not at all. Raises DiskFailed."""
    with writing(path), replacing(path) as part:
        write(part, content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` when the block succeeds and is deleted when it fails.

    For libraries and programs that open the file themselves.
    """
    _sweep(path)
    part = partial(path)
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _sweep(path: Path) -> None:
    """Remove the temporary files of `path` that killed processes left."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        number = left.name.removesuffix(".partial").rpartition(".")[2]
        if number.isdecimal() and not _runs(int(number)):
            left.unlink(missing_ok=True)


def _runs(number: int) -> bool:
    """Return whether a process with this id is running, as far as this system can tell."""
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
    """Return the temporary name under which this process writes `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def replace_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Write a folder by `fill`, completely or not at all; an existing one is kept until then. Raises DiskFailed."""
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
            for left in (new, old):  # leave nothing unfinished
                shutil.rmtree(left, ignore_errors=True)


@contextmanager
def work_folder(target: Path, what: str | Path = "", place: str = "") -> Iterator[Path]:
    """Yield a new hidden folder next to `target`, on its disk, that is deleted when the block ends.

    Raises DiskFailed, about `what` or by default `target`, if it cannot be made; `place` as for `writing`.
    """
    with writing(what or target, place):
        make_folder(target.parent)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def scratch_file(folder: Path) -> IO[bytes]:
    """Return an unnamed file in `folder`, to write and read, that is deleted when closed."""
    make_folder(folder)
    return tempfile.TemporaryFile(dir=folder)


# Files in a folder that is renamed later, or that are never read back.


def write(path: Path, content: str | bytes, sync: bool = False) -> None:
    """Write a file, text as UTF-8 with line feeds; with `sync` it is on disk on return."""
    with create(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
        if sync:
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def create(path: Path) -> Iterator[BinaryIO]:
    """Open a new file for a library that streams into it; Python's own open says why a file cannot be written."""
    with path.open("wb") as file:
        yield file


def copy(source: Path, target: Path) -> None:
    """Copy a file's content, or a whole folder."""
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)


# Files that grow.


@contextmanager
def appending(path: Path, read: bool = False) -> Iterator[io.FileIO]:
    """Open a file for `append`; with `read`, for reading too."""
    with path.open("a+b" if read else "ab", buffering=0) as file:
        yield file


def append(file: io.FileIO, data: bytes, sync: bool = False) -> None:
    """Append all of `data`, or nothing, to a file from `appending`; with `sync` it is on disk on return."""
    written = 0
    try:
        while written < len(data):  # a nearly full disk takes a part, and raises only at the next write
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
