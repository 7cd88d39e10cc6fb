"""How `lite-dil data` shows data: token by token, in colours or plain, and nothing of it commands the terminal."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import byte_level_tokenizer, sentencepiece_tokenizer
from rich.console import Console
from test_data_command import data, pair, words, write

from lite_dil.base.text import visible
from lite_dil.cli.main import main
from lite_dil.cli.show_data import Show
from lite_dil.data.inspect.pieces import pieces

__all__ = ["data"]  # a fixture


@pytest.mark.parametrize("make", [byte_level_tokenizer, sentencepiece_tokenizer])
def test_pieces_are_the_text_token_by_token(make: Any) -> None:
    tokenizer = make()
    before = tokenizer("what is", add_special_tokens=False).input_ids
    for text in (" the capital", " Paris\n\nis 😀 日本 é", "  two  spaces ", "a\ufffd", "\ufffd\ufffd the"):
        whole = tokenizer(f"what is{text}{tokenizer.eos_token}", add_special_tokens=False).input_ids
        found = pieces(tokenizer, whole[len(before) :], before)
        assert "".join(piece.text for piece in found) == text + tokenizer.eos_token
        assert sum(piece.tokens for piece in found) == len(whole) - len(before)
        assert [piece.special for piece in found] == [False] * (len(found) - 1) + [True]
        if "�" not in text:
            assert all(piece.tokens == 1 or len(piece.text) == 1 for piece in found)


EVIL = "a\x1b[31mred\x1b]0;title\x07 [bold]b[/bold]\u202e \u200b\x9b2J\r"


def hostile(path: Path) -> str:
    rows = [pair(EVIL + str(n), f"the {EVIL}", "red") for n in range(3)]
    return write(path, [*rows, {EVIL: 1, "prompt": "p"}, {**pair("a", "b", "c"), "prompt": [{"role": EVIL, "content": "a"}]}])


def test_escape_sequences_reach_no_terminal(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", hostile(tmp_path / "a\x1b[31m.jsonl"), "--model", tiny]) == 2
    out = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in out)
    assert r"\x1b" in out and r"\u202e" in out and r"\r" in out
    assert re.sub("[│\n]| {4}", "", out).count("[bold]b[/bold]") >= 6  # markup is text


def shown(found: dict[str, Any], **options: Any) -> str:
    console = Console(file=io.StringIO(), width=120, highlight=False, **options)
    Show(console).all(found, "lite-dil train")
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_terminal_gets_colours_and_nothing_else_of_the_data(data: Any, tmp_path: Path) -> None:
    _, found = data(hostile(tmp_path / "a.jsonl"))
    out = shown(found, force_terminal=True, color_system="standard", no_color=False)
    sequences = set(re.findall(r"\x1b(?!\[[0-9;]*m)", out)) | {c for c in out if not c.isprintable() and c not in "\n\x1b"}
    assert not sequences
    assert "\x1b[7;32m<|im_end|>" in out  # a control token that is trained, of chosen
    assert "\x1b[7;31m<|im_end|>" in out
    assert "\x1b[2m" in out and "\x1b[4;32m" in out and "│" not in out
    for options in ({"force_terminal": False}, {"force_terminal": True, "color_system": "standard", "no_color": True}):
        plain = shown(found, **options)
        assert "red│<|im_end|>" in plain and "\x1b[4" not in plain and "\x1b[7" not in plain


def test_long_parts_show_their_ends(data: Any, tmp_path: Path) -> None:
    prompt = " what" * 50 + " tea" * 450
    _, found = data(write(tmp_path / "a.jsonl", [pair(prompt, words(300), words(5))]), "--max-length", "2000")
    lines = [line.strip() for line in shown(found).splitlines()]
    assert "[... 400 tokens not shown ...]" in lines  # 500 less the first 40 and the last 60
    assert "[... 61 tokens not shown ...]" in lines  # 301 less 160 and 80
    at = lines.index("[... 400 tokens not shown ...]")
    assert lines[at - 1].split("│") == ["what", *[" what"] * 39]
    assert lines[at + 1].split("│") == ["tea", *[" tea"] * 59]


def test_visible_keeps_what_can_be_printed() -> None:
    assert visible("héllo 日本 [b]") == "héllo 日本 [b]"
    assert visible("a\tb\nc\x1b") == r"a\tb\nc\x1b"
    assert visible("a\nb", lines=True) == "a↵\nb"
