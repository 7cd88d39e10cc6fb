"""The short form of scripts/soak: what CI runs of it, each part in a process of its own; and its pieces."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from soak.pieces import Kept, Piece, run
from soak.row import Row, as_json, page, rows_of

SCRIPT = Path(__file__).parents[2] / "scripts" / "soak"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the layer below the process is for Linux")
def test_kills_power_cuts_and_failing_disks(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "LITE_DIL_CACHE"}
    argv = [sys.executable, str(SCRIPT), "writes", "--short", "--output", str(tmp_path)]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    pieces = [json.loads(path.read_text()) for path in (tmp_path / "pieces").glob("*.json")]
    assert len(pieces) == 4
    for piece in pieces:
        assert [row["what"] for row in piece["rows"]][:4] == [
            "who changes the folder",
            "the same command twice",
            "a kill at a write",
            "a power cut at a write",
        ]
        assert all(row["outcomes"] and not row["failures"] for row in piece["rows"])
    again = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0 and again.stdout.startswith("4 of 4 pieces are done already")
    assert again.stdout.partition("| part")[2] == done.stdout.partition("| part")[2]


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


def test_a_process_that_ends_is_a_failure_and_the_others_go_on(tmp_path: Path) -> None:
    pieces = [Piece("damage", "no such backend"), Piece("steady", "no such backend")]
    kept = Kept(tmp_path / "pieces", short=True)
    found = dict(run(pieces, kept, tmp_path, workers=1))
    assert list(found) == pieces
    ((ended,), (failed,)) = (rows_of([done]) for done in found.values())
    assert (
        "the process ended with 1: RuntimeError" in ended.failures[0] and str(tmp_path / "damage-0.log") in ended.failures[0]
    )
    assert failed.what.startswith("100 steps on no such backend") and failed.failures
    assert [kept.find(piece) for piece in pieces] == [None, None]
