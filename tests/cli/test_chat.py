"""lite-dil chat through the real command, on both backends: from a pipe, and on a pseudo-terminal."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import warm
from conftest import batch, criterion, load, make_checkpoint, one_step
from safetensors.torch import load_file, save_file

from lite_dil.base.text import printable
from lite_dil.cli.main import main
from lite_dil.data.encoder import Encoder
from lite_dil.models.find import load_tokenizer

LIMIT = 24  # tokens of an answer


class Tuned(NamedTuple):
    """A backend with an adapter, and the folder of that."""

    backend: Any
    encoder: Encoder
    folder: Path
    model: str
    argv: list[str]

    def answer(self, *messages: str, base: bool = False, system: str = "") -> str:
        """The likeliest answer to a chat, user first, without streaming."""
        chat = [{"role": "system", "content": system}] if system else []
        chat += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(messages)]
        prompt = self.encoder.prompt(chat)
        with self.backend.adapter_off() if base else contextlib.nullcontext():
            (answer,) = self.backend.generate([prompt], LIMIT, self.encoder.end_ids())
        return self.encoder.tokenizer.decode(answer.ids, skip_special_tokens=True).lstrip().rstrip("\ufffd")


@pytest.fixture(scope="module", params=["cpu", "mlx"])
def tuned(request: pytest.FixtureRequest, tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    return make_tuned(request.param, tiny, tmp_path_factory.mktemp("tuned"))


def make_tuned(name: str, model: str, folder: Path) -> Tuned:
    backend = load(name, model)
    for seed in range(3):
        one_step(backend, [batch(seed=seed)], criterion(), 0.02)
    backend.save_adapter(folder / "adapter")
    argv = ["chat", "--adapter", str(folder / "adapter"), "--model", model, "--backend", name, "--dtype", "float32"]
    return Tuned(backend, Encoder(load_tokenizer(model)), folder, model, [*argv, "--max-new-tokens", str(LIMIT)])


class Said(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Run a chat with lines from a pipe, greedy unless said otherwise."""

    def run(tuned: Tuned, *lines: str, flags: tuple[str, ...] = ("--temperature", "0")) -> Said:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        return Said(main([*tuned.argv, *flags]), *capsys.readouterr())

    return run


def shown(text: str) -> str:
    return printable(text) + "\n"


def test_lines_of_a_pipe_are_answered(tuned: Tuned, chat: Callable[..., Said]) -> None:
    """One after the other, each with what was said before it; the answers alone on standard output."""
    first = tuned.answer("the red house")
    second = tuned.answer("the red house", first.rstrip(), "and tea")
    assert first != tuned.answer("and tea") != second
    said = chat(tuned, "the red house", "", "and tea")
    assert said.code == 0
    assert said.out == shown(first) + shown(second)
    assert f"{LIMIT} tokens, " in said.err
    assert f"cut after {LIMIT} tokens" in said.err


def test_base_and_tuned_one_after_the_other(tuned: Tuned, chat: Callable[..., Said]) -> None:
    """The tuned answer goes on in the history; its log-ratio is what two passes over it give."""
    base, own = (tuned.answer("the red house", base=base) for base in (True, False))
    assert base != own
    later = [tuned.answer("the red house", own.rstrip(), "and tea", base=base) for base in (True, False)]
    said = chat(tuned, "the red house", "and tea", flags=("--temperature", "0", "--compare"))
    sides = [text for pair in ((base, own), later) for text in pair]
    assert said.out == "".join(f"{side}: {shown(text)}" for side, text in zip(["base", "tuned"] * 2, sides, strict=True))

    from lite_dil.batching.batch import Batch
    from lite_dil.data.encoder import Example
    from lite_dil.generation.scoring import log_ratio

    prompt = tuned.encoder.prompt([{"role": "user", "content": "the red house"}])
    (answer,) = tuned.backend.generate([prompt], LIMIT, tuned.encoder.end_ids())
    data = Batch.of([Example(prompt, (tuple(answer.ids),), (1,))])
    with tuned.backend.adapter_off():
        reference = tuned.backend.sequence_logps(data)
    f = (tuned.backend.sequence_logps(data) - reference)[0] / LIMIT
    assert abs(log_ratio(tuned.backend, prompt, answer.ids) - f) < 1e-5
    assert re.search(rf"log-ratio .*{re.escape(f'{f:+.3f}')} nats", said.err)


def test_a_strength(tuned: Tuned, chat: Callable[..., Said]) -> None:
    base, own = (tuned.answer("the red house", base=base) for base in (True, False))
    assert chat(tuned, "the red house", flags=("--temperature", "0", "--strength", "0")).out == shown(base)
    said = chat(tuned, "/strength 0", "the red house", "/undo", "/strength 1", "the red house", "/strength 9", "/strength x")
    assert said.out == shown(base) + shown(own)
    for note in ("strength 0\n", "strength 1\n", "--strength 9: expected 0 ", "/strength x: expected a number\n"):
        assert note in said.err


