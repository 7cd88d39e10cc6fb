"""`lite-dil label`: every key, what is on disk after each, crashes and undo, and that the file trains."""

from __future__ import annotations

import io
import json
import os
import select
import shlex
import signal
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import warm
from steps import saved_adapter

from lite_dil.base.text import printable
from lite_dil.cli.main import main
from lite_dil.data.prompts import Prompt
from lite_dil.data.reader import read_rows
from lite_dil.labelling.labels import Candidate, Labels

QUESTIONS = ["what is tea", "how do you make good bread and tea", "a red house"]
Label = Callable[..., tuple[int, str]]
# Of what is above the backends, and the same code for both.
one_backend = pytest.mark.parametrize("backend_name", ["cpu"])


def write_prompts(folder: Path, *questions: str) -> str:
    (folder / "prompts.txt").write_text("".join(f"{question}\n" for question in questions or QUESTIONS), encoding="utf-8")
    return str(folder / "prompts.txt")


def command(name: str, model: str, folder: Path) -> list[str]:
    output = str(folder / "labels.jsonl")
    flags = ["--model", model, "--backend", name, "--dtype", "float32", "--max-new-tokens", "7", "--output", output]
    return ["label", str(folder / "prompts.txt"), *flags]


@pytest.fixture
def label(
    backend_name: str, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Label:
    """Runs the command on a pipe with these lines; returns its exit code and what it said."""
    write_prompts(tmp_path)

    def run(keys: str, *flags: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(keys.replace(" ", "\n") + "\n" if keys else ""))
        code = main([*command(backend_name, tiny, tmp_path), *flags])
        out, err = capsys.readouterr()
        return code, out + err

    return run


def rows(folder: Path, name: str = "labels") -> list[dict[str, Any]]:
    path = folder / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def question(row: dict[str, Any]) -> str:
    return row["prompt"][0]["content"]


def said(answer: list[dict[str, str]]) -> str:
    (message,) = answer
    assert message["role"] == "assistant"
    return message["content"]


def test_1_and_2_take_one_and_refuse_the_other(label: Label, tmp_path: Path) -> None:
    code, text = label("1 1 1")
    first = rows(tmp_path)
    assert code == 0 and printable(text) == text
    assert any(printable(said(row[side])) != said(row[side]) for row in first for side in ("chosen", "rejected"))
    (tmp_path / "labels.jsonl").unlink()
    assert label("2 x 1 2")[0] == 0  # a key without a meaning changes nothing
    second = rows(tmp_path)
    assert [question(row) for row in first] == [question(row) for row in second] == QUESTIONS
    for one, other, same in zip(first, second, (False, True, False), strict=True):
        sides = (said(one["chosen"]), said(one["rejected"]))
        assert sides[0] != sides[1]
        assert (said(other["chosen"]), said(other["rejected"])) == (sides if same else sides[::-1])
    assert not (tmp_path / "labels.bad.jsonl").exists()


@one_backend
def test_both_bad_and_typed(label: Label, tmp_path: Path) -> None:
    code, text = label("b b 2 t a\tdrink q")
    assert code == 0
    bad, pairs = rows(tmp_path, "labels.bad"), rows(tmp_path)
    assert [(question(row), row["label"]) for row in bad] == [(QUESTIONS[0], False)] * 4
    assert [row.form for row in read_rows(str(tmp_path / "labels.bad.jsonl"))] == ["unpaired"] * 4
    # The one taken wins against the one beside it and all that were bad; no two are the same.
    assert [question(row) for row in pairs] == [QUESTIONS[0]] * 5 + [QUESTIONS[1]] * 2
    assert len({said(row["chosen"]) for row in pairs[:5]}) == 1
    assert [said(row["rejected"]) for row in pairs[1:5]] == [said(row["completion"]) for row in bad]
    assert len({said(row["rejected"]) for row in pairs[:5]} | {said(pairs[0]["chosen"])}) == 6
    assert [row.get("earlier", False) for row in pairs] == [False, *[True] * 4, False, False]
    # A typed one wins against both.
    assert [said(row["chosen"]) for row in pairs[5:]] == ["a\tdrink"] * 2
    assert said(pairs[5]["rejected"]) != said(pairs[6]["rejected"])
    assert [row["from"]["chosen"] for row in pairs[5:]] == ["typed"] * 2
    assert "7 pairs in" in text and "4 bad answers in" in text


@one_backend
def test_bad_ones_are_known_after_a_restart(label: Label, tmp_path: Path) -> None:
    assert label("b")[0] == 0  # and the end of the input, which is q
    assert label("1 q")[0] == 0
    bad, pairs = rows(tmp_path, "labels.bad"), rows(tmp_path)
    assert [said(row["rejected"]) for row in pairs[1:]] == [said(row["completion"]) for row in bad]
    assert len(pairs) == 3 and {said(row["rejected"]) for row in pairs[:1]}.isdisjoint(said(r["completion"]) for r in bad)


@one_backend
def test_undo_takes_back_exactly_the_last_decisions(label: Label, tmp_path: Path) -> None:
    _, text = label("u q")
    assert text.count("nothing to undo") == 1
    assert label("1 q")[0] == 0
    before = (tmp_path / "labels.jsonl").read_bytes()
    # A pair of one, then: bad, taken (three rows), skipped, all of it taken back, and once too often.
    _, text = label("b 1 s u u u u q")
    assert (tmp_path / "labels.jsonl").read_bytes() == before
    assert (tmp_path / "labels.bad.jsonl").read_bytes() == b""
    assert text.count("decision is undone") == 3 and text.count("nothing to undo") == 1
    # What is shown after undo is what was shown before, and is taken as such.
    label("2 u 1 q")
    taken = rows(tmp_path)[1]
    (tmp_path / "labels.jsonl").write_bytes(before)
    label("2 q")
    other = rows(tmp_path)[1]
    assert (taken["chosen"], taken["rejected"]) == (other["rejected"], other["chosen"])


@one_backend
def test_it_goes_on_with_what_is_left(label: Label, tmp_path: Path) -> None:
    _, text = label("s 1 q")
    assert [question(row) for row in rows(tmp_path)] == [QUESTIONS[1]]
    write_prompts(tmp_path, *reversed(QUESTIONS), "is it")
    _, text = label("1 1 1")
    assert "1 of 4 prompts" in text and "3 remain" in text
    assert [question(row) for row in rows(tmp_path)] == [QUESTIONS[1], QUESTIONS[2], QUESTIONS[0], "is it"]
    code, text = label("")
    assert code == 0 and "4 of 4 prompts" in text and "on CPU" not in text
    # A line that was cut off is gone, and its prompt is asked again.
    path = tmp_path / "labels.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[:-7])
    label("q")
    assert path.read_bytes() == b"".join(content.splitlines(keepends=True)[:3])
    label("1")
    assert path.read_bytes() == content  # the same answers, in the same places


def test_the_file_trains_by_the_command_that_is_told(label: Label, backend_name: str, tiny: str, tmp_path: Path) -> None:
    made = saved_adapter(backend_name, tiny, tmp_path / "adapter")
    assert made
    _, text = label("1 b 2 t tea", "--adapter", str(tmp_path / "adapter"))
    told = text.split("train on them: ")[1].splitlines()[0]
    assert "--reference initial-adapter" in told
    words = shlex.split(told)
    assert words[:2] == ["lite-dil", "train"]
    short = ["--max-steps", "1", "--report-samples", "0"]
    assert main([*words[1:], "--dtype", "float32", *short, "--output-dir", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "adapter").is_dir()
    found = read_rows(str(tmp_path / "labels.jsonl"))
    assert [row.form for row in found] == ["pairs"] * 6 and all(row.chat for row in found)


@one_backend
def test_the_data_command_has_no_complaint(
    label: Label, backend_name: str, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    label("1 b 2 t tea")
    for name, count in (("labels", 6), ("labels.bad", 2)):
        main(["data", str(tmp_path / f"{name}.jsonl"), "--model", tiny, "--json"])
        found = json.loads(capsys.readouterr().out)
        assert [(source["kept"], source["left_out"]) for source in found["sources"]] == [(count, [])]
        if name == "labels":
            assert found["warnings"] == [] and not found["stops"]


def test_plain_text_is_continued_in_its_own_form(label: Label, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("the capital of\nthe red\n")
    assert label("1 t Paris", "--no-chat")[0] == 0
    pairs = rows(tmp_path)
    assert all(isinstance(row[side], str) for row in pairs for side in ("prompt", "chosen", "rejected"))
    assert pairs[1]["chosen"].strip() == "Paris" and not read_rows(str(tmp_path / "labels.jsonl"))[0].chat
    code, text = label("1")
    assert code == 2 and "one kind" in text


def test_against_the_base(label: Label, tmp_path: Path, backend_name: str, tiny: str) -> None:
    saved_adapter(backend_name, tiny, tmp_path / "adapter")
    write_prompts(tmp_path, *(f"{a} {b}" for a in ("what is", "make", "the red") for b in ("tea", "bread", "house")))
    flags = ("--adapter", str(tmp_path / "adapter"), "--against-base", "--temperature", "0")
    # The likeliest answers of both, by the other command.
    both = ["generate", *command(backend_name, tiny, tmp_path)[1:-1], str(tmp_path / "both.jsonl")]
    assert main([*both, "--adapter", str(tmp_path / "adapter"), "--base"]) == 0
    answers = {question(row): (said(row["completion"]), said(row["base"])) for row in rows(tmp_path, "both")}
    code, text = label("1 1 1 1 1 1 1 1 t tea", *flags)
    assert code == 0
    won, met = 0, 0
    for row in rows(tmp_path):
        tuned, base = answers[question(row)]
        for side in ("chosen", "rejected"):
            if row["from"][side] == "typed":
                continue
            assert said(row[side]) == (base if row["from"][side] == "base" else tuned)
        if row["from"]["chosen"] != "typed":
            met, won = met + 1, won + (row["from"]["chosen"] != "base")
    assert met == 8 and 0 < won < 8  # always 1: were the sides not in a random order, all or none
    assert f"chosen {won} of 8 times" in text and "tuned-" not in text


@one_backend
def test_an_answer_that_cannot_be_trained_on_is_asked_for_again(
    label: Label,
    backend_name: str,
    tiny: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", stdin := io.TextIOWrapper(io.BytesIO(b"t\n\xff tea\nq\n"), encoding="utf-8"))
    main(command(backend_name, tiny, tmp_path))
    assert stdin.errors == "surrogateescape" and "surrogate" in capsys.readouterr().out
    _, text = label("t a<|im_end|>b t  t tea q")
    assert "trained on" in text and "no new answer" in text
    assert [said(row["chosen"]) for row in rows(tmp_path)] == ["tea", "tea"]


@one_backend
def test_the_editor(label: Label, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "editor.py"
    script.write_text("import sys; p = sys.argv[1]; t = open(p).read(); open(p, 'w').write(t + '\\nand more\\n')")
    monkeypatch.setenv("VISUAL", f"{shlex.quote(sys.executable)} {shlex.quote(str(script))}")
    label("e 2 e n q")
    pairs = rows(tmp_path)
    assert said(pairs[0]["chosen"]) == said(pairs[1]["rejected"]) + "\nand more"
    assert said(pairs[2]["chosen"]) == "and more" and len(pairs) == 4
    # An editor that cannot be used, one that fails, and one that is left without a change, take nothing.
    for editor, problem in (("/nowhere/editor", "cannot be used"), ("false", "exit code 1"), ("true", "no new answer")):
        monkeypatch.setenv("VISUAL", editor)
        _, text = label("e 1 q")
        assert problem in text and len(rows(tmp_path)) == 4


@one_backend
def test_foreign_files_are_refused(label: Label, tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    talks = [[{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}] for answer in "yz"]
    without_prompt = json.dumps({"from": {}, "chosen": talks[0], "rejected": talks[1]}) + "\n"
    for content in ("dear diary", "dear diary\n", '{"prompt": "x"}\n', without_prompt):
        path.write_text(content)
        code, text = label("1")
        assert code == 2 and "give another" in text and path.read_text() == content


@one_backend
def test_other_refusals(label: Label, tmp_path: Path) -> None:
    for flags, message in (
        (("--temperature", "0"), "--temperature 0 gives the same answer twice"),
        (("--against-base",), "give --adapter"),
        (("--max-new-tokens", "0"), "expected at least 1"),
    ):
        code, text = label("1", *flags)
        assert code == 2 and message in text
    assert not (tmp_path / "labels.jsonl").exists()


class Terminal:
    """The command on a terminal of its own."""

    def __init__(self, argv: list[str], folder: Path) -> None:
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "PYTHONUNBUFFERED": "1"}
        self.process, self.master = warm.on_terminal(argv, env=environment, cwd=folder)
        self.seen = ""

    def until(self, text: str, times: int = 1) -> str:
        """Read until `text` was seen so many times since the last call; return what was read."""
        while self.seen.count(text) < times:
            ready, _, _ = select.select([self.master], [], [], 120)
            assert ready, f"nothing more after: {self.seen[-500:]}"
            try:
                self.seen += os.read(self.master, 65536).decode(errors="replace")
            except OSError:  # the other side is gone
                raise AssertionError(f"it ended: {self.seen[-2000:]}") from None
        found, self.seen = self.seen, ""
        return found

    def press(self, keys: str) -> None:
        # The question stands a moment before the terminal is asked for a key, and drops what came earlier.
        self.asks()
        os.write(self.master, keys.encode())

    def asks(self) -> None:
        """Wait until a single key is asked for."""
        while self.takes_lines():
            assert self.process.poll() is None
            time.sleep(0.01)

    def takes_lines(self) -> bool:
        """Return whether the terminal is as a shell needs it, and no single key is asked for."""
        return bool(termios.tcgetattr(self.master)[3] & termios.ICANON)

    def close(self) -> int:
        """Wait for its end; return the exit code."""
        while True:
            try:
                if not os.read(self.master, 65536):
                    break
            except OSError:
                break
        os.close(self.master)
        return self.process.wait()


def test_single_keys_on_a_terminal(tiny: str, tmp_path: Path) -> None:
    write_prompts(tmp_path)
    terminal = Terminal(command("cpu", tiny, tmp_path), tmp_path)
    os.write(terminal.master, b"1")  # nothing is asked yet
    terminal.until("[q]uit")
    terminal.press("\x1b[2~")  # the insert key is not 2
    terminal.until("[q]uit")
    terminal.press("12")  # the 2 came before the question that it would answer
    terminal.until("[q]uit")
    assert len(rows(tmp_path)) == 1  # on disk before the next question
    terminal.press("t")
    terminal.until("better answer:")
    os.write(terminal.master, "good tea, ü\n".encode())
    terminal.until("[q]uit")
    assert [said(row["chosen"]) for row in rows(tmp_path)[1:]] == ["good tea, ü"] * 2
    terminal.press("u")
    terminal.until("[q]uit")
    assert len(rows(tmp_path)) == 1
    terminal.press("q")
    text = terminal.until("train on them")
    assert "1 pair in" in text
    assert terminal.close() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_says_what_there_is(number: int, tiny: str, tmp_path: Path) -> None:
    write_prompts(tmp_path)
    terminal = Terminal(command("cpu", tiny, tmp_path), tmp_path)
    terminal.until("[q]uit")
    terminal.press("2")
    terminal.until("[q]uit")
    terminal.asks()
    terminal.process.send_signal(number)
    terminal.until("train on them")
    assert terminal.takes_lines()
    assert terminal.close() == 130
    assert len(rows(tmp_path)) == 1


def test_a_killed_process_loses_nothing(label: Label, backend_name: str, tiny: str, tmp_path: Path) -> None:
    terminal = Terminal(command(backend_name, tiny, tmp_path), tmp_path)
    terminal.until("[q]uit")
    for key in ("b", "1"):
        terminal.press(key)
        terminal.until("[q]uit")
    terminal.process.kill()
    assert terminal.close() == -signal.SIGKILL
    pairs, bad = rows(tmp_path), rows(tmp_path, "labels.bad")
    assert len(pairs) == 3 and len(bad) == 2
    _, text = label("1 1")
    assert "1 of 3 prompts" in text
    assert rows(tmp_path)[:3] == pairs and [question(row) for row in rows(tmp_path)[3:]] == QUESTIONS[1:]


def test_a_bad_answer_of_before_is_no_win_against_its_model(tmp_path: Path) -> None:
    """It was not beside the one that was taken: nobody compared the two blindly."""
    labels, prompt = Labels(tmp_path / "labels.jsonl"), Prompt("what is", "")
    labels.reject(prompt, [Candidate(" a", "tuned-1"), Candidate(" b", "base")])
    shown = [Candidate(" c", "tuned-1"), Candidate(" d", "base")]
    assert labels.take(prompt, shown[0], shown) == 3

    def wins(labels: Labels) -> list[tuple[int, int]]:
        return [labels.wins(*names) for names in (("tuned-1", "base"), ("base", "tuned-1"), ("tuned-2", "base"))]

    assert wins(labels) == [(1, 1), (0, 1), (0, 0)]
    del labels  # a file has one writer
    assert wins(Labels(tmp_path / "labels.jsonl")) == [(1, 1), (0, 1), (0, 0)]


def test_no_two_different_answers_are_said_and_passed_over(label: Label, tmp_path: Path) -> None:
    code, text = label("1 1 1", "--temperature", "0.0001")
    assert code == 0 and text.count("skipped, because") == 3 and "line 2: skipped, because" in text
    assert rows(tmp_path) == []
