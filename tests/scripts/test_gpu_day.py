"""The day with a card, on a CPU: checks that pass, one that fails, and going on from the file."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import gpu_day
import pytest
from gpu_day_record import FAILED, PASSED, Finding, Record, at_most, status_of

TOYS = ["correctness", "--device", "cpu", "--tiny"]
FEW = [*TOYS, "--only", "attention 64, window, soft cap"]


def call(json_file: Path, *more: str) -> int:
    folder = str(json_file.parent / "models")
    return gpu_day.main([FEW[0], "--json", str(json_file), "--folder", folder, *FEW[1:], *more])


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The file of a first call, and how that ended."""
    file = tmp_path_factory.mktemp("day") / "day.json"
    return file, call(file)


def test_checks_pass_and_are_not_repeated(done: tuple[Path, int], capsys: pytest.CaptureFixture[str]) -> None:
    file, code = done
    before = file.read_text()
    assert code == 0
    found = json.loads(before)["checks"]
    assert {key: one["status"] for key, one in found.items()} == {
        "correctness: attention 64, window, soft cap, 16 bits": PASSED,
        "correctness: attention 64, window, soft cap, fp16": "not run",
    }
    assert call(file) == 0
    out, err = capsys.readouterr()
    assert "2 checks, 1 of them done before" in err
    assert json.loads(file.read_text()) == json.loads(before)
    assert "not run  needs a GPU" in out


def test_a_wrong_value_is_a_failure(
    done: tuple[Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    right = bitsandbytes.functional.dequantize_4bit
    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", lambda *args: 1.0001 * right(*args))
    argv = [*TOYS, "--json", str(tmp_path / "day.json"), "--only", "correctness: NF4"]
    Record(tmp_path / "day.json", gpu_day.machine_of(gpu_day.parse(argv))).write()
    assert gpu_day.main([*argv, "--worker", str(time.time() + 60)]) == 0
    assert gpu_day.main(argv) == 1
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if "from the definition in numpy" in line)
    assert "FAILED" in line and "0.0001" in line and "at most 4.77e-07" in line


def test_findings() -> None:
    assert at_most("x", float("nan"), 1.0, "").passed is False
    unknown = Finding("x", "not run: no trl")
    assert status_of([unknown]) == "not run"
    assert status_of([unknown, at_most("x", 1.0, 1.0, "")]) == PASSED
    assert status_of([unknown, at_most("x", 1.1, 1.0, ""), at_most("x", 0.0, 1.0, "")]) == FAILED


def test_a_file_of_another_machine_is_not_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "day.json"
    Record(file, {"device": "a card"}).write()
    assert call(file) == 2
    assert "it was made with {'device': 'a card'" in capsys.readouterr().err