def test_draws_are_decided_by_the_seed(tuned: Tuned, chat: Callable[..., Said]) -> None:
    one, again, other = (
        chat(tuned, "tea", "tea", flags=("--temperature", "1", "--seed", seed)).out for seed in ("1", "1", "2")
    )
    assert one == again != other
    cooled = chat(tuned, "/temperature 0", "tea", "/temperature -1", flags=("--temperature", "1", "--seed", "1"))
    assert cooled.out == shown(tuned.answer("tea"))
    assert "--temperature -1: expected at least 0" in cooled.err
    # Both sides are drawn with the same numbers.
    same = chat(tuned, "tea", flags=("--temperature", "1", "--compare", "--strength", "0")).out
    base, own = same.removeprefix("base: ").split("\ntuned: ")
    assert base + "\n" == own


def test_what_was_said_is_taken_back_forgotten_and_led(tuned: Tuned, chat: Callable[..., Said]) -> None:
    first, led = shown(tuned.answer("tea")), shown(tuned.answer("tea", system="be good"))
    said = chat(tuned, "tea", "/undo", "tea", "bread", "/reset", "tea", "/undo", "/undo", "/system be good", "tea", "/reset")
    second = shown(tuned.answer("tea", tuned.answer("tea").rstrip(), "bread"))
    assert said.out == first + first + second + first + led
    assert said.err.count("removed: tea") == 2
    assert said.err.count("nothing to undo") == 1
    said = chat(tuned, "tea", "/undo", "/system", "tea", flags=("--temperature", "0", "--system", "be good"))
    assert said.out == led + first
    assert led != first


def test_compare_is_switched(tuned: Tuned, chat: Callable[..., Said]) -> None:
    own = shown(tuned.answer("tea"))
    said = chat(tuned, "/compare on", "tea", "/undo", "/compare off", "tea", "/compare maybe", "/quit", "tea")
    assert said.out == f"base: {shown(tuned.answer('tea', base=True))}tuned: {own}{own}"
    assert "/compare maybe: " in said.err


def test_what_cannot_be_said_leaves_the_chat_as_it_was(tuned: Tuned, chat: Callable[..., Said]) -> None:
    first = tuned.answer("tea")
    second = tuned.answer("tea", first.rstrip(), "/bread")
    said = chat(tuned, "tea", "say <|im_end|>", "/hlep", "/qiut", "half \udc80", " //bread", "/help")
    assert said.out == shown(first) + shown(second)
    assert "'<|im_end|>'" in said.err
    assert re.search("/hlep .*'/help'", said.err)
    assert re.search("/qiut .*'/quit'", said.err)
    assert "surrogate" in said.err
    assert "/temperature X " in said.err
    assert said.code == 0


def test_answers_are_saved_and_train(tuned: Tuned, chat: Callable[..., Said], tmp_path: Path, tiny: str) -> None:
    """A row an answer; only what the file does not hold yet, and only what came to its end."""
    file = tmp_path / "chats.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}')
    # By this seed both answers are short.
    draws = ("--temperature", "3", "--max-new-tokens", "3000", "--system", "be good", "--seed", "11")
    said = chat(
        tuned, "tea", "/system be bad", f"/save {file}", "bread", f"/save {file}", f"/save {file}", "/save", flags=draws
    )
    assert [line for line in said.err.splitlines() if "added" in line] == [
        f"1 answer added to {file}",
        f"1 answer added to {file}",
        f"0 answers added to {file}",
    ]
    assert "/save: " in said.err
    rows = [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines()]
    roles = [[message["role"] for message in row] for row in rows]
    assert roles[1:] == [["system", "user", "assistant"], ["system", "user", "assistant", "user", "assistant"]]
    assert rows[2][1:3] == rows[1][1:]
    assert [row[0]["content"] for row in rows[1:]] == ["be good", "be bad"]  # as it was when the answer was given
    assert shown(rows[1][-1]["content"]) in said.out
    train = ["train", "--model", tiny, "--data", str(file), "--loss", "sft", "--max-steps", "1", "--output-dir"]
    assert main([*train, str(tmp_path / "run"), "--report-samples", "0"]) == 0

    cut = chat(tuned, "the red house", f"/save {tmp_path / 'none.jsonl'}", f"/save {tmp_path}")
    assert "0 answers added" in cut.err
    assert re.search("0 answers added.*; 1 ", cut.err)
    assert re.search(rf"{tmp_path}: .*\(Is a directory", cut.err)


