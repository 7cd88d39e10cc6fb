"""dil.read, dil.train and Run: the same as the command line's, from objects."""

from __future__ import annotations

import json
import logging
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import write_pairs
from trainings import metrics, run, same_weights

import lite_dil as dil
from lite_dil.backends import registry
from lite_dil.cli.main import main
from lite_dil.runs.seal import unsealed

OPTIONS = {"learning_rate": 1e-2, "max_steps": 3, "report_samples": 0}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "pairs.jsonl")


@pytest.fixture
def rows(data: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.read_text().splitlines()]


@pytest.fixture
def load(tiny: str, backend_name: str) -> Any:
    """Loads the tiny model, as the flags in `command` do."""
    return lambda **more: dil.load(
        tiny, backend=backend_name, dtype="float32", **{"lora_r": 4, "lora_dropout": 0.1, "seed": 2} | more
    )


@pytest.fixture
def command(tiny: str, backend_name: str, data: Path) -> list[str]:
    flags = ["--model", tiny, "--backend", backend_name, "--dtype", "float32", "--lora-r", "4", "--lora-dropout", "0.1"]
    flags += ["--seed", "2", "--data", str(data), "--eval-data", str(data), "--learning-rate", "0.01", "--max-steps", "3"]
    return [*flags, "--report-samples", "0"]


class StopAfter(dil.Observer):
    """Asks for a stop, as Ctrl-C does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def after_step(self, event: dil.Event) -> None:
        if event.step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def test_train_is_the_command(
    load: Any, command: list[str], data: Path, rows: list[dict[str, Any]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Metrics and adapter to the last bit; twice on one base, the second time from a generator; without a word."""
    expected = run(command, tmp_path / "command", "--loss", "dpo")
    capfd.readouterr()
    policy = load()
    policy.generate("what is tea", max_new_tokens=3, temperature=1.0)  # draws nothing that training draws
    dil.train(policy, str(data), loss="lsif", output_dir=tmp_path / "first", **OPTIONS)
    done = dil.train(
        policy.fresh(), (row for row in rows), loss="dpo", eval_data=rows, output_dir=tmp_path / "second", **OPTIONS
    )
    assert metrics(done.folder) == expected
    assert same_weights(done.folder / "adapter", tmp_path / "command" / "adapter")
    assert done.policy is policy and not done.stopped and done.report.is_file()
    assert policy.log_ratio([row["prompt"] for row in rows], [row["chosen"][0]["content"] for row in rows]) != [0.0] * 12
    assert [line["step"] for line in done.metrics] == [1, 2, 3, 3] and "eval_loss" in done.metrics[-1]
    saved = yaml.safe_load((done.folder / "config.yaml").read_text())
    assert saved["data"] == saved["eval_data"] and saved["data"].startswith("rows-")
    assert capfd.readouterr() == ("", "")


