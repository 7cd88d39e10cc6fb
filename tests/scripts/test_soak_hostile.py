"""The soak's hostile input: that its watch sees what it looks for. `make soak-short` runs it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lite_dil.base.errors import UserError

if os.name != "posix":
    pytest.skip("signals and audit of paths as POSIX has them", allow_module_level=True)

from soak import hostile_watch, part_hostile
from soak.part_hostile import LOADED, PURE, opened


def refuse() -> int:
    raise UserError("no")


@pytest.mark.parametrize(
    ("case", "harm"),
    [
        (lambda: subprocess.run([sys.executable, "-c", ""], check=True), "subprocess.Popen"),
        (lambda: Path("/tmp/lite-dil-outside").write_text(""), "wrote '/tmp/lite-dil-outside'"),  # noqa: S108 - it is refused
        (lambda: print("\x1b[31m"), "printed '\\x1b'"),
        (lambda: time.sleep(60), "took more than"),
        (lambda: [sum(range(10**6)) for _ in range(10**6)], "took more than"),
    ],
)
def test_the_watch_sees(case: Callable[[], object], harm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostile_watch, "SECONDS", 0.05)
    with pytest.raises(hostile_watch.Harm) as raised:
        hostile_watch.watched(case, tmp_path)
    assert harm in str(raised.value)


def test_what_is_right_is_not_called_harm(tmp_path: Path) -> None:
    assert hostile_watch.watched(lambda: (tmp_path / "a").write_text(""), tmp_path) == "taken"
    assert hostile_watch.watched(refuse, tmp_path) == "refused"
    with pytest.raises(KeyError):
        hostile_watch.watched(lambda: {}["a"], tmp_path)


def test_a_target_of_each_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three cases each, of one whose cases are functions and of one whose are commands."""
    monkeypatch.setattr(part_hostile, "_SHORT", dict.fromkeys((PURE, LOADED), 3))
    with opened(tmp_path / "hostile", short=True) as rows:
        found = [row for name in ("options in YAML", "files of rows, by the command") for row in rows(name)]
    assert [row.outcomes.total() for row in found] == [3, 3]
    assert all(row.ok and set(row.outcomes) <= {"taken", "refused"} for row in found), found


def test_a_harm_fails_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_hostile, "_SHORT", dict.fromkeys((PURE, LOADED), 3))
    monkeypatch.setattr(part_hostile, "read_yaml", lambda path: print("\x1b[31m"))
    with opened(tmp_path / "hostile", short=True) as rows:
        (row,) = rows("options in YAML")
    assert not row.ok and "printed" in row.failures[0]
