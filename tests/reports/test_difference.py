"""What changed between two answers: every word stays, what both have is unmarked, and answers without much in common are."""

from __future__ import annotations

import random

import pytest

from lite_dil.reports.difference import Marked, difference


def marked(pieces: list[Marked]) -> str:
    return "".join(f"[{text}]" if changed else text for text, changed in pieces)


@pytest.mark.parametrize(
    ("before", "after", "first", "second"),
    [
        ("An Indian Ocean is here.", "An Arctic Sea is here.", "An [Indian Ocean ]is here.", "An [Arctic Sea ]is here."),
        ("It is Paris.", "It is  Paris.\n", "It is Paris.", "It is  Paris.\n"),  # white space is no change
        ("Paris", "The capital is Paris", "Paris", "[The capital is ]Paris"),
        ("Yes, Rome.", "Yes, Oslo!", "Yes, [Rome.]", "Yes, [Oslo!]"),
        ("東京です", "京都です", "[東]京です", "京[都]です"),
        ("One two, three, four.", "Apples, pears, figs.", "One two, three, four.", "Apples, pears, figs."),  # only signs agree
        ("", "a", "", "a"),
        ("...", "?", "...", "?"),
    ],
)  # fmt: skip
def test_what_changed_is_marked(before: str, after: str, first: str, second: str) -> None:
    assert tuple(map(marked, difference(before, after))) == (first, second)


def test_no_character_is_lost_and_what_is_unmarked_is_in_both() -> None:
    draw = random.Random(0)
    alphabet = ["tea ", "cup\n", "is", " ", ", ", ".", "\u00e9t\u00e9 ", "日本", "_", "\U0001f375", "don't "]
    for _ in range(200):
        texts = ["".join(draw.choices(alphabet, k=draw.randint(0, 12))) for _ in range(2)]
        pieces = difference(*texts)
        assert ["".join(text for text, _ in some) for some in pieces] == texts
        if any(changed for some in pieces for _, changed in some):
            kept = ["".join("".join(text for text, changed in some if not changed).split()) for some in pieces]
            assert kept[0] == kept[1]
