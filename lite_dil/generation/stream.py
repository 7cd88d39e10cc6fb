"""An answer while it is generated."""

from __future__ import annotations

import time
from contextlib import nullcontext

from lite_dil.backends.protocol import Backend
from lite_dil.backends.types import Sampling
from lite_dil.base.text import count
from lite_dil.data.encoder import Encoder, continuation_text
from lite_dil.generation.conversation import FittedPrompt
from lite_dil.generation.text_stream import TextStream


class Stream:
    """The continuation of a prompt, one token per step.

    `ids` and `text` are the answer so far; `done` means that it ended; `whole` that it ended in its end token, the last id.

    Args:
        reference: whether the adapter is off.
        strip: drop white space at the start of the text.
    """

    def __init__(
        self,
        backend: Backend,
        encoder: Encoder,
        prompt: FittedPrompt,
        seed: int,
        sampling: Sampling,
        reference: bool,
        strip: bool,
    ) -> None:
        self.backend, self.reference, self.strip = backend, reference, strip
        self.encoder, self.prompt = encoder, prompt.ids
        self.end_ids = encoder.end_ids()
        self.tokens = backend.stream(prompt.ids, prompt.room, self.end_ids, seed, sampling)
        self.decoded = TextStream(encoder.tokenizer, prompt.ids)
        self.ids: list[int] = []
        self.text, self.done, self.whole = "", False, False
        self.seconds = 0.0  # for all tokens but the first, which waits for the prompt

    def step(self) -> str:
        """Generate a token; return the text that it adds."""
        start = time.perf_counter()
        with self.backend.adapter_off() if self.reference else nullcontext():
            token = next(self.tokens, None)
        if token is None or token in self.end_ids:
            self.done, self.whole = True, token is not None
        if token is None:
            return ""
        self.seconds += time.perf_counter() - start if self.ids else 0.0
        self.ids.append(token)
        text = "" if self.whole else self.decoded.add(token)
        text = text.lstrip() if self.strip and not self.text else text
        self.text += text
        return text

    @property
    def spelled(self) -> str:
        """The answer with its control tokens, without its end."""
        return continuation_text(self.encoder.tokenizer, self.prompt, self.ids[:-1] if self.whole else self.ids)

    def figures(self) -> str:
        """Return its length and speed, for people."""
        speed = f", {(len(self.ids) - 1) / self.seconds:.1f} tokens/s" if len(self.ids) > 1 else ""
        return f"{count(len(self.ids), 'token')}{speed}"
