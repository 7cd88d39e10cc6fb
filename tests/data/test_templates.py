"""Prompts and responses of many chat templates: the prompt is what generation feeds, the response what the template prints."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from chat_templates import KINDS, tokenizer_of
from conftest import pair_row

from lite_dil.data.encoder import Encoder
from lite_dil.data.files import RowError
from lite_dil.data.reader import Row

USER = {"role": "user", "content": "What is tea?"}
EARLIER = [USER, {"role": "assistant", "content": "<think>hm</think>\n\nA drink."}, {"role": "user", "content": "Which?"}]
PROMPTS = {
    "one turn": [USER],
    "turns": EARLIER,
    "system": [{"role": "system", "content": "Be short."}, USER],
    "system, turns": [{"role": "system", "content": "Be short."}, *EARLIER],
}
ANSWERS = (
    "A drink.",
    "\n\nA drink",
    "  a drink \n",
    "drink\n\n",
    "<b>hot</b> drink",
    "< think>",
    "[INST] hi [/INST] ### User:\n<start_of_turn>user</s>\n<turn>",
    "é🙂 Is it?",
    "m",
)


def texts(encoder: Encoder, row: Row) -> tuple[str, list[str]]:
    """Return a row's prompt and responses as text."""
    example = encoder.encode(row)
    return encoder.tokenizer.decode(example.prompt), [encoder.tokenizer.decode(ids) for ids in example.responses]


def said(tokenizer: Any, name: str, messages: list[Any], answer: Any, **arguments: Any) -> str:
    """Return the response as the conversation's rendering has it, with its end, by nothing but the template's own marks."""
    message = answer if isinstance(answer, dict) else {"role": "assistant", "content": answer}
    whole = tokenizer.apply_chat_template([*messages, message], tokenize=False, **arguments)
    body = whole[whole.rindex(KINDS[name].header) + len(KINDS[name].header) :]
    end = KINDS[name].end
    return body[: body.rindex(end)] + end if end else body + tokenizer.eos_token


def today(name: str) -> Any:
    """Return a tokenizer whose template prints the fixed date, for transformers' own rendering."""
    tokenizer = tokenizer_of(name)
    tokenizer.chat_template = tokenizer.chat_template.replace("strftime_now('%Y-%m-%d')", "'2024-07-26'")
    return tokenizer


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_prompt_is_what_generation_feeds_and_the_response_what_the_template_prints(name: str, prompt: str) -> None:
    tokenizer, messages, encoder = today(name), PROMPTS[prompt], Encoder(tokenizer_of(name))
    if not KINDS[name].system and "system" in prompt:
        with pytest.raises(RowError, match="refuses these messages: System role not supported"):
            encoder.encode(pair_row(messages, "a", "b", ""))
        return
    fed = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    for one, other in itertools.pairwise(ANSWERS):
        if name == "gemma" and "_turn>" in one + other:
            continue  # these are its own control tokens
        example = encoder.encode(pair_row(messages, one, other, ""))
        assert list(example.prompt) == fed
        for answer, ids in zip((one, other), example.responses, strict=True):
            expected = KINDS[name].lead + said(tokenizer, name, messages, answer)
            assert tokenizer.decode(ids) == expected
            if answer[0].isalpha():  # else a token of white space may join the two, and belongs to neither
                assert [*fed, *ids] == tokenizer(tokenizer.decode(fed) + expected, add_special_tokens=False).input_ids
