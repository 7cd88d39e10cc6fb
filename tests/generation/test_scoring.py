"""Log-probs of lists of responses against the textbook, whatever shares a pass."""

from __future__ import annotations

import math

import numpy as np
import pytest
from conftest import bare_model, load, oracle_logps

from lite_dil.base.errors import OutOfMemory
from lite_dil.batching.batch import Batch
from lite_dil.batching.schedule import batch_tokens, plan_responses
from lite_dil.data.encoder import Example
from lite_dil.generation.scoring import log_ratio, token_logps

PROMPTS = [(5, 6, 7), (8,), (9, 10, 11, 12)]
RESPONSES: list[list[tuple[int, ...]]] = [[(3, 4, 2), (5,), (6, 7)], [], [(8, 9), (3, 2)]]


def test_several_responses_share_their_prompt(backend_name: str, tiny: str) -> None:
    """In any number of passes, in the order they were asked for, also where a prompt has none."""
    backend, model, said = load(backend_name, tiny), bare_model(tiny), list[str]()
    for tokens in (4096, 8):
        found = token_logps(backend, PROMPTS, RESPONSES, said.append, tokens)
        assert [[len(part) for part in parts] for parts in found] == [[3, 1, 2], [], [2, 2]]
        for prompt, responses, parts in zip(PROMPTS, RESPONSES, found, strict=True):
            for response, part in zip(responses, parts, strict=True):
                expected = oracle_logps(model, Batch.of([Example(prompt, (response,), (1,))])).detach().numpy()
                assert part.dtype == np.float32
                np.testing.assert_allclose(part, expected, atol=2e-5)
    assert not said


MANY = [tuple(3 + (7 * n + i) % 40 for i in range(2 + n % 4)) for n in range(13)]


@pytest.mark.parametrize("memory", [math.inf, 12])
def test_many_responses_to_one_prompt_are_split(
    backend_name: str, tiny: str, monkeypatch: pytest.MonkeyPatch, memory: float
) -> None:
    """To the limit of a pass; and where memory holds less, down to a response."""
    backend, model, said, passes = load(backend_name, tiny), bare_model(tiny), list[str](), list[int]()
    real = backend.token_logps

    def counted(batch: Batch) -> np.ndarray:
        if batch.tokens > memory:
            raise OutOfMemory("a test", "full")
        passes.append(batch_tokens(batch, backend.layout))
        return real(batch)

    monkeypatch.setattr(backend, "token_logps", counted)
    (found,) = token_logps(backend, PROMPTS[:1], [MANY], said.append, 40)
    assert len(passes) > 1 and max(passes) <= 40 and bool(said) == (memory == 12)
    for response, part in zip(MANY, found, strict=True):
        expected = oracle_logps(model, Batch.of([Example(PROMPTS[0], (response,), (1,))])).detach().numpy()
        np.testing.assert_allclose(part, expected, atol=2e-5)


@pytest.mark.parametrize("layout", ["plain", "packed", "prefix"])
def test_a_plan_of_responses_has_each_of_them_once(layout: str) -> None:
    examples = [Example((5, 6, 7), tuple(MANY), (1,) * 13), Example((8,), (), ()), Example((9,) * 30, ((3,), (4,)), (1, 1))]
    planned = plan_responses(examples, layout, 15, 25)
    assert sorted(n for _, numbers in planned for n in numbers) == [*((0, i) for i in range(13)), (2, 0), (2, 1)]
    for batch, numbers in planned:
        assert len(numbers) == 1 or batch_tokens(batch, layout) <= 25
        for at, (example, response) in enumerate(numbers):
            assert tuple(batch.responses[at].tolist()) == examples[example].responses[response]
            assert tuple(batch.prompts[batch.prompt_of[at]].tolist()) == examples[example].prompt


def test_what_the_reference_says_is_asked_for_by_the_adapter_that_is_on(backend_name: str, tiny: str) -> None:
    backend = load(backend_name, tiny)
    assert log_ratio(backend, PROMPTS[0], RESPONSES[0][0]) == 0.0
