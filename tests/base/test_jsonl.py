"""The file that grows: whole after a crash, a full disk and an undo."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from lite_dil.base.errors import UserError
from lite_dil.base.jsonl import JSONLines
from lite_dil.base.lock import Lock

ROWS = [{"a": 1}, {"b": "ü\u2028"}, [3]]


def test_rows_are_there_again(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "a.jsonl"
    file = JSONLines(path, "tests")
    assert file.lines == [] and not path.exists()
    file.add(*ROWS[:2])
    file.add(ROWS[2])
    again = JSONLines(path, "tests")
    assert [json.loads(line) for line in again.lines] == ROWS and again.size == file.size == path.stat().st_size


def test_a_line_that_was_cut_off_is_removed_and_a_whole_one_is_ended(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    JSONLines(path, "tests").add(*ROWS)
    content = path.read_bytes()
    first = content.index(b"\n") + 1
    for cut in range(first + 1, content.index(b"\n", first)):
        path.write_bytes(content[:cut])
        whole = cut == content.index(b"\n", first)
        assert len(JSONLines(path, "tests").lines) == 1 + whole
        assert path.read_bytes() == content[:first]
    path.write_bytes(content[: content.index(b"\n", first)])  # as an editor saves it
    assert len(JSONLines(path, "tests").lines) == 2
    assert path.read_bytes() == content[: content.index(b"\n", first) + 1]


@pytest.mark.parametrize("tail", [b"\0" * 9, b'{"a": 1, "b"' + b"\0" * 4, b"\0\0{", b" \0"])
def test_zero_bytes_at_the_end_are_removed(tail: bytes, tmp_path: Path) -> None:
    """What a power cut leaves: the file has its new size, and nothing was written there."""
    path = tmp_path / "a.jsonl"
    JSONLines(path, "tests").add(*ROWS)
    content = path.read_bytes()
    path.write_bytes(content + tail)
    file = JSONLines(path, "tests")
    assert len(file.lines) == len(ROWS) and path.read_bytes() == content


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    file = JSONLines(tmp_path / "a.jsonl", "tests", alone=True)
    with pytest.raises(UserError, match="this process is writing there"):
        JSONLines(tmp_path / "a.jsonl", "tests", alone=True)
    assert file.lines == []
    del file
    JSONLines(tmp_path / "a.jsonl", "tests", alone=True).add(ROWS[0])
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some mounted drives: the work goes on, and nothing is left behind."""
    fcntl = pytest.importorskip("fcntl", reason="Windows has other locks")

    def refuse(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    said: list[str] = []
    locks = [Lock(tmp_path, "--output-dir", said.append) for _ in range(2)]
    expected = f"{tmp_path}: this file system has no locks ({os.strerror(errno.ENOLCK)}); start nothing else that writes there"
    assert said == [expected, expected]
    for lock in locks:
        lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("dear diary")
    with pytest.raises(UserError, match="not JSON Lines"):
        JSONLines(path, "tests")
    assert path.read_text() == "dear diary"
    with pytest.raises(UserError, match=f"{tmp_path.name}: .*tests"):
        JSONLines(tmp_path, "tests")


def test_cut_takes_back_what_was_added_and_nothing_of_others(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    file = JSONLines(path, "tests", alone=True)
    file.add(ROWS[0])
    size, content = file.size, path.read_bytes()
    file.add(*ROWS[1:])
    file.cut(size)
    assert path.read_bytes() == content
    file.add(ROWS[1])
    with path.open("a") as other:
        other.write("{}\n")
    for change in (lambda: file.cut(size), lambda: file.add(ROWS[2])):
        with pytest.raises(UserError, match=r"a.jsonl.*changed"):
            change()
    assert path.read_bytes().endswith(b"{}\n") and len(path.read_bytes().splitlines()) == 3


def test_rewrite_replaces_all(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    file = JSONLines(path, "tests")
    file.add(*ROWS)
    file.rewrite(ROWS[::-1])
    assert [json.loads(line) for line in JSONLines(path, "tests").lines] == ROWS[::-1]
    assert file.size == path.stat().st_size and [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_rewrite_goes_through_a_link(tmp_path: Path) -> None:
    link, path = tmp_path / "a.jsonl", tmp_path / "drive" / "a.jsonl"
    path.parent.mkdir()
    link.symlink_to(path)
    file = JSONLines(link, "tests")
    file.add(*ROWS)
    file.rewrite(ROWS[:1])
    assert link.is_symlink() and [json.loads(line) for line in path.read_bytes().splitlines()] == ROWS[:1]


def test_a_rewrite_that_is_stopped_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = JSONLines(tmp_path / "a.jsonl", "tests")
    file.add(*ROWS)

    def ctrl_c(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        file.rewrite([])
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"] and len(JSONLines(file.path, "tests").lines) == 3


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_what_cannot_be_written_is_said_at_once(tmp_path: Path) -> None:
    JSONLines(tmp_path / "a.jsonl", "tests").add(ROWS[0])
    (tmp_path / "a.jsonl").chmod(0o444)
    tmp_path.chmod(0o555)
    for name in ("a", "b"):
        with pytest.raises(UserError, match=f"{name}.jsonl: .*Permission denied"):
            JSONLines(tmp_path / f"{name}.jsonl", "tests")
    tmp_path.chmod(0o755)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_one_message(tmp_path: Path) -> None:
    file = JSONLines(tmp_path / "a.jsonl", "tests")
    (tmp_path / "a.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match=os.strerror(errno.ENOSPC)):
        file.add(ROWS[0])
