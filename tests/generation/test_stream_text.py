"""Text from tokens as they come, with a tokenizer of each family."""

from __future__ import annotations

import random
from typing import Any

import pytest
from conftest import byte_level_tokenizer, sentencepiece_tokenizer

from lite_dil.base.text import count, one_line, printable
from lite_dil.generation.text_stream import TextStream

PARTS = ["the house", " is", "\n", "  ", "é", "日本語", "🙂", "👩‍👩‍👧", "Paris.", "\t", " a", "ß", " tea"]
TOKENIZERS = {"byte-level": byte_level_tokenizer(), "sentencepiece": sentencepiece_tokenizer()}


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_pieces_are_the_text(name: str) -> None:
    """That which the whole has after the prompt; a character of several tokens comes with its last one."""
    tokenizer, draw = TOKENIZERS[name], random.Random(0)
    for _ in range(100):
        prompt, text = "the red house", "".join(draw.choices(PARTS, k=10))
        before, tokens = ids(tokenizer, prompt), ids(tokenizer, prompt + text)
        tokens = tokens[len(before) :] if tokens[: len(before)] == before else ids(tokenizer, text)
        stream = TextStream(tokenizer, before)
        pieces = [stream.add(token) for token in tokens]
        whole = tokenizer.decode([*before, *tokens])
        assert whole.startswith(prompt)
        assert prompt + "".join(pieces) == whole
        assert "\ufffd" not in "".join(pieces)
        assert sum(map(bool, pieces)) > len(tokens) / 5  # they come as they are made, and not all at the end


def test_the_space_in_front_of_the_first_word_is_kept() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    paris = tokenizer.convert_tokens_to_ids("▁Paris")
    assert TextStream(tokenizer, ids(tokenizer, "the capital is")).add(paris) == " Paris"
    assert tokenizer.decode([paris]) == "Paris"


def test_special_tokens_and_half_a_character_are_no_text() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    stream = TextStream(tokenizer, ids(tokenizer, "the"))
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    euro = ids(tokenizer, "€")
    assert len(euro) == 3
    assert [stream.add(token) for token in [start, *euro[:2]]] == ["", "", ""]
    assert stream.add(euro[2]) == "€"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_bytes_that_make_no_character_are_no_error(name: str) -> None:
    """And what comes after them is there again."""
    tokenizer, draw = TOKENIZERS[name], random.Random(0)
    for _ in range(100):
        stream = TextStream(tokenizer, ids(tokenizer, "the"))
        for _ in range(30):
            stream.add(draw.randrange(3, len(tokenizer)))
        good = [stream.add(token) for token in ids(tokenizer, " the house is small and red")]
        assert "".join(good).endswith(" is small and red")


def test_nothing_that_a_terminal_would_obey() -> None:
    assert printable("a\x1b[31mb\x07\r\x9b\u202ec\td\ne\x7f€") == "a\\x1b[31mb\\x07\\x0d\\x9b\\u202ec\td\ne\\x7f€"
    assert printable("\ud83d \uffff") == "\\ud83d \\uffff"
    assert printable("größer 👩‍🚀 日本") == "größer 👩‍🚀 日本"


def test_text_of_one_line_and_numbers_with_their_nouns() -> None:
    assert one_line(" a\tb\n\x1b[31mc\u202e ") == "a b [31mc"
    assert [count(number, "row") for number in (0, 1, 2, 1234)] == ["0 rows", "1 row", "2 rows", "1,234 rows"]
