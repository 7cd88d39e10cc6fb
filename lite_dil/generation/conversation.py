"""A conversation with a model: its turns, the prompt that they make, and the training rows saved from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lite_dil.base.disk import writing
from lite_dil.base.errors import UserError
from lite_dil.base.files import append, appending
from lite_dil.data.encoder import Encoder
from lite_dil.data.files import RowError
from lite_dil.data.messages import Message, read_text
from lite_dil.models.find import model_folder
from lite_dil.models.model_config import read_config

# Config keys for the longest sequence that a model was made for.
_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


@dataclass
class Turn:
    """A message, its answer, and the system message at that time.

    `whole` is false if the answer was stopped; `saved` are the files that hold the turn. `reasoning` is what control tokens
    set apart from the answer, as harmony's channels do.
    """

    user: str
    answer: str
    whole: bool
    system: str
    saved: set[Path] = field(default_factory=set)
    reasoning: str = ""

    @property
    def messages(self) -> list[Message]:
        """The turn without its system message."""
        further = {"reasoning_content": self.reasoning} if self.reasoning else {}
        return [{"role": "user", "content": self.user}, {"role": "assistant", "content": self.answer, **further}]


class FittedPrompt(NamedTuple):
    """A prompt that fits the context: its token ids, the tokens left for the answer, and how many old turns were left out."""

    ids: tuple[int, ...]
    room: int
    left_out: int


class Conversation:
    """Turns under a system message; without a chat template each text is continued on its own.

    Args:
        limit: the model's context length in tokens, or None if unknown.
    """

    def __init__(self, encoder: Encoder, limit: int | None, system: str = "") -> None:
        self.encoder, self.limit, self.turns = encoder, limit, list[Turn]()
        self.is_chat = encoder.rendering.chats
        self.set_system(system)

    def set_system(self, text: str) -> None:
        """Set the system message from here on, or remove it. Raises UserError if the model cannot have one."""
        if text and not self.is_chat:
            raise UserError("a system message needs a chat template, which this model lacks")
        if text:  # try it now, or every later message would be refused
            self._layout([{"role": "system", "content": text}, {"role": "user", "content": "x"}])
        self.system, self.left_out = text, 0

    def add(self, user: str, answer: str, whole: bool, text: str = "") -> None:
        """Add a turn, with the answer as the model gave it; `text` is the answer with its control tokens, without its end."""
        message = self.encoder.rendering.read(text) if self.is_chat else None
        answer, reasoning = (message["content"], message.get("reasoning_content", "")) if message else (answer, "")
        turn = Turn(user, answer.rstrip() if self.is_chat else answer, whole, self.system, reasoning=reasoning)
        self.turns.append(turn)

    def undo(self) -> Turn | None:
        """Remove the last turn and return it, or None if there is none."""
        self.left_out = 0
        return self.turns.pop() if self.turns else None

    def reset(self) -> None:
        """Forget the turns."""
        self.turns, self.left_out = [], 0

    def prompt(self, text: str, max_new_tokens: int) -> FittedPrompt:
        """Return the prompt that ends in the message `text`; the oldest turns are left out if they do not fit.

        Raises UserError if the template refuses the text, or if it is too long by itself.
        """
        while True:
            turns = self.turns[self.left_out :]
            ids = self._layout([*_messages(self.system, turns), {"role": "user", "content": text}])
            if self.limit is None:
                return FittedPrompt(ids, max_new_tokens, 0)
            if len(ids) + min(max_new_tokens, self.limit // 4) <= self.limit:
                return FittedPrompt(ids, min(max_new_tokens, self.limit - len(ids)), self.left_out)
            if not self.is_chat or self.left_out == len(self.turns):
                self.left_out = 0
                raise UserError(f"the message is too long: {len(ids)} tokens with its template, the model takes {self.limit}")
            self.left_out += 1

    def save(self, path: Path) -> int:
        """Append a row for each complete answer that the file lacks; return how many.

        A row is ``messages`` up to the answer, or ``prompt`` and ``completion`` without a chat template: demonstrations.
        """
        path = path.absolute()
        new = [i for i, turn in enumerate(self.turns) if turn.whole and path not in turn.saved]
        lines = "".join(json.dumps(self._row(i), ensure_ascii=False) + "\n" for i in new)
        with writing(path), appending(path, read=True) as file:
            if file.tell():  # the last line may lack its line feed
                file.seek(-1, 2)
                lines = lines if file.read(1) == b"\n" else "\n" + lines
            append(file, lines.encode())
        for i in new:
            self.turns[i].saved.add(path)
        return len(new)

    def _row(self, index: int) -> dict[str, Any]:
        turn = self.turns[index]
        if not self.is_chat:
            return {"prompt": turn.user, "completion": turn.answer}
        return {"messages": _messages(turn.system, self.turns[: index + 1])}

    def _layout(self, messages: list[Message]) -> tuple[int, ...]:
        """Tokenise the messages up to the start of the answer."""
        try:
            read_text(messages[-1]["content"], "message")
            return self.encoder.prompt(messages if self.is_chat else messages[-1]["content"])
        except RowError as error:
            raise UserError(str(error)) from None


def _messages(system: str, turns: Sequence[Turn]) -> list[Message]:
    messages = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        messages += turn.messages
    return messages


def context_limit(model: str) -> int | None:
    """Return a loaded model's context length, by its config.json, or None if that does not say."""
    config = read_config(model_folder(model) / "config.json", f"--model {model}")
    text = config.get("text_config", config)
    return next((int(text[name]) for name in _LIMITS if text.get(name)), None)
