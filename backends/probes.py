"""What models do to their logits after the output head, and the tokens that are tried at start-up; shared by the backends."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from lite_dil.base.errors import UserError
from lite_dil.batching.batch import Batch


class LogitTransform(NamedTuple):
    """Logits become ``cap * tanh(scale * z / cap)``, or ``scale * z`` where cap is 0."""

    scale: float = 1.0
    cap: float = 0.0


def logit_transform(config: dict[str, Any]) -> LogitTransform:
    """Read the transform from a config.json.

    Known: final_logit_softcapping (Gemma 2 and 3), logits_scaling (Granite, a divisor), logit_scale (Cohere) and
    lm_head_multiplier (Falcon-H1). Whether it is the whole truth is checked against the model's own logits at start-up.
    """
    config = config.get("text_config") or config
    scale = float(config.get("logit_scale") or 1.0) * float(config.get("lm_head_multiplier") or 1.0)
    scale /= float(config.get("logits_scaling") or 1.0)
    return LogitTransform(scale, float(config.get("final_logit_softcapping") or 0.0))


def chunk_tokens(vocabulary: int, elements: int) -> int:
    """Return how many tokens to send through the head at once: at most `elements` logits, and at least 16 tokens."""
    return max(16, elements // vocabulary)


def tolerance(dtype_name: str) -> float:
    """Return how far two ways of computing the same log-probs may be apart in this type, in nats."""
    return 1e-3 if dtype_name == "float32" else 0.3


def head_probe(vocabulary: int) -> Batch:
    """Return a few tokens on which to compare log-probs with the model's own."""
    ids = np.random.default_rng(0).integers(0, vocabulary, 9)
    return Batch([ids[:1]], [ids[1:]], np.array([0]), np.array([1]))


def layout_probe(vocabulary: int) -> Batch:
    """Return two prompts of unequal lengths with two responses each, on which to compare a layout with the plain one."""
    draw = np.random.default_rng(0)
    rows = [draw.integers(0, vocabulary, length) for length in (5, 2, 1, 4, 2, 6)]
    return Batch(rows[:2], rows[2:], np.array([0, 0, 1, 1]), np.array([1, -1, 1, -1]))


class HeadMismatch(UserError):
    """The log-probs computed here differ from the model's own; training on them would be wrong."""

    def __init__(self, model: str, difference: float) -> None:
        super().__init__(
            f"{model}: log-probs from the hidden states differ from the model's own by up to {difference:.3g} nats a token; "
            "this architecture does something after its output head that lite-dil does not know. Please report it."
        )
