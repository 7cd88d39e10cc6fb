"""Rewards by checks of the answer and by Python functions, and their sums."""

from __future__ import annotations

import functools
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lite_dil.base.errors import UserError
from lite_dil.rewards.answer import AnswerSource, choice, exact, number
from lite_dil.rewards.function import FunctionSource, identity_of
from lite_dil.rewards.source import Answered, RewardSource
from lite_dil.rewards.spec import Functions, joined, parse, resolved, source_of
from lite_dil.rewards.total import TotalReward


def sources(text: str, functions: Functions) -> list[tuple[RewardSource, float]]:
    return [(source_of(part, functions), part.weight) for part in parse(text)]


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
        ("about .5", "0.5"),
        ("-.25", "-0.25"),
        ("so x = 1.5e-3", "0.0015"),
        ("6.02E+23 of them", "602e21"),
        ("it is 2e", "2"),
        ("3 eggs", "3"),
        ("wait...5", "5"),
        ("see fig.7", "7"),
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
        ("The answer is a prime number, so (C)", "C"),
        ("The right option I think is B.", "B"),
        ("Option A is wrong, so choose (B)", "B"),
        ("Answer: A prime number", None),
        ("The ANSWER IS A because nothing else fits", "A"),
        ("(D) looks right, but the answer is B", "B"),
        ("\\boxed{\\text{B}}", "B"),
        ("The answer is \\text{(B)}.", "B"),
        ("The answer is B, not C.", "B"),
        ("The answer is (A) because (B) is wrong", "A"),
        ("The answer is A. Wait: the answer is B", "B"),
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


@pytest.mark.parametrize(
    ("column", "response"), [(1e-05, "0.00001"), (1e16, "10000000000000000"), (0.1, ".10"), (-7, "-7"), (10**30, "1e30")]
)
def test_numbers_of_a_column_are_exact(column: float, response: str) -> None:
    several = [answered(response, answer=column), answered(response[:-1] + "3", answer=column)]
    assert AnswerSource("number").rewards(several).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("prompt", "response", "reward"),
    [
        ("Q:<think>\n", "4", 0.0),
        ("Q:<think>\n", "4</think>4", 1.0),
        ("Q:<think>\n\n</think>\n\n", "4", 1.0),
        ("Q:<think>a</think>Q2:<think>\n", "5 or 4", 0.0),
        ("Q:", "<think>5</think>4", 1.0),
        ("Q: Use <think> first.\nA:", "4", 1.0),
    ],
)
def test_a_thought_that_the_prompt_opens(prompt: str, response: str, reward: float) -> None:
    each = Answered(prompt, response, (1,), (2,), True, {"answer": 4}, "q.jsonl line 1")
    assert AnswerSource("number").rewards([each]).tolist() == [reward]


@pytest.mark.parametrize("answer", ["1/2", "so \\boxed{\\frac{1}{2}}", "7 #### 1, 2"])
def test_a_right_answer_of_several_numbers_is_refused(answer: str) -> None:
    with pytest.raises(UserError, match=r"line 1: answer:number finds 2 numbers \(1, 2\) in the row's answer '"):
        AnswerSource("number").rewards([answered("3/2", answer=answer)])


