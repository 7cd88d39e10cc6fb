"""--report-to with the real libraries, offline: what was logged is read back, also after a run was killed and resumed."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import warm
from conftest import config, write_pairs

from lite_dil.base.errors import UserError
from lite_dil.cli.main import main
from lite_dil.config.train_config import tracker_names
from lite_dil.reports import trackers

NAMES = ("tensorboard", "wandb", "trackio")
Figures = dict[str, list[tuple[int, float]]]  # steps and values by name
SECRET = "f00dfeed" * 5


@pytest.fixture
def flags(tiny: str, tmp_path: Path) -> list[str]:
    """12 pairs in 6 steps, evaluated twice."""
    data = str(write_pairs(tmp_path / "pairs.jsonl"))
    return [
        "--model", tiny, "--backend", "cpu", "--data", data, "--eval-data", data, "--dtype", "float32", "--epochs", "2",
        "--eval-steps", "3", "--save-steps", "2", "--report-samples", "0",
    ]  # fmt: skip


def train(home: Path, *flags: str, code: int = 0, **environment: str) -> str:
    """Run the command in a process of its own, away from a terminal; return what it printed."""
    whole = {**os.environ, "HOME": str(home), "TRACKIO_DIR": str(home / "trackio")}
    for name in ("WANDB_API_KEY", "WANDB_PROJECT", "TRACKIO_PROJECT"):
        whole.pop(name, None)
    whole |= environment
    done = warm.run("train", *flags, env=whole)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def expected(folder: Path) -> Figures:
    """Return what metrics.jsonl says: for each name the steps and values in their order."""
    found: Figures = {}
    for text in (folder / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        for name, value in line.items():
            if name != "step":
                kind = f"eval/{name.removeprefix('eval_')}" if "eval_loss" in line else f"train/{name}"
                found.setdefault(kind, []).append((line["step"], value))
    return found


def read_tensorboard(folder: Path) -> Figures:
    from tensorboardX.proto.event_pb2 import Event

    found: Figures = {}
    for path in sorted((folder / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        content, at = path.read_bytes(), 0
        while at < len(content):  # a length, its checksum, the record, its checksum
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            at += 16 + length
            for value in event.summary.value:
                if not value.HasField("tensor"):
                    found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def wandb_records(content: bytes) -> Iterator[bytes]:
    """Yield the records of a .wandb file: LevelDB's log, in blocks of 32 KB, after a header of 7 bytes."""
    at, record = 7, b""
    while at + 7 <= len(content):
        if (left := -at % 32768) and left < 7:  # too little for the next header
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def read_wandb(folder: Path) -> Figures:
    from wandb.proto.wandb_internal_pb2 import Record

    found: Figures = {}
    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        for data in wandb_records(path.read_bytes()):
            items = Record.FromString(data).history.item
            row = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
            for name, value in row.items():
                if not name.startswith("_"):
                    found.setdefault(name, []).append((int(row["_step"]), value))
    return found


def read_trackio(home: Path) -> tuple[Figures, list[str]]:
    found: Figures = {}
    (path,) = (home / "trackio").glob("*.db")
    with sqlite3.connect(path) as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    for _, step, metrics in rows:
        for name, value in json.loads(metrics).items():
            found.setdefault(name, []).append((step, value))
    return found, sorted({name for name, _, _ in rows})


def same(found: Figures, wanted: Figures) -> None:
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert [step for step, _ in found[name]] == [step for step, _ in values], name
        if name not in ("train/reference_passes",) and "second" not in name and "memory" not in name:
            assert [value for _, value in found[name]] == pytest.approx([value for _, value in values], rel=1e-5), name


