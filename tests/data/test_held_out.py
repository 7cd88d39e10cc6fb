"""Holding a part of the training data out: whole prompts, by size, the same for any seed, and never trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import byte_level_tokenizer, config

from lite_dil.base.errors import UserError
from lite_dil.cli.main import main
from lite_dil.config.options import read_yaml
from lite_dil.data.dataset import DataSet, load
from lite_dil.data.encoder import Encoder
from lite_dil.data.held_out import split, wanted


def write(path: Path, rows: int, prompts: int) -> Path:
    """Rows whose prompts come again after `prompts` rows, each with answers of its own."""
    lines = [
        {"prompt": f"What is {i % prompts}?", "chosen": f" It is {i}.", "rejected": f" Not {i}, I think."} for i in range(rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(data: str, **options: Any) -> DataSet:
    return load(data, "train", Encoder(byte_level_tokenizer()), config(data=data, **options))


@pytest.mark.parametrize(
    ("rows", "fraction", "count"),
    [
        *((199, None, 0), (200, None, 10), (1000, None, 50), (4000, None, 200), (10**6, None, 200)),
        *((100, 0.1, 10), (10**4, 0.1, 1000), (1000, 0.0, 0)),
    ],
)
def test_how_many_are_wanted(rows: int, fraction: float | None, count: int) -> None:
    assert wanted(rows, fraction) == count


@pytest.mark.parametrize("weight", ["", "=2", "=0.5"])
def test_a_prompt_is_on_one_side_and_nothing_is_lost(tmp_path: Path, weight: str) -> None:
    data = read(f"{write(tmp_path / 'a.jsonl', 400, 100)}{weight}")
    training, held_out = split(data, 0.2)
    assert held_out is not None
    sides = [{example.prompt for example in part.examples} for part in (training, held_out)]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == {example.prompt for example in data.examples}
    times = {"": 1, "=2": 2, "=0.5": 1}[weight]
    assert len(training.examples) + times * len(held_out.examples) == len(data.examples)
    share = times * len(held_out.examples) / len(data.examples)
    assert 0.15 < share <= 0.2
    assert len(training.names) == len(training.examples) and len(held_out.names) == len(held_out.examples)
    assert len({(example.prompt, example.responses) for example in held_out.examples}) == len(held_out.examples)
    assert held_out.answers == {1: len(held_out.examples), -1: len(held_out.examples)}


def test_which_rows_does_not_depend_on_seed_or_order(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 300, 300)
    _, one = split(read(str(path)), None)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[i] for i in np.random.default_rng(0).permutation(len(lines))))
    _, other = split(read(str(path), seed=5), None)
    assert one and other and {e.prompt for e in one.examples} == {e.prompt for e in other.examples}
    assert len(one.examples) == 15


def test_a_fraction_that_no_prompt_fits_into_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--eval-fraction 0\.1 of 30 rows is 3"):
        split(read(str(write(tmp_path / "a.jsonl", 30, 1))), 0.1)


def test_a_run_evaluates_on_what_it_does_not_train_on(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "a.jsonl", 220, 220)
    flags = ["train", "--model", tiny, "--backend", "cpu", "--dtype", "float32", "--data", str(data), "--max-steps", "2"]
    flags += ["--report-samples", "2"]
    assert main([*flags, "--save-steps", "1", "--output-dir", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "held-out data: 11 of these rows" in said and "held out, step 2: loss" in said
    facts = json.loads((tmp_path / "run" / "report.json").read_text())["data"]
    assert [(part["use"], part["examples"]) for part in facts] == [("training", 209), ("held out", 11)]
    last = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][-1]
    assert "eval_loss" in last
    held = {e.prompt for e in split(read(str(data)), None)[1].examples}  # type: ignore[union-attr]
    samples = [json.loads(line) for line in (tmp_path / "run" / "report_samples.jsonl").read_text().splitlines()]
    assert samples and all(sample["held_out"] for sample in samples)
    encoder = Encoder(byte_level_tokenizer())
    assert {tuple(encoder.prompt(sample["prompt"])) for sample in samples} <= held


def test_a_run_of_before_holds_nothing_out(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: m\ndata: d.jsonl\n")
    assert read_yaml(tmp_path / "config.yaml")["eval_fraction"] == 0
    (tmp_path / "own.yaml").write_text("model: m\n")
    assert "eval_fraction" not in read_yaml(tmp_path / "own.yaml")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--eval-fraction", "0.1", "--eval-data", "x.jsonl"], "give one of them"),
        (["--eval-fraction", "0", "--eval-steps", "5"], "--eval-steps needs held-out data"),
        (["--eval-fraction", "0.9"], "--eval-fraction is 0.9; expected"),
    ],
)
def test_what_contradicts_itself_is_refused(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--data", "a.jsonl", *flags]) == 2
    assert said in capsys.readouterr().err


def test_steps_between_evaluations_of_nothing_are_refused(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "a.jsonl", 20, 20)
    assert main(["train", "--model", tiny, "--backend", "cpu", "--data", str(data), "--eval-steps", "5"]) == 2
    assert "nothing is held out of 20 rows" in capsys.readouterr().err
