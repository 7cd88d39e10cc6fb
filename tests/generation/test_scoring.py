"""Log-probs of lists of responses against the textbook, whatever shares a pass."""

from __future__ import annotations

import numpy as np
from conftest import bare_model, load, oracle_logps

from lite_dil.batching.batch import Batch
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


def test_what_the_reference_says_is_asked_for_by_the_adapter_that_is_on(backend_name: str, tiny: str) -> None:
    backend = load(backend_name, tiny)
    assert log_ratio(backend, PROMPTS[0], RESPONSES[0][0]) == 0.0
