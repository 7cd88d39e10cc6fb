"""The soak's damage: that it sees what it looks for. `make soak-short` runs it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from soak.damage_cases import case
from soak.damage_world import Command, World
from soak.damages import damages


def test_every_kind_of_damage_changes_the_file(tmp_path: Path) -> None:
    whole = bytes(range(1, 201))
    path, other = tmp_path / "file", tmp_path / "other"
    other.write_bytes(b"another")
    path.write_bytes(whole)
    found = list(damages(path, other, 50))
    assert len({name for name, _ in found}) == len(found) == 61
    places = set()
    for name, damage in found:
        path.write_bytes(whole)
        damage(path)
        after = path.read_bytes() if path.exists() else None
        assert after != whole, name
        if "flipped" in name and after is not None:
            changed = [at for at in range(len(whole)) if after[at] != whole[at]]
            assert len(after) == len(whole) and len(changed) == 1
            places.add(changed[0])
    assert len(places) == 50 and min(places) == 0 and max(places) > 190


def read(here: Path) -> int:
    print((here / "file").read_text(), "was read")
    return 0


def refuse(here: Path) -> int:
    print("lite-dil: something is wrong" if (here / "file").read_text() == "abc" else f"lite-dil: {here / 'file'} is damaged")
    return 0 if (here / "file").read_text() == "abc" else 2


def crash(here: Path) -> int:
    return 0 if (here / "file").read_text() == "abc" else int("x")


def say(here: Path) -> int:
    print("whole" if (here / "file").read_text() == "abc" else "file: left out")
    return 0


@pytest.mark.parametrize(
    ("work", "outcome", "failure"),
    [
        (read, "silently wrong", "silently wrong"),
        (refuse, "refused", ""),
        (crash, "ended with 70", "ended with 70"),
        (say, "said, and went on with what is whole", ""),
        (lambda here: 0 if (here / "file").read_text() == "abc" else 2, "refused", "refused without naming the file"),
        (lambda here: 0 if (here / "file").read_text() == "abc" else 1, "ended with 1", "ended with 1"),
    ],
)
def test_what_became_of_a_case(work: Callable[[Path], int], outcome: str, failure: str, tmp_path: Path) -> None:
    world = World(tmp_path, "cpu", short=True)
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "file").write_text("abc")
    world.commands["read"] = Command("read", work, lambda here: (here / "file").read_text())
    found = case(world, "file", "read", "cut", lambda path: path.write_text("ab"))
    assert found["outcome"] == outcome and (failure in found["failure"] if failure else not found["failure"])
    assert case(world, "file", "read", "nothing", lambda path: None)["outcome"] == "equal"
