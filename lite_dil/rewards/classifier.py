"""Rewards by a sequence classifier of transformers, a model beside the policy with its own tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lite_dil.backends import registry
from lite_dil.base.checked import read_object
from lite_dil.base.errors import UserError
from lite_dil.base.halving import Halving, halves
from lite_dil.data.encoder import Encoder, Example, TokenIds
from lite_dil.data.files import RowError
from lite_dil.data.messages import Message, read_tools
from lite_dil.models.find import folder_of, load_tokenizer, resolve_model
from lite_dil.rewards.source import Answered

PASS_TOKENS = 4096  # maximum tokens of a pass, padding included
_EXPORT = "export.json"


@contextmanager
def in_words_of(flag: str, model: str) -> Iterator[None]:
    """Let errors about a model begin with the option that names it, and not with --model."""
    try:
        yield
    except UserError as error:
        text = str(error).removeprefix(f"--model {model}").removeprefix(":").strip()
        raise UserError(f"{flag}: {text}") from None


class ClassifierText:
    """How a classifier reads a prompt with a response: with its own tokenizer, as its own chat template prints them.

    An export of lite-dil reads up to the token that ends the response, whose state its head was trained on. Plain text is
    continued, and has the end-of-sequence token behind it, as lite-dil and TRL train reward models.

    Args:
        model: its folder or hub id.
        flag: the option that names it, for messages.

    Attributes:
        folder: its files, downloaded if need be.
        bias: of the head, which transformers' classes lack; an export of lite-dil names it.
    """

    def __init__(self, model: str, flag: str, say: Callable[[str], None]) -> None:
        with in_words_of(flag, model):
            folder = folder_of(resolve_model(model, say))
        self.folder = str(folder)
        with in_words_of(flag, self.folder):
            self.encoder = Encoder(load_tokenizer(self.folder))
        self.flag, exported = flag, _exported(folder)
        self.bias, self._exported = float(exported.get("bias") or 0.0), bool(exported)

    def of_answers(self, answers: Sequence[Answered]) -> list[TokenIds]:
        """Return the tokens of each prompt with its response, read as text. Raises UserError if the template refuses one.

        A response may be anything that a policy writes: what the template takes for the end of a turn is left out of it.
        """
        found = []
        for each in answers:
            try:
                found.append(self._chat(each) if each.messages is not None else self._text(each))
            except RowError as error:
                raise UserError(f"{self.flag}: {each.place}: {error}") from None
        return found

    def of_examples(self, examples: Sequence[Example]) -> list[TokenIds]:
        """Return the tokens of each prompt with each of its responses, in order; the examples are in its own tokens.

        Raises UserError if its template refuses a conversation.
        """
        behind = self._behind
        return [(*each.prompt, *response, *behind) for each in examples for response in each.responses]

    @cached_property
    def _behind(self) -> TokenIds:
        """The tokens that the template prints behind the one that ends a response, such as a line feed."""
        rendering = self.encoder.rendering
        if self._exported or not rendering.chats:
            return ()
        asked: list[Message] = [{"role": "user", "content": "Is it?"}]
        said: Message = {"role": "assistant", "content": "It is."}
        try:
            before = rendering.prompt(asked)
            read = before + rendering.answer(asked, before, said)
            whole = rendering.lay_out([*asked, said], None, add_generation_prompt=False)
        except RowError as error:
            raise UserError(f"{self.flag}: {error}") from None
        # It does not begin so where the template prints no end token, and lite-dil adds one.
        return self.encoder.ids(whole.removeprefix(read)) if whole.startswith(read) else ()

    def _chat(self, answer: Answered) -> TokenIds:
        rendering = self.encoder.rendering
        text = _without(rendering.control, answer.response)
        messages = [*map(dict, answer.messages or ()), {"role": "assistant", "content": text}]
        whole = rendering.lay_out(messages, read_tools(answer.columns), add_generation_prompt=False)
        if self._exported:
            whole = whole.rstrip()
        ids = self.encoder.prompt_ids(whole, chat=True)
        return (*ids, self._eos) if self._exported and ids[-1] not in self.encoder.end_ids() else ids

    def _text(self, answer: Answered) -> TokenIds:
        text = _without(self.encoder.tokenizer.all_special_tokens, answer.response)
        prompt = self.encoder.prompt_ids(answer.prompt, chat=False)
        return (*prompt, *(self.encoder.continuation(answer.prompt, text) if text else ()), self._eos)

    @property
    def _eos(self) -> int:
        return int(self.encoder.tokenizer.eos_token_id)


def _without(tokens: Iterable[str], text: str) -> str:
    """Leave tokens out of a text, and those that appear when others are left out."""
    before = None
    while before != text:
        before = text
        for token in tokens:
            text = text.replace(token, "")
    return text


def _exported(folder: Path) -> dict[str, Any]:
    """Return what export.json says of a reward model that lite-dil exported; nothing for other folders."""
    path = folder / _EXPORT
    found = read_object(path) if path.is_file() else {}
    return found if found.get("format") == "reward" and "lite_dil" in found else {}


class ClassifierReward:
    """Scores of a sequence classifier; a `lite_dil.rewards.source.RewardSource`.

    Args:
        text: how it reads.
        device: "cuda" or "cpu".
        dtype: the value of --dtype.
        say: tells the user if memory holds less than a pass.

    Raises UserError if it cannot be loaded.
    """

    def __init__(self, text: ClassifierText, device: str, dtype: str, name: str, say: Callable[[str], None]) -> None:
        self.text, self._name = text, name
        self._model = registry.module(device, "classifier").Classifier(text.folder, text.flag, device, dtype)
        self._halving = Halving[Sequence[TokenIds]]("a pass of the reward model", _padded, halves, say)

    @property
    def name(self) -> str:
        """Names its metrics."""
        return self._name

    def rewards(self, answers: Sequence[Answered]) -> np.ndarray:
        """Return the reward of each response's text, float64, (answers,); one that was cut is read as if it had ended.

        Raises UserError if one is longer than the model takes, which reads the prompts that --max-length cuts whole.
        """
        found, longest = self.text.of_answers(answers), self._model.longest
        for each, ids in zip(answers, found, strict=True):
            if longest is not None and len(ids) > longest:
                raise UserError(
                    f"{self.text.flag}: {each.place}: the prompt with a response has {len(ids)} of its tokens, and it takes "
                    f"{longest}; leave the row out, or allow shorter responses (--max-new-tokens)"
                )
        return self._scored(found)

    def scores(self, examples: Sequence[Example]) -> list[np.ndarray]:
        """Return the scores of each example's responses, float64, (responses, 1); the examples are in its own tokens."""
        values = self._scored(self.text.of_examples(examples))
        ends = np.cumsum([len(example.responses) for example in examples])[:-1]
        return [part[:, None] for part in np.split(values, ends)] if len(examples) else []

    def _scored(self, sequences: Sequence[TokenIds]) -> np.ndarray:
        """Return the score of each sequence, shortest first in passes of few tokens."""
        values = np.zeros(len(sequences))
        order = sorted(range(len(sequences)), key=lambda at: len(sequences[at]))
        while order:
            some = order[: max(1, PASS_TOKENS // len(sequences[order[-1]]))]
            passes = self._halving.run(self._model.scores, [sequences[at] for at in some])
            values[some], order = np.concatenate(passes) + self.text.bias, order[len(some) :]
        return values


def _padded(sequences: Sequence[TokenIds]) -> int:
    return len(sequences) * max(map(len, sequences))
