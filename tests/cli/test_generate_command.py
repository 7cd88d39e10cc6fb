"""`lite-dil generate`: what is in the file, that it goes on where it stopped, and that it trains."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import config, load
from steps import saved_adapter

from lite_dil.backends import registry
from lite_dil.base.checked import mark_of, with_mark
from lite_dil.cli.main import main
from lite_dil.data.encoder import Encoder
from lite_dil.data.prompts import read_prompts
from lite_dil.data.reader import read_rows
from lite_dil.models.find import load_tokenizer

QUESTIONS = ["what is tea", "how do you make good bread and tea", "a red house", "is it", "the capital of France is"]
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(QUESTIONS) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def generate(backend_name: str, tiny: str, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command; returns its exit code and what it said."""

    def run(*flags: str, output: str = "answers.jsonl") -> tuple[int, str]:
        common = ["--model", tiny, "--backend", backend_name, "--dtype", "float32", "--max-new-tokens", "7"]
        output = output if output == "-" else str(tmp_path / output)
        code = main(["generate", str(prompts), *common, "--output", output, *flags])
        out, err = capsys.readouterr()
        return code, out + err

    return run


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_answers_in_the_order_of_the_prompts(generate: Run, backend_name: str, tiny: str, tmp_path: Path) -> None:
    code, said = generate("--batch-size", "2")
    assert code == 0 and "all 5 answers" in said
    found = rows(tmp_path / "answers.jsonl")
    assert [row["prompt"] for row in found] == [[{"role": "user", "content": question}] for question in QUESTIONS]
    # The greedy answer of the bare model, asked one by one.
    backend, encoder = load(backend_name, tiny), Encoder(load_tokenizer(tiny))
    for row in found:
        ids = encoder.prompt(row["prompt"])
        with backend.adapter_off():
            (answer,) = backend.generate([ids], 7, encoder.end_ids())
        text = encoder.tokenizer.decode(answer.ids, skip_special_tokens=True).strip()
        assert row["completion"] == [{"role": "assistant", "content": text}]