def test_every_line_reaches_every_tracker_once_also_after_a_crash(flags: list[str], tmp_path: Path) -> None:
    folder, home = tmp_path / "run", tmp_path / "home"
    home.mkdir()
    more = ["--output-dir", str(folder), "--report-to", ",".join(NAMES)]
    out = train(home, *flags, *more, WANDB_MODE="offline", WANDB_API_KEY=SECRET)
    wanted = expected(folder)
    assert len(wanted["train/loss"]) == 6 and len(wanted["eval/rewards/accuracies"]) == 2
    same(read_tensorboard(folder), wanted)
    same(read_wandb(folder), wanted)
    same(read_trackio(home)[0], wanted)
    # As if it had been killed after its last step, before that was saved.
    shutil.rmtree(folder / "adapter")
    shutil.rmtree(folder / "checkpoints" / "step-6")
    out += train(home, "--resume", str(folder), WANDB_MODE="offline", WANDB_API_KEY=SECRET)
    assert "step 4 of 6" in out
    same(read_tensorboard(folder), wanted)
    same(read_wandb(folder), wanted)
    found, runs = read_trackio(home)
    same(found, wanted)
    ids = json.loads((folder / "trackers.json").read_text())
    assert runs == [f"run-{ids['trackio']}"]
    assert {path.name[-12:] for path in (folder / "wandb").glob("offline-run-*/*.wandb")} == {f"-{ids['wandb']}.wandb"[-12:]}
    # No key is printed or kept.
    assert SECRET not in out
    kept = [path for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert kept == []


def test_a_tracker_that_is_new_to_a_resumed_run_is_given_all_lines(flags: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(tmp_path, *flags, "--output-dir", str(folder), "--max-steps", "4")
    shutil.rmtree(folder / "checkpoints" / "step-4")
    train(tmp_path, "--resume", str(folder), "--report-to", "tensorboard")
    same(read_tensorboard(folder), expected(folder))


def test_a_run_that_diverges_is_closed(flags: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    more = ["--report-to", "tensorboard,wandb", "--logp-reduction", "sum", "--beta", "1e4"]
    train(tmp_path, *flags, *more, "--output-dir", str(folder), code=1, WANDB_MODE="offline")
    wanted = expected(folder)
    same(read_tensorboard(folder), wanted)
    same(read_wandb(folder), wanted)


def test_wandb_without_a_key_is_one_line_and_no_question(flags: list[str], tmp_path: Path) -> None:
    out = train(tmp_path, *flags, "--report-to", "wandb", "--output-dir", str(tmp_path / "run"), code=2)
    assert "--report-to wandb: No API key configured" in out
    assert "WANDB_MODE=offline" in out
    assert "training data" not in out  # before anything was read
    assert not (tmp_path / "run").exists()


def test_what_is_not_installed_is_one_line_with_the_fix(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, module in (("tensorboard", "tensorboardX"), ("wandb", "wandb"), ("trackio", "trackio")):
        with pytest.raises(UserError, match=rf'--report-to {name}: {module} is not installed: pip install -e ".*\[{name}\]"'):
            trackers.check(config(report_to=name))


def test_names_are_checked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", "--report-to", "tensorbord"]) == 2
    assert "--report-to: 'tensorbord' (did you mean 'tensorboard'?) is not one of" in capsys.readouterr().err
    assert tracker_names(None) == tracker_names("none") == []
    assert tracker_names("wandb, trackio,wandb") == ["wandb", "trackio"]
    with pytest.raises(UserError, match="none alone"):
        tracker_names("wandb,none")
    path = tmp_path / "c.yaml"
    path.write_text("report_to: [wandb, tensorboard]\n")
    from lite_dil.config.options import read_yaml

    assert read_yaml(path)["report_to"] == "wandb,tensorboard"


class Failing:
    """A tracker whose disk is full from step 2 on."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.closed: list[bool] = []

    def log(self, step: int, figures: dict[str, float]) -> None:
        if step > 1:
            raise OSError(28, "No space left on device")
        self.steps.append(step)

    def close(self, good: bool) -> None:
        self.closed.append(good)
        raise TimeoutError("the server does not answer")


def test_a_tracker_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken, said = [Failing(), Failing()], list[str]()
    for name, tracker in zip(("tensorboard", "trackio"), broken, strict=True):
        monkeypatch.setitem(trackers._OPEN, name, lambda *args, tracker=tracker: tracker)
    all_of_them = trackers.Trackers(config(report_to="tensorboard"), tmp_path, [], said.append)
    for step in (1, 2, 3):
        all_of_them.log({"step": step, "loss": 1.0})
    assert broken[0].steps == [1]
    assert said == ["--report-to tensorboard failed and is dropped from here on: [Errno 28] No space left on device"]
    all_of_them = trackers.Trackers(config(report_to="trackio"), tmp_path, [], said.append)
    all_of_them.close(good=True)
    assert broken[1].closed == [True] and broken[0].closed == []
    assert said[-1] == "--report-to trackio could not be closed: the server does not answer"