def test_rows_without_an_answer_are_refused() -> None:
    with pytest.raises(UserError, match=r"line 1: answer:number needs the right answer in a column answer or .* has topic"):
        AnswerSource("number").rewards([answered("4", topic="sums")])
    with pytest.raises(UserError, match="finds nothing to compare with in the row's answer 'four'"):
        AnswerSource("number").rewards([answered("4", answer="four")])
    with pytest.raises(UserError, match="finds nothing to compare with in the row's answer 'nan'"):
        AnswerSource("number").rewards([answered("4", answer=float("nan"))])


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

    def many(completions: list[str], *args: Any) -> list[float]:
        return [float(len(args)) for _ in completions]

    assert FunctionSource("many", many).rewards([answered("a", args=1)]).tolist() == [0.0]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (lambda texts: [1.0], "returned 1 numbers for 2 completions"),
        (lambda texts: 3.0, "returned 3.0; expected a list of numbers"),
        (lambda texts: [0.0, float("nan")], "returned nan for q.jsonl line 1: 'b'"),
        (lambda texts: [None, 1.0], "expected a list of numbers"),
        (lambda texts: [0.0, -(10**400)], "returned -inf for q.jsonl line 1: 'b'"),
        (lambda texts: [{"a": 1}[text] for text in texts], r"KeyError: 'b' \(q.jsonl line 1: 'b'\)"),
        (lambda texts: ({"a": 1}[text] for text in texts), r"KeyError: 'b' \(q.jsonl line 1: 'b'\)"),
        (lambda texts: sys.exit(0), "SystemExit: 0"),
        (lambda texts: signal.signal(signal.SIGALRM, signal.SIG_DFL), "called in a thread that --reward-timeout can leave"),
        (lambda texts: "10", "returned '10'; expected a list of numbers"),
        (lambda texts: b"10", "expected a list of numbers"),
        (lambda texts: ["1", "0"], "expected a list of numbers"),
        (lambda texts: {1.0, 2.0}, "expected a list of numbers"),
        (lambda texts: {1.0: "a", 2.0: "b"}, "expected a list of numbers"),
    ],
)
def test_what_a_function_may_not_return(found: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        FunctionSource("judge", lambda completions: found(completions)).rewards([answered("a"), answered("b")])


def test_a_function_that_hangs() -> None:
    with pytest.raises(UserError, match=r"took longer than 0.05 s for 1 completions"):
        FunctionSource("slow", lambda completions: time.sleep(1), timeout=0.05).rewards([answered("a")])
    with pytest.raises(UserError, match=r"took longer than 0.05 s"):  # its generator, not the function, is slow
        FunctionSource("slow", lambda completions: (time.sleep(1) for _ in completions), timeout=0.05).rewards([answered("a")])
    assert FunctionSource("quick", lambda completions: [1], timeout=1e12).rewards([answered("a")]).tolist() == [1.0]


def test_a_function_changes_nothing_of_the_row() -> None:
    def greedy(prompts: list[Any], completions: list[Any], tags: list[list[str]]) -> Iterator[int]:
        for prompt, several in zip(prompts, tags, strict=True):
            prompt.pop()
            several.append("seen")
        return (1 for _ in completions)

    row = Answered("<user>Q", "yes", (1,), (2,), True, {"tags": ["a"]}, "", [{"role": "user", "content": "Q"}])
    assert FunctionSource("greedy", greedy).rewards([row, row]).tolist() == [1.0, 1.0]
    assert row.columns == {"tags": ["a"]} and row.messages == [{"role": "user", "content": "Q"}]


def test_a_sum_that_is_not_finite_is_refused() -> None:
    large = FunctionSource("large", lambda completions: [1e308 for _ in completions])
    with pytest.raises(UserError, match=r"the weighted sum is inf for q.jsonl line 1; give smaller weights"):
        TotalReward([(large, 10.0)])([answered("a")])
    with pytest.raises(UserError, match=r"the weighted sum is 1e\+39 for q.jsonl line 1"):
        TotalReward([(large, 1e-269)])([answered("a")])


def brief(completions: list[str]) -> list[float]:
    return [-len(text) for text in completions]


NUMERAL = re.compile(r"\d+")


def numerals(completions: list[str]) -> list[int]:
    return [len(NUMERAL.findall(text)) for text in completions]


class Judge:
    def __call__(self, completions: list[str]) -> list[float]:
        return [0.0 for _ in completions]


def test_a_pattern_is_part_of_a_functions_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [identity_of(numerals)]
    for other in (r"\w+", re.compile(r"\d+", re.ASCII), re.compile(r"\d+")):
        monkeypatch.setitem(numerals.__globals__, "NUMERAL", re.compile(other))
        found.append(identity_of(numerals))
    assert len(set(found)) == 3 and found[3] == found[0]


@pytest.mark.parametrize("judge", [Judge(), Judge().__call__])
def test_a_callable_object_is_refused(judge: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=r"it is a callable \w+, .* give a function, or functools.partial"):
        identity_of(judge)
    assert identity_of(functools.partial(numerals)) != identity_of(functools.partial(numerals, completions=[]))


def test_a_spec_is_a_weighted_sum() -> None:
    text = resolved("answer:number, rewards.py:brief=0.2", {"brief": brief})
    assert text.startswith("answer:number,function:brief:") and text.endswith("=0.2")
    assert resolved(text, {}) == text
    found = TotalReward(sources(text, {"brief": brief}), cut_penalty=2.0)(
        [answered("it is 4", answer=4), answered("5", ended=False, answer=4)]
    )
    assert found.parts["answer:number"].tolist() == [1.0, 0.0]
    np.testing.assert_allclose(found.total, [1 - 0.2 * 7, -0.2 - 2.0])


@pytest.mark.parametrize("weight", ["0.123456789", "2", "-1e-09"])
def test_weights_are_kept_exactly(weight: str) -> None:
    text = f"answer:number={weight}"
    assert resolved(text, {}) == text and parse(text)[0].weight == float(weight)


def test_a_path_may_have_an_equals_sign() -> None:
    (part,) = parse("a=1/rewards.py:brief")
    assert (part.kind, part.value, part.weight) == ("file", "a=1/rewards.py:brief", 1.0)
    assert parse("a=1/rewards.py:brief=0.5")[0].weight == 0.5


@pytest.mark.parametrize(
    ("text", "name", "weight"),
    [
        ("hf:owner/judge=0.5", "hf:judge", 0.5),
        ("hf:owner/judge", "hf:judge", 1.0),
        ("implicit:{here}", "implicit:a=b", 1.0),
        ("implicit:{here}=1", "implicit:a=b", 1.0),
        ("{here}=-2", "a=b", -2.0),
    ],
)
def test_a_model_is_named_by_its_place(text: str, name: str, weight: float, tmp_path: Path) -> None:
    """The weight of an implicit reward is kept as it was given, since it may be its beta."""
    (tmp_path / "a=b").mkdir()
    text = text.format(here=tmp_path / "a=b")
    (part,) = parse(text)
    assert (part.name, part.weight, str(part), resolved(text, {})) == (name, weight, text, text)
    assert part.given == (text.startswith("implicit") and text.endswith("=1"))
    assert [each.name for each in parse(joined(text, None, "answer:exact"))] == [name, "answer:exact"]


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
        ("a,b/rewards.py:brief", "'a': expected .* without a comma in its path"),
        ("rewards.py:brief=zero", "'zero' is no weight"),
        ("rewards.py:brief=1/2", "'1/2' is no weight"),
    ],
)
def test_specs_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(text)