def test_every_row_tells_how_its_answers_ended(
    generate: Run, backend_name: str, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiny models never end by themselves, so that many tokens are made to end an answer here."""
    monkeypatch.setattr(Encoder, "end_ids", lambda self: list(range(2, 40)))
    made = saved_adapter(backend_name, tiny, tmp_path / "adapter")
    code, said = generate("--adapter", str(tmp_path / "adapter"), "--base")
    assert code == 0
    encoder, found, cut = Encoder(load_tokenizer(tiny)), rows(tmp_path / "answers.jsonl"), {"": 0, "base_": 0}
    for row in found:
        ids = encoder.prompt(row["prompt"])
        (answer,) = made.generate([ids], 7, encoder.end_ids())
        with made.adapter_off():
            (base,) = made.generate([ids], 7, encoder.end_ids())
        for name, (_, end) in (("", answer), ("base_", base)):
            assert row[f"{name}finish_reason"] == ("length" if end is None else "stop")
            cut[name] += end is None
    assert 0 < cut[""] < 5 and 0 < cut["base_"] < 5
    assert re.search(
        rf"--max-new-tokens 7: {cut['']} of 5 answers, {cut['base_']} of the base.*--output", said.replace("\n", " ")
    )
    assert said.count("--max-new-tokens 7: ") == 1
    # Of earlier runs of the command too.
    assert f"--max-new-tokens 7: {cut['']} of 5" in generate("--adapter", str(tmp_path / "adapter"), "--base")[1]
    # Such a file is one of prompts too, as for lite-dil label.
    asked = read_prompts(str(tmp_path / "answers.jsonl"), config(), False, print)
    assert [prompt.prompt for prompt in asked] == [row["prompt"] for row in found]


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii"])
def test_a_console_of_any_encoding_gets_the_same_rows(
    encoding: str, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["héé → 你好", "\U0001f600"]  # the last takes two of JSON's escapes
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in asked))
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    assert main(["generate", str(tmp_path / "p.jsonl"), "--model", tiny, "--max-new-tokens", "2", "--output", "-"]) == 0
    assert [json.loads(line)["prompt"] for line in raw.getvalue().decode(encoding).splitlines()] == asked


def test_nothing_cut_and_standard_output(generate: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    _, said = generate(output="-")
    assert said.count('"finish_reason": "length"') == 5 and "base_finish_reason" not in said
    assert said.count("--max-new-tokens") == 2 and "--output" not in said  # more room in the same place
    monkeypatch.setattr(Encoder, "end_ids", lambda self: list(range(512)))
    _, said = generate(output="ended.jsonl")
    assert "--max-new-tokens" not in said


def test_the_file_trains(generate: Run, backend_name: str, tiny: str, tmp_path: Path) -> None:
    generate("--temperature", "1", "--num-answers", "2")
    path = tmp_path / "answers.jsonl"
    assert [row.form for row in read_rows(str(path))] == ["demonstrations"] * 10
    flags = ["--model", tiny, "--backend", backend_name, "--dtype", "float32", "--loss", "sft", "--max-steps", "1"]
    flags += ["--report-samples", "0"]
    assert main(["train", "--data", str(path), *flags, "--output-dir", str(tmp_path / "run")]) == 0


def test_a_file_goes_on_and_is_never_written_over(
    generate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend_name: str
) -> None:
    flags = ("--temperature", "1", "--num-answers", "2", "--batch-size", "3")
    assert generate(*flags, output="whole.jsonl")[0] == 0
    content, path = (tmp_path / "whole.jsonl").read_bytes(), tmp_path / "answers.jsonl"
    load_backend = registry.load

    def stop_in_the_second_batch(*arguments: Any) -> Any:
        backend = load_backend(*arguments)
        generate, calls = backend.generate, []

        def counted(*arguments: Any) -> Any:
            calls.append(arguments)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return generate(*arguments)

        backend.generate = counted
        return backend

    with monkeypatch.context() as patch:
        patch.setattr(registry, "load", stop_in_the_second_batch)
        code, said = generate(*flags)
    assert code == 130 and "6 of 10 answers" in said and str(path) in said
    assert len(rows(path)) == 6 and set(path.read_bytes().splitlines()) < set(content.splitlines())
    # Killed while it wrote a line, and gone on with.
    path.write_bytes(path.read_bytes()[:-9])
    code, said = generate(*flags)
    assert code == 0 and "5 of 10 answers" in said
    assert path.read_bytes() == content
    code, said = generate(*flags)
    assert code == 0 and "0 to generate" in said and "on cpu" not in said  # no model was loaded
    for other in (("--seed", "1"), ("--max-new-tokens", "6"), ("--temperature", "2"), ("--top-p", "0.5")):
        code, said = generate(*flags, *other)
        assert code == 2 and str(path) in said and "--output" in said
    assert path.read_bytes() == content


def test_what_training_would_refuse_is_said_whenever_it_was_drawn(generate: Run, tmp_path: Path) -> None:
    _, said = generate()
    path = tmp_path / "answers.jsonl"
    assert "--max-new-tokens 7: 5" in said and "empty" not in said
    first, *others = rows(path)
    first["completion"][0]["content"] = " "
    path.write_text("".join(json.dumps(row) + "\n" for row in (first, *others)), encoding="utf-8")
    code, said = generate()
    assert code == 2 and f"{path} line 1 was changed; remove it, and its answer is generated again" in said
    first = with_mark(first | {"key": mark_of(first, "key")[0]}, "key")  # as if it had been drawn so
    path.write_text("".join(json.dumps(row) + "\n" for row in (first, *others)), encoding="utf-8")
    code, said = generate()
    assert code == 0 and "empty answers: 1" in said and "--max-new-tokens 7: 5 of 5" in said


def test_the_base_beside_the_adapter(generate: Run, backend_name: str, tiny: str, tmp_path: Path) -> None:
    saved_adapter(backend_name, tiny, tmp_path / "adapter")
    given = ("--adapter", str(tmp_path / "adapter"))
    assert generate(output="bare.jsonl")[0] == 0
    assert generate(*given, output="tuned.jsonl")[0] == 0
    assert generate(*given, "--base", output="both.jsonl")[0] == 0
    bare, tuned, both = (rows(tmp_path / f"{name}.jsonl") for name in ("bare", "tuned", "both"))
    assert [row["completion"] for row in bare] == [row["base"] for row in both]
    assert [row["completion"] for row in tuned] == [row["completion"] for row in both]
    assert all(row["completion"] != row["base"] for row in both)
    # The adapter switched off by its strength is the base.
    assert generate(*given, "--strength", "0", output="off.jsonl")[0] == 0
    assert [row["completion"] for row in rows(tmp_path / "off.jsonl")] == [row["completion"] for row in bare]


def test_standard_output_has_the_rows_alone(
    backend_name: str, tiny: str, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", tiny, "--backend", backend_name, "--max-new-tokens", "3", "--batch-size", "2", "--output", "-"]
    assert main(["generate", str(prompts), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["prompt"][0]["content"] for line in lines] == QUESTIONS


def test_plain_text_is_continued_unless_asked_as_chat(generate: Run, prompts: Path, tmp_path: Path) -> None:
    prompts.write_text("the capital of\n")
    assert generate("--no-chat", output="text.jsonl")[0] == 0
    (row,) = rows(tmp_path / "text.jsonl")
    assert row["prompt"] == "the capital of" and isinstance(row["completion"], str)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num-answers", "2"), "--num-answers 2 at --temperature 0 gives equal answers"),
        (("--num-answers", "0"), "--num-answers 0: expected at least 1"),
        (("--batch-size", "0"), "--batch-size 0: expected at least 1"),
        (("--max-new-tokens", "x"), "--max-new-tokens: invalid int value"),
        (("--top-p", "0"), "--top-p 0: expected above 0"),
        (("--base",), "--base also writes the answer without the adapter"),
        (("--adapter", "nowhere"), "no adapter there"),
        (("--max-length", "5"), "leaves no room for a prompt"),
        (("--columns", "prompt=x"), "no column 'x'"),
    ],
)
def test_refusals(
    flags: tuple[str, ...], message: str, tiny: str, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "answers.jsonl"
    assert main(["generate", str(prompts), "--model", tiny, "--output", str(output), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()
