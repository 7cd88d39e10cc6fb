"""What a program that runs the exported files feeds the model, and where it ends a response, against what training did."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, Set
from typing import Any, Protocol

import numpy as np

from lite_dil.backends.types import Sequences
from lite_dil.data.encoder import Encoder
from lite_dil.data.files import RowError

Fed = str | list[dict[str, str]]
FORCED_STEP = 5  # at which a generation is made to draw the end token
MORE_CONTEXT = 16  # tokens that a generation may add
_TALK = ("Hello, who are you?", "A model.\nOne that answers.", "Why 2 + 2? ¿Qué? 你好")


class Runtime(Protocol):
    """Exported files, loaded by a library that they are for, which `name` names."""

    name: str

    def logps(self, sequences: Sequences) -> list[np.ndarray]:
        """Return each response's log-probs, (tokens,) float32."""

    def prompt(self, prompt: Fed) -> list[int]:
        """Return the tokens that it feeds the model for a text, or for a conversation up to the assistant's turn."""

    def end_ids(self) -> set[int]:
        """Return the tokens at which it ends a generation."""

    def ends_after(self, prompt: Sequence[int], tokens: Sequence[int]) -> bool | None:
        """Return whether a generation of its own loop, in which `tokens` are forced, ends with the last of them.

        None: its loop is not installed.
        """


def faults(runtime: Runtime, encoder: Encoder, sequences: Sequences, say: Callable[[str], None]) -> list[str]:
    """Return what differs from training: the tokens fed, and the tokens that end a response.

    Args:
        encoder: that of training.
        sequences: prompts and responses of the check.
        say: shows a line to the user.
    """
    return _other_prompts(runtime, encoder, say) + _no_ends(runtime, encoder, sequences, say)


def preferred_ends(sequences: Sequences, logps: Sequence[np.ndarray], ends: Sequence[int]) -> tuple[int, int]:
    """Return after how many responses the model gives their end token more than half of the probability, and of how many."""
    last = [float(own[-1]) for (_, response), own in zip(sequences, logps, strict=True) if response[-1] in ends]
    return sum(logp > math.log(0.5) for logp in last), len(last)


def _no_ends(runtime: Runtime, encoder: Encoder, sequences: Sequences, say: Callable[[str], None]) -> list[str]:
    found = runtime.end_ids()
    texts = {token: repr(encoder.tokenizer.convert_ids_to_tokens(token)) for token in encoder.end_ids()}
    missing = [text for token, text in texts.items() if token not in found]
    if missing:
        return [f"training ended responses in {', '.join(missing)}, at which {runtime.name} does not stop by these files"]
    # Forced at a step of a generation, since a model that was trained little need not draw it.
    prompt, ordinary = sequences[0][0], _ordinary(sequences, set(texts))
    drawn = {token: runtime.ends_after(prompt, [*[ordinary] * (FORCED_STEP - 1), token]) for token in texts}
    if None in drawn.values():
        say(f"{runtime.name} is not installed: that it stops there is read from the file, not tried")
    return [
        f"a generation by {runtime.name} in which {texts[token]} is drawn does not end there"
        for token, ended in drawn.items()
        if ended is False
    ]


def _other_prompts(runtime: Runtime, encoder: Encoder, say: Callable[[str], None]) -> list[str]:
    """Return how the first prompt that differs does."""
    tokenizer, rendering = encoder.tokenizer, encoder.rendering
    # The date is fixed in training. Where the template prints it, only what comes before and after can be compared.
    dated = rendering.chats and "strftime_now" in tokenizer.get_chat_template()
    for prompt in _prompts(rendering.chats):
        try:
            trained = list(encoder.prompt(prompt))
        except RowError:  # the template refuses such a conversation, so none was trained on
            continue
        fed = runtime.prompt(prompt)
        if fed == trained or (dated and (fed[0], fed[-1]) == (trained[0], trained[-1])):
            continue
        if fed[0] == trained[0] and _words(tokenizer, fed) == _words(tokenizer, trained):
            # Only the space differs that a SentencePiece tokenizer puts, or does not put, behind a control token.
            say(f"note: {runtime.name} splits a prompt into other tokens than training did, of the same text but for spaces")
            continue
        return [f"{runtime.name} feeds {_text(tokenizer, fed)!r} where training had {_text(tokenizer, trained)!r}"]
    return []


def _prompts(chats: bool) -> list[Any]:
    if not chats:
        return [_TALK[0]]
    turns = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(_TALK)]
    return [turns[:1], turns]


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def _words(tokenizer: Any, ids: Sequence[int]) -> str:
    return "".join(_text(tokenizer, ids).split())


def _ordinary(sequences: Sequences, ends: Set[int]) -> int:
    """Return a token of the responses that does not end one; an empty response has none, and a 0 may stand for it."""
    return next((token for _, response in sequences for token in response if token not in ends), 0)
