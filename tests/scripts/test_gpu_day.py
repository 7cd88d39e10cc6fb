"""The day with a card, on a CPU: checks that pass, fail, hang and die, and going on from the file."""

from __future__ import annotations

import importlib
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import gpu_day
import gpu_day_attention
import pytest
from gpu_day_record import FAILED, LEFT_OUT, PASSED, Check, Finding, Record, at_most, between, status_of, table
from gpu_day_run import Run

TOYS = ["correctness", "--device", "cpu", "--tiny"]
FEW = [*TOYS, "--only", "attention 64"]


def call(json_file: Path, *more: str) -> int:
    folder = str(json_file.parent / "models")
    return gpu_day.main([FEW[0], "--json", str(json_file), "--folder", folder, *FEW[1:], *more])


def worked(tmp_path: Path, name: str) -> list[dict[str, Any]]:
    """Make a check in this process; return its findings, and how it ended."""
    result = tmp_path / "result"
    argv = [*TOYS, "--json", str(tmp_path / "day.json"), "--folder", str(tmp_path), "--worker", name, str(result), "600"]
    assert gpu_day.main(argv) == 0
    return [json.loads(line) for line in result.read_text().splitlines()]


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
        "correctness: attention 64, 16 bits": PASSED,
        "correctness: attention 64, float16": "not run",
    }
    assert len(found["correctness: attention 64, 16 bits"]["findings"]) == 4
    assert call(file) == 0
    out, err = capsys.readouterr()
    assert "2 checks, 1 of them done before" in err
    assert json.loads(file.read_text()) == json.loads(before)
    assert "needs a GPU | - | not run" in out and file.with_suffix(".txt").read_text() == out


def test_wrong_values_are_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = bitsandbytes.functional.dequantize_4bit
    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", lambda *args: 1.0001 * right(*args))
    first, *_, end = worked(tmp_path, "correctness: NF4")
    assert first["expected"].startswith("at most 4.77e-07") and first["passed"] is False and end["status"] == FAILED

    attend = gpu_day_attention.attend
    wider: Any = lambda *args, of, **given: attend(*args, of=(of[0] and of[0] + 1, of[1]), **given)  # noqa: E731
    monkeypatch.setattr(gpu_day_attention, "attend", wider)
    *findings, end = worked(tmp_path, "correctness: attention 64, 16 bits")
    assert [("no window" in one["what"]) == one["passed"] for one in findings] == [True] * 4
    assert end["status"] == FAILED


CHECKS = """
    import json, os, sys, time
    name, result = sys.argv[sys.argv.index("--worker") + 1:][:2]
    with open(result, "w") as out:
        one = {"what": "first", "measured": "1", "expected": "1", "passed": True, "value": 1.0}
        print(json.dumps(one), file=out, flush=True)
        if "hangs" in name:
            time.sleep(60)
        if "dies" in name:
            sys.exit("RuntimeError: an illegal memory access")
        print(json.dumps({"status": "ok", "reason": ""}), file=out)
"""


def test_a_check_that_hangs_or_dies_is_a_failure_and_no_end(tmp_path: Path) -> None:
    script = tmp_path / "checks.py"
    script.write_text(textwrap.dedent(CHECKS))
    options = gpu_day.parse([*TOYS, "--patience", "0.05", "--minutes", "0.1"])
    record, said = Record(tmp_path / "day.json", {}), list[str]()
    names = ("makes", "hangs", "dies", "ends", "takes long")
    checks = {name: Check(name, lambda place: [], 1e3 if "long" in name else 0.1, first=name == "makes") for name in names}
    checks["too long"] = checks.pop("takes long")
    options.tiny = False
    Run(options, record, [sys.executable, str(script)], 1.0, 100.0, 3, said.append).all(dict(checks))
    found = Record(record.path, {}).read().checks
    assert {name: one["status"] for name, one in found.items()} == {
        "makes": PASSED,
        "hangs": FAILED,
        "dies": FAILED,
        "ends": PASSED,
        "too long": LEFT_OUT,
    }
    assert found["hangs"]["reason"].startswith("not done after")
    assert found["dies"]["reason"] == "its process ended with code 1: RuntimeError: an illegal memory access"
    assert [len(found[name]["findings"]) for name in checks] == [1, 1, 1, 1, 0]
    assert "dies: first | 1 | 1 | ok" in table(record, list(checks))


@pytest.mark.parametrize("part", ["correctness", "memory"])
def test_six_minutes_of_an_h200_hold_a_part(part: str) -> None:
    first, *others = importlib.import_module(f"gpu_day_{part}").CHECKS
    ends = [first.seconds] * min(gpu_day.AT_A_TIME[part], 16 // gpu_day.CORES_A_CHECK)
    for check in others:
        ends[ends.index(min(ends))] += check.seconds
    assert first.first and max(ends) < 300


def test_findings() -> None:
    nan = float("nan")
    assert at_most("x", nan, 1.0, "").passed is False and between("x", nan, 0.0, 1.0, "").passed is False
    unknown, right, wrong = (
        Finding("x", "not run", "").passed,
        at_most("x", 1.0, 1.0, "").passed,
        at_most("x", 1.1, 1.0, "").passed,
    )
    assert status_of([unknown]) == "not run"
    assert status_of([unknown, right]) == PASSED
    assert status_of([unknown, wrong, right]) == FAILED


def test_a_file_of_another_machine_is_not_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "day.json"
    Record(file, {"device": "a card"}).write()
    assert call(file) == 2
    assert "it was made with {'device': 'a card'" in capsys.readouterr().err
