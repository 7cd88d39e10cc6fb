"""Rewards by a sequence classifier of transformers, a model beside the policy with its own tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lite_dil.backends import registry
from lite_dil.base.checked import read_object
from lite_dil.base.errors import UserError
from lite_dil.base.halving import Halving, halves
from lite_dil.base.signs import CHOSEN
from lite_dil.data.encoder import Encoder, Example
from lite_dil.data.files import RowError
from lite_dil.data.messages import read_tools
from lite_dil.data.reader import Row
from lite_dil.models.find import folder_of, load_tokenizer, resolve_model
from lite_dil.rewards.source import Answered

Ids = tuple[int, ...]
_TOKENS = 4096  # maximum tokens of a pass, padding included
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
    """How a classifier reads a prompt with a response: as lite-dil reads them, with the classifier's tokenizer and template.

    Behind the token that ends the response comes what its template prints there, such as a line feed, which is what such a
    model was trained on; not for an export of lite-dil, whose head was trained on the end token's state.

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
            self.encoder = Encoder(load_tokenizer(self.folder))
        self.flag, exported = flag, _exported(folder)
        self.bias = float(exported.get("bias") or 0.0)
        self._behind = () if exported else self._printed_behind()

    def sequences(self, examples: Sequence[Example]) -> list[Ids]:
        """Return the tokens of each prompt with each of its responses, in order."""
        return [(*each.prompt, *response, *self._behind) for each in examples for response in each.responses]

    def encode(self, answers: Sequence[Answered]) -> list[Example]:
        """Return each answer, as text, in the classifier's tokens, without what its template takes for the end of a turn.

        Raises UserError if its template refuses one.
        """
        rows = [
            Row(
                each.prompt if each.messages is None else [dict(message) for message in each.messages],
                (self._plain(each.response),),
                (CHOSEN,),
                each.place,
                "demonstrations",
                read_tools(each.columns),
            )
            for each in answers
        ]
        found = []
        for example, each in zip(self.encoder.encode_all(rows), answers, strict=True):
            if isinstance(example, RowError):
                raise UserError(f"{self.flag}: {each.place}: {example}")
            found.append(example)
        return found

    def _plain(self, text: str) -> str:
        """Return a response without the classifier's own control tokens, which another model may write as words."""
        for token in self.encoder.rendering.control:
            text = text.replace(token, "")
        return text

    def _printed_behind(self) -> Ids:
        """Return the tokens that the template prints behind the token that ends a response."""
        rendering = self.encoder.rendering
        if not rendering.chats:
            return ()
        asked: list[dict[str, Any]] = [{"role": "user", "content": "Is it?"}]
        said = {"role": "assistant", "content": "It is."}
        try:
            before = rendering.prompt(asked)
            read = before + rendering.answer(asked, before, said)
            whole = rendering.lay_out([*asked, said], None, add_generation_prompt=False)
        except RowError as error:
            raise UserError(f"{self.flag}: {error}") from None
        if not whole.startswith(read):  # it adds no end token, and lite-dil does
            return ()
        return self.encoder.ids(whole.removeprefix(read))


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
        self._halving = Halving[Sequence[Ids]]("a pass of the reward model", _padded, halves, say)

    @property
    def name(self) -> str:
        """Names its metrics."""
        return self._name

    def rewards(self, answers: Sequence[Answered]) -> np.ndarray:
        """Return the reward of each response's text, float64, (answers,); one that was cut is read as if it had ended."""
        found = self.scores(self.text.encode(answers))
        return np.concatenate(found)[:, 0] if found else np.zeros(0)

    def scores(self, examples: Sequence[Example]) -> list[np.ndarray]:
        """Return the scores of each example's responses, float64, (responses, 1); the examples are in its own tokens."""
        sequences = self.text.sequences(examples)
        values = np.zeros(len(sequences))
        order = sorted(range(len(sequences)), key=lambda at: len(sequences[at]))
        while order:
            some = order[: max(1, _TOKENS // len(sequences[order[-1]]))]
            passes = self._halving.run(self._model.scores, [sequences[at] for at in some])
            values[some], order = np.concatenate(passes) + self.text.bias, order[len(some) :]
        ends = np.cumsum([len(example.responses) for example in examples])[:-1]
        return [part[:, None] for part in np.split(values, ends)] if len(examples) else []


def _padded(sequences: Sequence[Ids]) -> int:
    return len(sequences) * max(map(len, sequences))