def test_a_stopped_run_goes_on(
    load: Any,
    rows: list[dict[str, Any]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the same policy, and in another one that was trained meanwhile; other rows are refused. Ctrl-C is a log record."""
    caplog.set_level(logging.INFO, "lite_dil")
    whole = dil.train(load(), rows, output_dir=tmp_path / "whole", **OPTIONS)
    policy = load()
    part = dil.train(policy, rows, output_dir=tmp_path / "part", observers=[StopAfter(1)], **OPTIONS)
    assert part.stopped and [line["step"] for line in part.metrics] == [1]
    assert capfd.readouterr() == ("", "")
    assert "stopping after this step, and saving; Ctrl-C again stops at once" in caplog.messages
    more = part.resume(observers=[StopAfter(2)])
    assert more.stopped and [line["step"] for line in more.metrics] == [1, 2]
    dil.train(policy.fresh(), rows, loss="ukl", output_dir=tmp_path / "other", **OPTIONS)
    with pytest.raises(dil.UserError, match="is not the data that this run was trained on"):
        dil.train(policy, rows[1:], resume=part.folder, **OPTIONS)
    with pytest.raises(dil.UserError, match="--loss is ukl, but the run has lsif"):
        dil.train(policy, rows, loss="ukl", resume=part.folder, **OPTIONS)
    read: list[Path] = []
    monkeypatch.setattr("lite_dil.runs.folder.unsealed", lambda path: read.append(path) or unsealed(path))
    done = dil.train(policy, rows, resume=part.folder, **OPTIONS)
    assert read == [part.folder / "checkpoints" / "step-2"]  # once: it may be gigabytes
    assert not done.stopped and metrics(done.folder) == metrics(whole.folder)
    assert same_weights(done.folder / "adapter", whole.folder / "adapter")


def test_a_trained_policy_is_trained_on_only_where_that_is_said(load: Any, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    """Going on is a run from the first one's adapter, as --init-adapter and a base as reference have it."""
    policy = load()
    first = dil.train(policy, rows, output_dir=tmp_path / "first", **OPTIONS)
    with pytest.raises(dil.UserError, match="has trained this policy"):
        dil.train(policy, rows, output_dir=tmp_path / "second", **OPTIONS)
    second = dil.train(policy, rows, output_dir=tmp_path / "second", continue_from=True, **OPTIONS)
    other = load(adapter=first.folder, reference="base", lora_r=None)
    expected = dil.train(other, rows, output_dir=tmp_path / "other", **OPTIONS)
    assert metrics(second.folder) == metrics(expected.folder)
    assert second.metrics[0]["log_ratio/chosen"] != 0
    with pytest.raises(dil.UserError, match="which model is the reference"):
        dil.train(load(adapter=first.folder, lora_r=None), rows, output_dir=tmp_path / "none", **OPTIONS)


@pytest.mark.parametrize("backend_name", ["cpu"])
def test_what_cannot_be_trained(load: Any, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    policy = load(lora_dropout=0.0)
    for options, said in (
        ({"lora_r": 8}, "lora_r is 8, but dil.load set 4; give it to dil.load"),
        ({"max_length": 64}, "max_length is 64, but dil.load set 1024"),
        ({"learning_rte": 1}, "unknown option 'learning_rte' .did you mean 'learning_rate'"),
        ({"columns": "chosen=good"}, "columns: give it to dil.read"),
        ({"max_steps": 0}, "--max-steps is 0; expected at least 1"),
        ({"loss": "lsiff"}, "did you mean 'lsif'"),
    ):
        with pytest.raises(dil.UserError, match=said):
            dil.train(policy, rows, output_dir=tmp_path / "run", **options)
    bad = [*rows, {"prompt": "what", "chosen": "tea"}, {"prompt": "what", "chosen": "tea", "rejected": "tea"}]
    with pytest.raises(dil.UserError, match=r"data: 2 of 14 rows cannot be used(.|\n)*data row 13: (.|\n)*data row 14: "):
        dil.train(policy, bad, output_dir=tmp_path / "run")
    with pytest.raises(dil.UserError, match="keep one kind in the data"):
        dil.train(policy, [*rows, {"prompt": "a", "chosen": "b", "rejected": "c"}], output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists() and not policy.trained
    taken = dil.read(row for row in rows)
    assert len(list(taken)) == 12
    with pytest.raises(dil.UserError, match="an iterator that was already read"):
        dil.train(policy, taken, output_dir=tmp_path / "run")
    inference = dil.load(policy.source.options.model, backend="cpu", trainable=False)
    with pytest.raises(dil.UserError, match="loaded for inference"):
        dil.train(inference, rows)


@pytest.mark.parametrize("backend_name", ["cpu"])
def test_messages_figures_and_exports(
    load: Any,
    rows: list[dict[str, Any]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Messages are log records; the run is a frame, and becomes what transformers loads, checked on rows of this package.

    Nothing is loaded again for it where the policy is as the run left it.
    """
    caplog.set_level(logging.INFO, "lite_dil")
    pairs = dil.read(rows, skip_bad_rows=True, max_rows=8)
    done = dil.train(load(), pairs, output_dir=tmp_path / "run", **OPTIONS)
    said = [record.getMessage() for record in caplog.records if record.name == "lite_dil"]
    assert any(line.startswith("training data data: 8 pairs") for line in said)
    assert said[-1].startswith("adapter in ")
    pandas = pytest.importorskip("pandas")
    frame = done.frame()
    assert isinstance(frame, pandas.DataFrame)
    np.testing.assert_array_equal(frame["loss"], [line["loss"] for line in done.metrics])
    with monkeypatch.context() as patch:
        patch.setattr(registry, "load", None)
        made = done.export(tmp_path / "merged", format="merged", check_rows=2)
        done.policy.backend.set_strength(0.5)
        with pytest.raises(TypeError):  # it would load the model as the run left it
            done.export(tmp_path / "again", format="merged", check_rows=2)
    check = json.loads((made / "export.json").read_text())["check"]
    assert (made / "config.json").is_file() and check["rows"] == 2 and check["mean"] < 1e-4
    done.policy.close()
    assert main(["train", "--resume", str(done.folder)]) == 2
    assert "rows that a program passed and no file holds" in capsys.readouterr().err
    assert (done.export(tmp_path / "alone", format="adapter", check_rows=1) / "export.json").is_file()
    with pytest.raises(dil.UserError, match="already exists"):
        done.export(tmp_path / "merged")