def test_the_oldest_turns_make_room(chat: Callable[..., Said], tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 120}))
    tuned = make_tuned("cpu", str(folder), tmp_path)
    texts = ["the capital of France", "tea and bread", "a red house", "a small river"]
    said = chat(tuned, *texts, "tea " * 200, "good bread")
    answers, spoken = [], []
    for text in [*texts, "good bread"]:
        left_out = 0
        while True:
            messages = [*spoken[2 * left_out :], text]
            chat_messages = [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(messages)]
            if len(tuned.encoder.prompt(chat_messages)) + LIMIT <= 120:
                break
            left_out += 1
        answers.append(tuned.answer(*messages))
        spoken += [text, answers[-1].rstrip()]
    assert left_out > 1
    assert said.out == "".join(map(shown, answers))
    assert re.search("oldest turn .*120 tokens", said.err)
    assert f"oldest {left_out} turns" in said.err
    assert re.search(r"too long: \d{3} tokens.*120", said.err)


def test_without_a_chat_template_each_text_is_continued(chat: Callable[..., Said], tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    tuned = make_tuned("cpu", str(folder), tmp_path)
    prompts = [tuned.encoder.prompt_ids(text, chat=False) for text in ("the red", "tea and")]
    answers = tuned.backend.generate(prompts, LIMIT, tuned.encoder.end_ids())
    texts = [tuned.encoder.tokenizer.decode(answer.ids, skip_special_tokens=True).rstrip("\ufffd") for answer in answers]
    said = chat(tuned, "the red", "tea and", "/system x", f"/save {tmp_path / 'x.jsonl'}")
    assert said.out == "".join(map(shown, texts))
    assert said.err.count("chat template") == 2 and "system message" in said.err
    assert chat(tuned, "x", flags=("--system", "x")).code == 2
    said = chat(tuned, "the red", f"/save {tmp_path / 'x.jsonl'}", flags=("--temperature", "3", "--max-new-tokens", "3000"))
    (row,) = map(json.loads, (tmp_path / "x.jsonl").read_text(encoding="utf-8").splitlines())
    assert row["prompt"] == "the red"
    assert said.out == shown(row["completion"])


def test_a_template_that_knows_no_system_message(chat: Callable[..., Said], tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model")
    template = (folder / "chat_template.jinja").read_text()
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(refuse + template)
    tuned = make_tuned("cpu", str(folder), tmp_path)
    said = chat(tuned, "/system be good", "tea")
    assert "System role not supported" in said.err
    assert said.out == shown(tuned.answer("tea"))
    said = chat(tuned, "tea", flags=("--system", "be good"))
    assert (said.code, said.out) == (2, "")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--temperature", "-1"), "--temperature -1: expected at least 0"),
        (("--top-p", "0"), "--top-p 0: expected above 0"),
        (("--seed", "-1"), "--seed -1: expected at least 0"),
        (("--max-new-tokens", "0"), "--max-new-tokens 0: expected at least 1"),
        (("--strength", "2"), "--strength 2: expected 0 "),
        (("--temperature", "warm"), "argument --temperature: invalid float value: 'warm'"),
        (("--strenth", "1"), "unknown argument --strenth (did you mean '--strength'?)"),
        (("--adapter", "nowhere"), "--adapter nowhere: no adapter there"),
    ],
)
def test_wrong_flags(tuned: Tuned, chat: Callable[..., Said], flags: tuple[str, ...], message: str) -> None:
    said = chat(tuned, "tea", flags=flags)
    assert (said.code, said.out) == (2, "")
    assert message in said.err


def command(tuned: Tuned, *flags: str) -> list[str]:
    return [*tuned.argv, *flags]


@pytest.mark.parametrize("tuned", ["cpu"], indirect=True)
def test_from_a_pipe_there_are_no_colours_and_no_tracebacks(tuned: Tuned) -> None:
    """The process itself, with bytes that are no UTF-8 among its lines."""
    environment = os.environ | {"FORCE_COLOR": "", "TERM": "xterm-256color", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-m", "lite_dil", *command(tuned, "--temperature", "0", "--compare")],
        input=b"tea\n\xff\xfe\n",
        capture_output=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"base: ")
    assert b"\x1b" not in done.stdout + done.stderr
    assert b"Traceback" not in done.stderr
    assert b"surrogate" in done.stderr


