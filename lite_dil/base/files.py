"""All writing of files goes through this module, so that its guarantees hold for every file.

`replace_file`, `replace_folder` and `work_folder` raise DiskFailed. The other functions raise OSError and are called within
`lite_dil.base.disk.writing`, which knows what the file is for.
"""

from __future__ import annotations

import errno
import glob
import io
import os
import platform
import secrets
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

from lite_dil.base.disk import writing

HOST = f"{zlib.crc32(platform.node().encode()):08x}"  # stands for this computer's name in names of files
_DAY = 86400.0  # seconds
_FAILED = (errno.EIO, errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # the other errors of a sync: it is not offered

# A new file or folder appears complete or not at all, even if the power fails: it is written under a hidden name next to its
# own, flushed to the disk, and renamed.


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file completely or not at all. Raises DiskFailed."""
    with writing(path), replacing(path) as part:
        write(part, content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` when the block succeeds and is deleted when it fails.

    For libraries and programs that open the file themselves.
    """
    sweep(path)
    part = _partial(path)
    # A new file, through no link: its name cannot be known before.
    os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666))
    try:
        yield part
        sync(part)
        os.replace(part, path)
        sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def sweep(path: Path) -> None:
    """Remove the temporary files and folders of `path` that killed processes left.

    Whether a process of another computer still runs cannot be known: what one has left is removed when it is a day old.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        number, _, host = left.name.removeprefix(f".{path.name}.").partition(".")[0].partition("-")
        if number.isdecimal() and (_is_old(left) if host != HOST else not _runs(int(number))):
            _remove(left)


def _is_old(path: Path) -> bool:
    try:
        return time.time() - path.lstat().st_mtime > _DAY
    except OSError:  # its process has just removed it
        return False


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


def _partial(path: Path) -> Path:
    """Return a temporary name for this process to write `path` under."""
    return path.with_name(f".{path.name}.{os.getpid()}-{HOST}.{secrets.token_hex(4)}.partial")


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk and not only in the system's memory.

    A network drive may refuse this for folders, and Windows does not offer it: there only files are waited for.
    """
    if path.is_dir():
        if os.name != "posix":
            return
        try:
            with _opened(path, os.O_RDONLY) as folder:
                os.fsync(folder)
        except OSError as error:
            if error.errno in _FAILED:
                raise
    else:
        with _opened(path, os.O_RDWR) as file:
            _flush(file)


def _sync_all(folder: Path) -> None:
    """Wait for all files below a folder, and for the folders."""
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink():
            sync(path)


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    file = os.open(path, flags)
    try:
        yield file
    finally:
        os.close(file)


def _flush(file: int) -> None:
    """Write a file's content to its disk; on macOS fsync alone leaves it in the disk's own memory."""
    if sys.platform == "darwin":
        import fcntl

        with suppress(OSError):  # not every file system offers it
            fcntl.fcntl(file, fcntl.F_FULLFSYNC)
            return
    os.fsync(file)


def replace_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Write a folder by `fill`, completely or not at all; an existing one is kept until then. Raises DiskFailed."""
    new, old = _beside(target)
    with writing(target):
        recover(target)
        try:
            make_folder(target.parent)
            new.mkdir()
            fill(new)
            _sync_all(new)
            if target.exists():
                target.rename(old)
            new.rename(target)
            sync(target.parent)
        finally:
            if old.exists() and not target.exists():
                old.rename(target)
            for left in (new, old):  # leave nothing unfinished
                _remove(left)


def recover(target: Path) -> None:
    """Put right what a process left that was killed while it replaced or removed `target`."""
    new, old = _beside(target)
    if old.exists() and not target.exists():  # it was killed between the two renames of `replace_folder`
        old.rename(target)
    for left in (new, old):
        _remove(left)
    sweep(target)


def _beside(target: Path) -> tuple[Path, Path]:
    return target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.old")


def _remove(path: Path) -> None:
    """Remove what a killed process left, if it can be; a link, not what it points to."""
    if path.is_symlink() or not path.is_dir():
        with suppress(OSError):
            path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def finish(made: Path, target: Path) -> None:
    """Give what was made in a work folder its name, once all of it is on the disk; a folder that holds something is kept."""
    _sync_all(made)
    made.rename(target)
    sync(target.parent)


@contextmanager
def work_folder(target: Path, what: str | Path = "", place: str = "") -> Iterator[Path]:
    """Yield a new hidden folder next to `target`, on its disk, that is deleted when the block ends.

    Raises DiskFailed, about `what` or by default `target`, if it cannot be made; `place` as for `writing`.
    """
    with writing(what or target, place):
        make_folder(target.parent)
        sweep(target)
        folder = _partial(target)
        folder.mkdir(mode=0o700)
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
            _flush(file.fileno())


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
            _flush(file.fileno())
    except OSError:
        with suppress(OSError):
            if file.tell() == os.fstat(file.fileno()).st_size:  # nobody has added to it meanwhile
                file.truncate(file.tell() - written)
        raise


def mark_used(path: Path) -> None:
    """Set a file's time to now, by which files that nobody uses are told."""
    os.utime(path)


def cut(path: Path, size: int) -> None:
    """Cut a file down to its first `size` bytes."""
    os.truncate(path, size)


# Folders and names.


def make_folder(path: Path) -> None:
    """Make a folder and those above it, unless it is there; new names are on disk on return."""
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in new:
        sync(folder.parent)


def move(source: Path, target: Path) -> None:
    """Give a file or folder another name on the same disk; a folder that holds something is not replaced."""
    source.rename(target)


def remove(path: Path) -> None:
    """Remove a file or link, unless it is gone, or a folder with all that it holds.

    A folder gets a hidden name first, so that a killed process leaves none that looks whole; `sweep` removes it then.
    """
    if path.is_dir() and not path.is_symlink():
        path.rename(gone := _partial(path))
        shutil.rmtree(gone)
    else:
        path.unlink(missing_ok=True)


# A file that marks what one process alone writes. The system gives it back when the process ends, however that happens.


class AlreadyHeld(Exception):
    """Another process holds the file; its number is the text, if it could be read."""


def hold(path: Path) -> tuple[int, OSError | None]:
    """Open a marker file and lock it; return the open file, and the error of a file system that has no locks.

    Raises:
        AlreadyHeld: another process, or another call in this one, holds it.
        OSError: it cannot be written.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            _lock(file)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                return file, error
            holder = os.read(file, 20).decode(errors="replace").strip()
            os.close(file)
            raise AlreadyHeld(holder if holder.isdecimal() else "") from None
        # Its last holder may have removed the file between the two calls.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(path)):
                os.ftruncate(file, 0)
                os.write(file, f"{os.getpid()}\n".encode())
                return file, None
        os.close(file)


def give_back(file: int, path: Path) -> None:
    """Give back what `hold` returned. The file is removed while it is locked, so that nobody locks the removed one."""
    with suppress(OSError):  # Windows keeps an open file
        path.unlink()
    os.close(file)


def _lock(file: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        os.lseek(file, 2**30, os.SEEK_SET)  # behind the process's number, which others read
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        os.lseek(file, 0, os.SEEK_SET)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
