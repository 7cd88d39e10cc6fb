"""The soak's layer below a process, and its pieces. `make soak-short` runs a few cases of every part, also in CI."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from soak.pieces import Kept, Piece, run
from soak.row import Row, as_json, page, rows_of
from soak.writes.journal import Disk, File, differences, read, tree_of
from soak.writes.warm import build

# A process below the layer that makes, writes, syncs and renames a file; its arguments are those of an Order.
WORK = """
import ctypes, os, sys
folder, journal, *numbers = sys.argv[1:]
kill_at, fail_from, error = map(int, numbers)
journal = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666)
long, nobody = ctypes.c_long, ctypes.CFUNCTYPE(None)()
begin = ctypes.CDLL(None).soak_begin
begin(folder.encode(), journal, long(kill_at), long(fail_from), long(10**9), error, b"CWRF", 0, long(0), nobody)
with open(folder + "/new", "wb", buffering=0) as file:
    file.write(b"12345")
    os.fsync(file.fileno())
    file.write(b"678")
os.rename(folder + "/new", folder + "/name")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the layer below the process is for Linux")
def test_the_layer_kills_fails_and_notes(tmp_path: Path) -> None:
    layer, folder, journal = build(tmp_path / "layer"), tmp_path / "folder", tmp_path / "journal"

    def run(kill_at: int = 0, fail_from: int = 0, error: int = 0) -> tuple[int, str, str, bytes]:
        """Return the exit code, the journal's letters, and the name and content of the file that is left."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        argv = [sys.executable, "-c", WORK, str(folder), str(journal), *map(str, (kill_at, fail_from, error))]
        code = subprocess.run(argv, env=os.environ | {"LD_PRELOAD": str(layer)}, capture_output=True).returncode
        entries, disk = read(journal), tree_of(folder)
        assert not list(differences(Disk(folder, {}, entries).now, disk)), "the journal is what happened"
        (name, file), *others = disk.items() or [("", File())]
        assert not others and file is not None
        return code, "".join(entry.kind for entry in entries), name, file.content()

    assert run() == (0, "CWFWR", "name", b"12345678")
    found = [run(kill_at=event) for event in range(1, 6)]
    assert [code for code, *_ in found] == [-signal.SIGKILL] * 5
    assert [left for _, _, *left in found] == [
        ["", b""],
        ["new", b""],
        ["new", b"12345"],
        ["new", b"12345"],
        ["new", b"12345678"],
    ]
    assert run(fail_from=4, error=errno.ENOSPC)[0::2] == (1, "new")
    whole = read(journal)
    # After the sync of the content alone, a power cut may take its name, and never a part of what has one.
    names = {tuple(Disk(folder, {}, whole[:3]).after_power_cut(random.Random(seed))) for seed in range(20)}
    assert names == {(), ("new",)}


def test_a_piece_that_failed_or_is_of_other_code_is_repeated(tmp_path: Path) -> None:
    kept, piece = Kept(tmp_path, short=True), Piece("writes", "train, cpu")
    assert kept.find(piece) is None
    good, bad = (as_json(Row("writes", "a kill", Counter(equal=2), failures)) for failures in ([], ["lost"]))
    done = kept.keep(piece, [good], 0.0)
    assert kept.find(piece) == done and kept.find(Piece("writes", "train, mlx")) is None
    assert Kept(tmp_path, short=False).find(piece) is None
    other = Kept(tmp_path, short=True)
    other.code = "of other code"
    assert other.find(piece) is None and other.find(piece, any_code=True) == done
    kept.keep(piece, [good, bad], 0.0)
    assert kept.find(piece) is None and kept.find(piece, any_code=True) is None


def test_the_page_joins_the_rows_of_a_kind(tmp_path: Path) -> None:
    kept = Kept(tmp_path, short=True)
    rows = [
        Row("writes", "a kill", Counter(equal=2), of="train"),
        Row("writes", "a kill", Counter(lost=1), ["x"], 60.0, "label"),
    ]
    found = [kept.keep(Piece("writes", row.of), [as_json(row)], 0.0) for row in rows]
    assert rows_of(found) == rows
    text = page({"writes": found, "steady": []})
    assert "| writes | a kill: train 2; label 1 | 3 | equal 2, lost 1 | 1 |" in text
    assert "short form" in text and "3 cases took 1 minutes of CPU; 1 failed" in text and "## steady\n\nNot run." in text


# A part whose pieces take no time.
PART = """
from collections import Counter
from contextlib import contextmanager
from soak.row import Row

@contextmanager
def opened(output, *, short):
    def take(name):
        if name == "ends":
            raise RuntimeError("an end")
        yield Row("toy", name, Counter(tried=1), ["harm"] if name == "fails" else [])
    yield take
"""


def test_a_process_that_ends_is_a_failure_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "more" / "soak").mkdir(parents=True)
    (tmp_path / "more" / "soak" / "part_toy.py").write_text(PART)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "more"), prepend=os.pathsep)
    pieces = [Piece("toy", name) for name in ("ends", "fails", "is well")]
    kept = Kept(tmp_path / "pieces", short=True)
    found = dict(run(pieces, kept, tmp_path, workers=1))
    assert list(found) == pieces
    ((ended,), (failed,), (well,)) = (rows_of([done]) for done in found.values())
    assert "the process ended with 1: RuntimeError: an end" in ended.failures[0]
    assert str(tmp_path / "toy-0.log") in ended.failures[0]
    assert failed.failures == ["harm"] and well.ok
    assert [kept.find(piece) for piece in pieces] == [None, None, found[pieces[2]]]
