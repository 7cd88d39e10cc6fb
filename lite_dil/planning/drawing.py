"""What drawing answers needs: how many are drawn at once, and what keys, values and logits of theirs take."""

from __future__ import annotations

from dataclasses import dataclass

from lite_dil.batching.schedule import examples_per_step, row_tokens
from lite_dil.config.train_config import ResolvedConfig
from lite_dil.generation.batch_generator import ROWS
from lite_dil.models.shape import ModelShape
from lite_dil.planning.estimate import FLOAT32

_STEP = 256  # tokens by which mlx-lm's caches grow
_DOUBLE = 8  # bytes


@dataclass(frozen=True)
class Drawing:
    """The largest batch of answers that a run draws.

    Attributes:
        answers: how many at once.
        prompts: different prompts among them.
        prompt, tokens: the longest prompt's tokens, and those of an answer.
    """

    answers: int
    prompts: int
    prompt: int
    tokens: int

    @classmethod
    def of(cls, config: ResolvedConfig) -> Drawing:
        """Return it for prompts that fill --max-length together with their answers."""
        assert config.samples and config.max_new_tokens  # resolved
        tokens = min(config.max_new_tokens, config.max_length - 1)
        wanted = examples_per_step(config) * config.samples
        answers = min(wanted, max(1, ROWS * row_tokens(config) // config.max_length))
        return cls(answers, -(-answers // config.samples), config.max_length - tokens, tokens)

    @property
    def cached(self) -> int:
        """Tokens of the batch whose keys and values are kept at the end: each answer with its prompt, but its last token."""
        return self.answers * (self.prompt + self.tokens - 1)

    def on_torch(self, shape: ModelShape, e: int) -> dict[str, int]:
        """Return the bytes that the last token's pass has, `e` for a number.

        Each layer's keys and values are copied, one after the other, to be longer by one. Tokens are drawn in float64.
        """
        vocabulary, layer = self.answers * shape.vocabulary, self.cached * shape.keys * e
        before, after = vocabulary * FLOAT32 + layer, vocabulary * (FLOAT32 + 2 * _DOUBLE)
        return {"cache": 2 * layer * shape.layers, "temporaries": max(before, after)}

    def on_mlx(self, shape: ModelShape, e: int) -> dict[str, int]:
        """Return the bytes at the token for which the caches grow, or at which an answer has ended.

        Caches grow by 256 tokens; about one layer's is there twice then. Tokens are drawn with noise in float32.
        """
        grown = self.prompt - 1 + -(-self.tokens // _STEP) * _STEP
        kept = self.answers * grown * 2 * shape.keys * shape.layers * e
        return {"cache": kept, "temporaries": max(kept // shape.layers, 4 * self.answers * shape.vocabulary * FLOAT32)}
