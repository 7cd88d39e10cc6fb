"""A durable cache of the reference's log-probs: computed once per response for all epochs, runs and losses."""

from __future__ import annotations

import json
import math
import struct
import time
import zlib
from pathlib import Path

import numpy as np

from lite_dil.base.disk import writing
from lite_dil.base.errors import UserError
from lite_dil.base.files import append, appending, make_folder, sync, write
from lite_dil.base.formats import CACHE, KEY, check_format
from lite_dil.base.hashing import blake2
from lite_dil.base.strict_json import parse_json
from lite_dil.batching.batch import Batch
from lite_dil.models.find import cache_dir
from lite_dil.models.fingerprint import reference_key
from lite_dil.models.options import AdapterOptions
from lite_dil.training.options import ReferenceOptions

# A digest of the token ids, the summed log-prob, the number of response tokens, and a checksum of the reference and the three:
# 32 bytes. Older versions left the reference out of the checksum.
_RECORD = struct.Struct("<16sdII")
_CHECKED = _RECORD.size - 4
SYNC_SECONDS = 30.0  # of computed log-probs are lost at most if the power fails


class ReferenceCache:
    """Summed log-probs of responses under one reference, in one append-only file.

    A damaged or half-written record is ignored and recomputed. Several runs may share a folder and append to a file at the
    same time.

    Args:
        folder: holds one file per reference; created if necessary. None keeps everything in memory.
        key: what the log-probs depend on besides the tokens; see `reference_key`.

    Attributes:
        damaged: records that were ignored.
        found: responses that were known before this run.
    """

    def __init__(self, folder: Path | None, key: dict[str, str]) -> None:
        self.known: dict[bytes, tuple[float, int]] = {}
        self.damaged = self.found = 0
        self.failed = False
        self.path: Path | None = None
        self._unsynced, self._synced_at = False, time.monotonic()
        if folder is None:
            return
        name = blake2([json.dumps(key, sort_keys=True).encode()], size=10).hex()
        self.path = folder / f"{name}.logps"
        try:
            make_folder(folder)
            _describe(folder / f"{name}.json", key)
            content = self.path.read_bytes() if self.path.exists() else b""
            if torn := len(content) % _RECORD.size:  # a run was killed while writing
                self._append(bytes(_RECORD.size - torn))
        except OSError as error:
            raise UserError(f"--reference-cache {folder}: cannot be used ({error})") from None
        for start in range(0, len(content) - torn, _RECORD.size):
            digest, logps, tokens, checksum = _RECORD.unpack_from(content, start)
            record = content[start : start + _CHECKED]
            if checksum in (self._checksum(record), zlib.crc32(record)) and math.isfinite(logps):
                self.known.setdefault(digest, (logps, tokens))
            else:
                self.damaged += 1
        self.damaged += bool(torn)
        self.found = len(self.known)

    def lookup(self, batch: Batch) -> np.ndarray | None:
        """Return the summed log-prob of every response, (responses,) float32, or None unless all are known."""
        found = []
        for digest, response in zip(_digests(batch), batch.responses, strict=True):
            logps, tokens = self.known.get(digest, (0.0, -1))
            if tokens != len(response):
                return None
            found.append(logps)
        return np.array(found, np.float32)

    def add(self, batch: Batch, logps: np.ndarray) -> None:
        """Store the summed log-probs (responses,) of a batch, in the file on return; see `sync`.

        Raises:
            DiskFailed: the records are in memory only; so are all later ones, without an error.
        """
        records = b""
        for digest, response, value in zip(_digests(batch), batch.responses, logps.tolist(), strict=True):
            if math.isfinite(value) and digest not in self.known:
                self.known[digest] = (value, len(response))
                record = _RECORD.pack(digest, value, len(response), 0)[:_CHECKED]
                records += record + struct.pack("<I", self._checksum(record))
        if records and self.path is not None and not self.failed:
            self.failed = True
            with writing(f"the reference cache {self.path}", "--reference-cache"):
                self._append(records)
                if time.monotonic() - self._synced_at >= SYNC_SECONDS:
                    self._sync()
            self.failed = False

    def sync(self) -> None:
        """Wait until all records are on the disk. Raises DiskFailed: they may be lost, and later ones are in memory only."""
        if self._unsynced and not self.failed:
            self.failed = True
            with writing(f"the reference cache {self.path}", "--reference-cache"):
                self._sync()
            self.failed = False

    def _checksum(self, record: bytes) -> int:
        return zlib.crc32(record, zlib.crc32(self.path.stem.encode() if self.path else b""))

    def _append(self, content: bytes) -> None:
        assert self.path is not None
        with appending(self.path) as file:  # one write per batch, so that concurrent runs do not mix records
            append(file, content)
        self._unsynced = True

    def _sync(self) -> None:
        assert self.path is not None
        sync(self.path)
        sync(self.path.parent)
        self._unsynced, self._synced_at = False, time.monotonic()


def open_cache(options: ReferenceOptions, adapter: AdapterOptions, model: str, identity: str) -> ReferenceCache:
    """Return the cache that the options select; with ``off`` it lasts only for the run.

    The other arguments are for `lite_dil.models.fingerprint.reference_key`.
    """
    if options.reference_cache == "off":
        return ReferenceCache(None, {})
    folder = cache_folder(options)
    return ReferenceCache(folder, reference_key(adapter, folder, model, identity))


def cache_folder(options: ReferenceOptions) -> Path:
    """Return the folder for log-probs and for hashes of weights, which are stored even with ``off``."""
    given = options.reference_cache
    return Path(given) if given and given != "off" else cache_dir() / "reference"


def _describe(path: Path, key: dict[str, str]) -> None:
    """Write a description and the format next to a cache file; raise UserError if a newer version wrote it."""
    try:
        content = dict(parse_json(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):  # missing or damaged
        write(path, json.dumps({KEY: CACHE, **key}, indent=2) + "\n")
    else:
        check_format(content, CACHE, f"the reference cache {path.with_suffix('.logps')}")


def _digests(batch: Batch) -> list[bytes]:
    """Return a digest of each response's token ids together with its prompt's, with the boundary."""
    digests = []
    for prompt, response in zip(batch.prompt_of, batch.responses, strict=True):
        ids = batch.prompts[prompt]
        head = struct.pack("<I", len(ids))
        digests.append(blake2([head, ids.tobytes(), response.tobytes()]))
    return digests
