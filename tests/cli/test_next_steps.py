"""The last lines of a training: commands that work as they are typed."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pytest
from conftest import config, write_pairs

from lite_dil.api.telling import Logged
from lite_dil.base.observer import Event, Observer
from lite_dil.cli import adapter_flags, next_steps
from lite_dil.cli.main import main, parsers
from lite_dil.recipes.preference import train
from lite_dil.reports.outcome import what
from lite_dil.reports.record import read_record


def test_what_is_told_after_a_training_works(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").mkdir()  # of an earlier export
    data, run = str(write_pairs(tmp_path / "pairs.jsonl")), "my run's"
    flags = ["--model", tiny, "--data", data, "--max-steps", "1", "--report-samples", "0", "--output-dir", run]
    assert main(["train", *flags]) == 0
    *_, head, report, chat, export = capsys.readouterr().out.splitlines()
    assert head == "next:"
    assert Path(url2pathname(urlsplit(report.split()[1]).path)).samefile(Path(run, "report.html"))
    for line, name in ((chat, "chat"), (export, "export")):
        named, *words = shlex.split(line)
        words = words[len(next_steps.program()) :]
        assert named == words[0] == name
        assert adapter_flags.find(parsers()[1][name].parse_args(words[1:])).adapter == Path(run, "adapter")
    assert "--compare" in chat and export.endswith("--format ollama --output my-model-2")


def test_how_the_program_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its name only where that finds this installation, and not another one or none."""
    for name in ("ours", "other"):
        script = tmp_path / name / "lite-dil"
        script.parent.mkdir()
        script.touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "ours" / "python"))
    monkeypatch.chdir(tmp_path)
    for argv, path, program in (
        ("ours/lite-dil", "ours", ["lite-dil"]),
        ("ours/lite-dil", "other", ["ours/lite-dil"]),
        ("ours/lite-dil", "", ["ours/lite-dil"]),
        ("scripts/train.py", "ours", ["lite-dil"]),
        ("scripts/train.py", "other", ["ours/lite-dil"]),
    ):
        monkeypatch.setattr(sys, "argv", [str(tmp_path / argv)])
        monkeypatch.setenv("PATH", str(tmp_path / path) if path else "")
        assert next_steps.program() == program, (argv, path)
    (tmp_path / "ours" / "lite-dil").unlink()
    assert next_steps.program() == ["ours/python", "-m", "lite_dil"]


def test_what_a_model_with_its_own_code_needs_again(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--trust-remote-code is in every command that would be refused without it."""

    class Stop(Observer):
        def after_step(self, event: Event) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    class Display(Logged):
        def say(self, text: str) -> None:
            said.append(text)

    monkeypatch.chdir(tmp_path)
    said, run, data = list[str](), "my run", str(write_pairs(tmp_path / "pairs.jsonl"))
    options = config(
        model=tiny, data=data, backend="cpu", max_steps=2, output_dir=run, trust_remote_code=True, report_samples=0
    )
    trained = train(options, Display(), observers=[Stop()])
    assert trained.stopped and said[-1].endswith('continue with --resume "my run" --trust-remote-code'), said
    record = read_record(Path(run))
    assert 'saved; --resume "my run" --trust-remote-code continues it' in what(record)
    *_, chat, export = next_steps.lines(Path(run), options)
    for line, name in ((chat, "chat"), (export, "export")):
        words = shlex.split(line)[1 + len(next_steps.program()) + 1 :]
        assert adapter_flags.find(parsers()[1][name].parse_args(words)).options.trust_remote_code
    assert "--format adapter" in export, "to others --export refuses such a model"
