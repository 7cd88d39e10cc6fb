"""Rewards by checks of the answer and by Python functions, and their sums."""

from __future__ import annotations

import time
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from lite_dil.base.errors import UserError
from lite_dil.rewards.answer import AnswerSource, choice, exact, number
from lite_dil.rewards.function import FunctionSource
from lite_dil.rewards.source import Answered
from lite_dil.rewards.spec import parse, resolved, sources
from lite_dil.rewards.total import TotalReward


def answered(response: str, ended: bool = True, place: str = "q.jsonl line 1", **columns: Any) -> Answered:
    return Answered("Q:", response, (1,), (2,), ended, columns, place)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("12 apples and 30 pears make 42.", "42"),
        ("<think>7</think> It is 5", "5"),
        ("It is 5 #### 6 #### 1,234.50", "1234.5"),
        ("so \\boxed{\\frac{9}{10}}, or \\boxed{8}; 3 checks", "8"),
        ("#### 4 then \\boxed{9}", "9"),
        ("temperature is \u22123.5 degrees", "-3.5"),
        ("10-15 of them", "15"),
        ("<think>maybe 7", None),
        ("none", None),
    ],
)
def test_numbers(text: str, found: str | None) -> None:
    assert number(text) == (None if found is None else Decimal(found))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("B", "B"),
        ("(c)", "C"),
        ("A dog would say so. The answer is (D).", "D"),
        ("A is wrong, so B. I think", "B"),
        ("Option C: a river", "C"),
        ("I am a house", None),
        ("\\boxed{E}", "E"),
    ],
)
def test_choices(text: str, found: str | None) -> None:
    assert choice(text) == found


def test_exact_text() -> None:
    assert exact(" cafe\u0301\n") == "caf\u00e9"
    assert exact("<think>x</think>Paris ") == "Paris"


def test_an_answer_is_right_or_not() -> None:
    both = [answered("It is 4.0", answer="2 + 2 = 4 #### 4"), answered("5", answer=4), answered("no", solution="1")]
    assert AnswerSource("number").rewards(both).tolist() == [1.0, 0.0, 0.0]


def test_rows_without_an_answer_are_refused() -> None:
    with pytest.raises(UserError, match=r"line 1: answer:number needs the right answer in a column answer or .* has topic"):
        AnswerSource("number").rewards([answered("4", topic="sums")])
    with pytest.raises(UserError, match="finds nothing to compare with in the row's answer 'four'"):
        AnswerSource("number").rewards([answered("4", answer="four")])


def test_a_function_has_trls_signature() -> None:
    seen = {}

    def judge(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        seen.update(prompts=prompts, completions=completions, **columns)
        return [len(completion) for completion in completions]

    chat = Answered("<user>Q", "yes", (1,), (2,), True, {"level": 2}, "", [{"role": "user", "content": "Q"}])
    assert FunctionSource("judge", judge).rewards([chat]).tolist() == [1.0]
    assert seen["prompts"] == [[{"role": "user", "content": "Q"}]]
    assert seen["completions"] == [[{"role": "assistant", "content": "yes"}]]
    assert FunctionSource("judge", judge).rewards([answered("abc", level=1), answered("a")]).tolist() == [3.0, 1.0]
    assert seen["completions"] == ["abc", "a"] and seen["level"] == [1, None]


def test_a_function_may_name_columns() -> None:
    def right(completions: list[str], answer: list[str]) -> list[float]:
        return [float(one == other) for one, other in zip(completions, answer, strict=True)]

    assert FunctionSource("right", right).rewards([answered("a", answer="a", other=1)]).tolist() == [1.0]
    with pytest.raises(UserError, match="takes 'answer', and the data has no such column; it has topic"):
        FunctionSource("right", right).rewards([answered("a", topic="x")])


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (lambda texts: [1.0], "returned 1 numbers for 2 completions"),
        (lambda texts: 3.0, "returned 3.0; expected a list of numbers"),
        (lambda texts: [0.0, float("nan")], "returned nan for q.jsonl line 1: 'b'"),
        (lambda texts: [None, 1.0], "expected a list of numbers"),
        (lambda texts: [{"a": 1}[text] for text in texts], r"KeyError: 'b' \(q.jsonl line 1: 'b'\)"),
    ],
)
def test_what_a_function_may_not_return(found: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        FunctionSource("judge", lambda completions: found(completions)).rewards([answered("a"), answered("b")])


def test_a_function_that_hangs() -> None:
    with pytest.raises(UserError, match=r"took longer than 0.05 s for 1 completions"):
        FunctionSource("slow", lambda completions: time.sleep(1), timeout=0.05).rewards([answered("a")])


def brief(completions: list[str]) -> list[float]:
    return [-len(text) for text in completions]


def test_a_spec_is_a_weighted_sum() -> None:
    text = resolved("answer:number, rewards.py:brief=0.2", {"brief": brief})
    assert text.startswith("answer:number,function:brief:") and text.endswith("=0.2")
    assert resolved(text, {}) == text
    found = TotalReward(sources(text, {"brief": brief}), cut_penalty=2.0)(
        [answered("it is 4", answer=4), answered("5", ended=False, answer=4)]
    )
    assert found.parts["answer:number"].tolist() == [1.0, 0.0]
    np.testing.assert_allclose(found.total, [1 - 0.2 * 7, -0.2 - 2.0])


def test_a_function_comes_from_the_command_line_only() -> None:
    text = resolved("rewards.py:brief", {"brief": brief})
    with pytest.raises(UserError, match=r"no file grants to run: give it again, as --reward FILE.py:brief"):
        sources(text, {})
    with pytest.raises(UserError, match="not the one that the run has"):
        sources(text, {"brief": lambda completions: [0.0 for _ in completions]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("answer:numbr", "did you mean.*answer:exact|number|choice"),
        ("rewards.py", "name the function in it"),
        ("answer:number=zero", "'zero' is no weight"),
        ("answer:number=0", "'0' is no weight"),
        ("no/such/run", "expected answer:exact"),
        ("answer:number,answer:number=2", "is there twice"),
        ("", "expected answer:exact"),
    ],
)
def test_specs_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(text)