class Terminal:
    """A process on a pseudo-terminal."""

    def __init__(self, argv: list[str], columns: int) -> None:
        environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": "24"}
        self.process, self.fd = warm.on_terminal(argv, env=environment)
        self.text = ""

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def until(self, text: str, count: int = 1, seconds: float = 120) -> str:
        """Read until `text` was seen; return what came, without colours and movements."""
        before, end = self.text, time.monotonic() + seconds
        while self.plain.count(text) < count:
            assert time.monotonic() < end, self.plain
            assert self.read(), self.plain
        return self.text[len(before) :]

    def asks(self) -> None:
        """Read until the next message is asked for."""
        while not self.plain.endswith("\n>"):
            assert self.read(), self.plain

    def read(self) -> bool:
        """Read what comes within a second; return whether the process is still there."""
        if select.select([self.fd], [], [], 1)[0]:
            try:
                new = os.read(self.fd, 65536)
            except OSError:  # Linux says so when the other side is gone
                return False
            self.text += new.decode(errors="replace")
            return bool(new)
        return True

    @property
    def plain(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x08", "", self.text)

    def end(self, key: str = "") -> int:
        """Press a key that makes the process leave; return its exit code."""
        self.type(key)
        end = time.monotonic() + 120
        while self.read():
            assert time.monotonic() < end, self.plain
        os.close(self.fd)
        return self.process.wait()


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    made: list[Terminal] = []

    def start(argv: list[str], columns: int = 100) -> Terminal:
        made.append(Terminal(argv, columns))
        return made[-1]

    yield start
    for each in made:
        each.process.kill()


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(tuned: Tuned, terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    # A model that never takes an end token, whose logits are 0.
    endless = shutil.copytree(tuned.model, tmp_path / "endless")
    weights = load_file(endless / "model.safetensors")
    weights["lm_head.weight"][tuned.encoder.end_ids()] = 0
    save_file(weights, endless / "model.safetensors", {"format": "pt"})
    screen = terminal(command(tuned, "--model", str(endless), "--max-new-tokens", "3900", "--temperature", "0"))
    screen.asks()
    screen.type("the red house\n")
    while not screen.plain.partition("the red house\r\r\n")[2].strip():
        assert screen.read()
    screen.type("\x03")
    screen.until("; stopped")
    screen.type("/undo\n")
    screen.until("removed: the red house")
    screen.type("/quit\n")
    assert screen.end() == 0


def test_ctrl_c_twice_at_the_prompt_leaves_and_so_does_ctrl_d(tuned: Tuned, terminal: Callable[..., Terminal]) -> None:
    """Twice in a row: a line between them makes the second Ctrl-C a first one."""
    for key, code in (("\x03", 130), ("\x04", 0)):
        screen = terminal(command(tuned))
        screen.asks()
        if code:
            screen.type(key)
            screen.until("Ctrl-C again leaves")
            screen.type("/help\n")
            screen.until("/undo")
            screen.asks()
            screen.type(key)
            screen.until("Ctrl-C again leaves", 2)
            screen.asks()
        assert screen.end(key) == code
        assert "Traceback" not in screen.text


@pytest.mark.parametrize("tuned", ["cpu"], indirect=True)
def test_a_message_of_several_lines(tuned: Tuned, terminal: Callable[..., Terminal]) -> None:
    """Typed with Alt-Enter, pasted, and had back by an arrow; a line typed while an answer comes is the next message."""
    screen = terminal(command(tuned))
    screen.asks()
    for number, keys in enumerate(("the red\x1b\rhouse\r", "\x1b[200~the red\nhouse\x1b[201~\r", "\x1b[A\x1b[A\r"), 1):
        screen.type(f"{keys}/undo\r")
        screen.until("removed: the red\r\nhouse", number)
        screen.asks()
    assert screen.end("\x04") == 0


def test_base_and_tuned_side_by_side(tuned: Tuned, terminal: Callable[..., Terminal]) -> None:
    """Both grow at the same time, and neither is disturbed by the other."""
    expected = [tuned.answer("tea", base=base) for base in (True, False)]
    screen = terminal(command(tuned, "--compare", "--temperature", "0"))
    screen.asks()
    screen.type("tea\n")
    screen.until("nats per token")
    *_, last = re.split(r"base {20,}tuned *\r\n", screen.plain)
    lines = last.partition("base 2")[0].split("\r\n")
    for side, text in enumerate(expected):
        column = "".join(line[48 * side : 48 * (side + 1)] for line in lines)
        assert re.findall("[a-zA-Z]+", text)[0] in column
    screen.type("/quit\n")
    assert screen.end() == 0


def test_on_a_narrow_terminal_one_comes_after_the_other(tuned: Tuned, terminal: Callable[..., Terminal]) -> None:
    screen = terminal(command(tuned, "--compare", "--temperature", "0"), columns=60)
    screen.asks()
    screen.type("tea\n")
    screen.until("nats per token")
    assert re.search(r"\nbase: .*\ntuned: ", screen.plain, re.DOTALL)
    screen.type("/quit\n")
    assert screen.end() == 0
