"""The tokens of data sets in the user's cache folder, so that each is read and tokenised once, not at every start."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lite_dil.base.disk import DiskFailed, writing
from lite_dil.base.files import mark_used, remove
from lite_dil.base.formats import KEY, STORE
from lite_dil.base.hashing import blake2, file_pieces, sha256
from lite_dil.base.version import __version__
from lite_dil.data.encoder import Encoder
from lite_dil.data.options import DataOptions
from lite_dil.data.rows import DATA, Rows
from lite_dil.data.sources import files_of, split_sources
from lite_dil.data.store import PLACE, DamagedStore, ExampleStore, opened
from lite_dil.models.find import cache_dir

SMALL = 2**20  # bytes of data; fewer are read again in less time than this takes
# Of files that no run has opened for so long, and of the least used ones beyond so many bytes, the cache is freed.
_DAYS, _MOST = 30, 20 * 2**30
_ENDING = ".tokens"

Say = Callable[[str], None]


class TokenCache:
    """The place of one data set's tokens.

    Args:
        data, split, encoder, options, margins: as for `lite_dil.data.dataset.load`.

    Attributes:
        path: the file; None if the data is small, or not known by its content before it is read: data of the hub, an iterator.
    """

    def __init__(self, data: str | Rows, split: str, encoder: Encoder, options: DataOptions, margins: bool = False) -> None:
        self._files = [] if isinstance(data, Rows) else _files(data, split)
        self._seen = list(map(_stat, self._files))
        self.path = None
        content = _content(data, self._files, split)
        if content is None:
            return
        read = {name: getattr(options, name) for name in ("max_length", "data_format", "columns", "chat", "max_rows")}
        self._key = {KEY: STORE, "code": _code(), "content": content, "encoder": encoder.identity(), **read}
        self._key["margins"] = margins
        name = blake2([json.dumps(self._key, sort_keys=True).encode()]).hex()
        self.path = cache_dir() / "tokens" / f"{name}{_ENDING}"

    def find(self, say: Say) -> tuple[ExampleStore, Any] | None:
        """Return the examples and the facts that an earlier run kept; None if there are none, or if they are damaged."""
        if self.path is None:
            return None
        try:
            store, facts = opened(self.path)
            if facts["key"] != self._key:  # another data set's file under this one's name
                raise DamagedStore(self.path)
            with suppress(OSError):
                mark_used(self.path)
        except FileNotFoundError:
            return None
        except (DamagedStore, OSError, ValueError, KeyError, TypeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not as it was written"
            say(f"{self.path} cannot be used ({why}): the data is read and tokenised again")
            return None
        return store, facts["read"]

    def keep(self, store: ExampleStore, read: Any, say: Say) -> ExampleStore:
        """Write the examples, with `read` on how they were read, for later runs; return them from the file.

        Nothing is kept of files that were changed meanwhile. If the disk fails, that is said, and the run goes on.
        """
        if self.path is None or not len(store) or list(map(_stat, self._files)) != self._seen:
            return store
        try:
            store.keep(self.path, {"key": self._key, "read": read})
            _free(self.path)
        except DiskFailed as error:
            say(f"{error}. Continuing: the next run reads and tokenises the data again")
            return store
        found = self.find(say)
        return found[0] if found else store


def _files(data: str, split: str) -> list[Path]:
    found = [files_of(name, split) for name, _ in split_sources(data)]
    return [path for files in found for path in files or []]


def _content(data: str | Rows, files: list[Path], split: str) -> Any:
    """Return what tells data from other data, or None if it is small or cannot be known."""
    if isinstance(data, Rows):
        digest = data.digest(SMALL)
        return digest and [[DATA, digest]]
    names = [name for name, _ in split_sources(data)]
    if any(files_of(name, split) is None for name in names):
        return None
    try:
        if sum(path.stat().st_size for path in files) < SMALL:
            return None
        return [[names, split], [[str(path), sha256(file_pieces(path))] for path in files]]
    except OSError:  # reading will say it
        return None


def _stat(path: Path) -> Any:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def _code() -> Any:
    """Return what stands for the code that reads, lays out and tokenises rows, so that no other version's tokens are taken."""
    import jinja2
    import tokenizers
    import transformers

    own = sorted(Path(__file__).parent.glob("*.py"))
    digest = sha256(path.read_bytes() for path in own)
    return [__version__, digest, *(module.__version__ for module in (jinja2, tokenizers, transformers))]


def _free(kept: Path) -> None:
    """Remove what no run has opened for a month, and the least used files beyond a limit of size; never `kept`."""
    files = []
    for path in kept.parent.glob(f"*{_ENDING}"):
        with suppress(OSError):  # another process has removed it
            files.append((path.stat().st_mtime, path.stat().st_size, path))
    total = 0
    for used, size, path in sorted(files, reverse=True):
        total += size
        if path != kept and (total > _MOST or time.time() - used > _DAYS * 86400):
            with writing(path, PLACE), suppress(PermissionError):  # Windows keeps an open file
                remove(path)
