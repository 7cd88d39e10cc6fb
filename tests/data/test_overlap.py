"""Held-out rows that are training rows too: counted when they are read, and said wherever they are judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import byte_level_tokenizer, config, write_pairs

from lite_dil.cli.main import main
from lite_dil.data.dataset import load
from lite_dil.data.encoder import Encoder
from lite_dil.data.overlap import Overlap, overlap


def pair(prompt: Any, chosen: str, rejected: str) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def single(prompt: str, answer: str, label: bool) -> dict[str, Any]:
    return {"prompt": prompt, "completion": answer, "label": label}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def encoder() -> Encoder:
    return Encoder(byte_level_tokenizer())


TRAINING = [pair("what is tea", " good", " red"), pair("how", " is it", " is Paris"), pair("a house", " small", " blue")]


@pytest.mark.parametrize(
    ("row", "shares"),
    [
        (TRAINING[0], (1, 1)),
        (pair("what is tea", " red", " good"), (1, 1)),  # whichever is preferred
        (pair("what is tea", " good", " blue"), (0, 1)),
        (pair("what is", " tea good", " tea red"), (0, 0)),  # the same text, split elsewhere
        (pair("how is", " it", " Paris"), (0, 0)),
        (pair("tea", " good", " red"), (0, 0)),
        (pair([{"role": "user", "content": "how"}], " is it", " is Paris"), (0, 0)),  # not the same tokens
    ],
)
def test_what_is_the_same_row(row: dict[str, Any], shares: tuple[int, int], encoder: Encoder, tmp_path: Path) -> None:
    files = write(tmp_path / "a.jsonl", TRAINING), write(tmp_path / "b.jsonl", [row])
    training, held_out = (load(file, "train", encoder, config()) for file in files)
    assert overlap(training, held_out) == Overlap(1, *shares)


def test_rows_are_told_apart_before_they_are_cut(encoder: Encoder, tmp_path: Path) -> None:
    """What a cut leaves of two prompts may be the same; and what it leaves of one may differ with the answers."""
    short, long = " good", " good" * 8
    files = (
        write(tmp_path / "a.jsonl", [pair("one house and tea and tea", short, " red"), pair("what is " * 9, short, " red")]),
        write(tmp_path / "b.jsonl", [pair("a river and tea and tea", short, " red"), pair("what is " * 9, long, " red")]),
    )
    training, held_out = (load(file, "train", encoder, config(max_length=6)) for file in files)
    assert training.prompts_cut == held_out.prompts_cut == 2
    assert training.examples[0].prompt[1:] == held_out.examples[0].prompt[1:]
    assert overlap(training, held_out) == Overlap(2, 0, 1)


def test_rows_are_those_of_an_epoch(encoder: Encoder, tmp_path: Path) -> None:
    rows = [pair(f"{number} tea", " good", " red") for number in range(40)]
    path, other = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", [*rows[30:], pair("tea", " a", " b")])
    half = load(f"{path}=0.5", "train", encoder, config())
    left = {example.prompt for example in half.examples}
    whole = load(path, "train", encoder, config())
    assert overlap(half, whole) == Overlap(40, 20, 20)
    shared = sum(encoder.prompt_ids(f"{number} tea", chat=False) in left for number in range(30, 40))
    assert overlap(half, load(other, "train", encoder, config())) == Overlap(11, shared, shared) != Overlap(11, 10, 10)
    assert overlap(whole, load(f"{other}=2", "train", encoder, config())) == Overlap(22, 20, 20)
    # Bad answers that a loss leaves out are no training rows of it.
    labelled = write(tmp_path / "c.jsonl", [single("a", " tea", True), single("b", " tea", False), single("c", " tea", True)])
    good = load(labelled, "train", encoder, config(), good_only=True)
    assert overlap(good, load(labelled, "train", encoder, config())) == Overlap(3, 2, 2)


def test_a_row_takes_16_bytes(encoder: Encoder, tmp_path: Path) -> None:
    """Whatever it holds, and no two of many have the same name."""
    rows = [pair(f"{number}", f" {number}" * 50, " tea") for number in range(500)]
    data = load(write(tmp_path / "a.jsonl", rows), "train", encoder, config())
    assert data.names.nbytes == 16 * 500 and len(np.unique(data.names)) == 1000


@pytest.mark.parametrize("loss", ["lsif", "sft"])
def test_training_and_its_report_say_it(
    loss: str, tiny: str, backend_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in write_pairs(tmp_path / "pairs.jsonl", 12).read_text().splitlines()]
    data, fresh = write(tmp_path / "a.jsonl", rows[:6]), write(tmp_path / "fresh.jsonl", rows[9:])
    other = {**rows[5], "rejected": rows[9]["rejected"]}
    held_out = write(tmp_path / "b.jsonl", [*rows[4:6], other, *rows[9:]])
    flags = ["--model", tiny, "--backend", backend_name, "--dtype", "float32", "--data", data, "--loss", loss]
    flags += ["--max-steps", "1", "--report-samples", "0"]
    said = (
        "2 of 6 held-out rows are training rows too (the same prompt and responses), 1 more has the prompt of a training row, "
        "but not all its responses: the held-out figures say less about new prompts"
    )
    for name, file, counts in (("overlap", held_out, (6, 2, 3)), ("fresh", fresh, (3, 0, 0))):
        shared = counts[1] > 0
        assert main(["train", *flags, "--eval-data", file, "--output-dir", str(tmp_path / name)]) == 0
        out, page = capsys.readouterr().out, (tmp_path / name / "report.html").read_text()
        assert out.count(f"warning: {said}\n") == shared and (said in page) == shared
        assert ("training row" in out) == shared and ("Beware: 2 of 6" in page) == shared
        assert (f"Note: {said}." in (tmp_path / name / "adapter" / "README.md").read_text()) == shared
        facts = json.loads((tmp_path / name / "report.json").read_text())["data"]
        assert tuple(facts[1]["in_training"].values()) == counts
        assert "in_training" not in facts[0]
