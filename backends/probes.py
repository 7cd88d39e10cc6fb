"""Tokens for the backends' start-up checks, and how far two ways to compute may differ."""

from __future__ import annotations

import numpy as np

from lite_dil.base.errors import UserError
from lite_dil.batching.batch import Batch


def tolerance(dtype_name: str) -> float:
    """Return how far two computations of the same log-probs may differ in this dtype, in nats."""
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


def compare_head(model: str, own: np.ndarray, here: np.ndarray, dtype_name: str) -> None:
    """Raise an error unless log-probs computed here are those that the model computes with its own head.

    Args:
        own, here: of `head_probe`'s tokens, (tokens,).

    Raises:
        HeadMismatch: they differ.
        UserError: the model's own are not finite.
    """
    check_finite(model, own)
    difference = float(np.abs(own - here).max())
    if not difference < tolerance(dtype_name):
        raise HeadMismatch(model, difference)


def check_finite(model: str, logps: np.ndarray) -> None:
    """Raise UserError if log-probs of an untrained model are not finite."""
    if not np.isfinite(logps).all():
        raise UserError(
            f"{model} gives {logps[~np.isfinite(logps)][0]} as a log-probability before any training: its weights hold "
            "numbers that are not finite (download it again), or overflow in this --dtype (try float32)"
        )


class HeadMismatch(UserError):
    """The log-probs computed here differ from the model's own; training on them would be wrong."""

    def __init__(self, model: str, difference: float) -> None:
        super().__init__(
            f"{model}: its own logits give log-probs that differ by up to {difference:.3g} nats per token from those that "
            "lite-dil computes from its hidden states and output head, so training would be wrong: it does something to its "
            "logits that lite-dil does not know. Take another --backend or model, and please report its model_type"
        )
