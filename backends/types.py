"""Inputs and outputs of a backend: heads, micro-batches, step results, sampling, generated responses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from lite_dil.base.errors import UserError

if TYPE_CHECKING:  # --help imports this file, and importing numpy takes longer than all the rest
    import numpy as np

    from lite_dil.batching.batch import Batch


POLICY, REFERENCE = "policy", "reference"  # the first adapter to train, and what it is compared with
END, EACH = "end", "each"  # the states that a head reads, see `Head`


@dataclass(frozen=True)
class Head:
    """A linear map from hidden states to `outputs` numbers, float32, that belongs to an adapter.

    It reads the state of each response's last token (`END`), or of every response token (`EACH`): each token's own state, not
    the one that predicts it.
    """

    outputs: int
    at: str = END

    def __post_init__(self) -> None:
        if self.outputs < 1 or self.at not in (END, EACH):
            raise ValueError(f"{self}: expected at least 1 output, at {END!r} or {EACH!r}")


class MicroBatch(NamedTuple):
    """One forward and backward pass of a step.

    `inputs` are the loss's own inputs, as numpy arrays. `reference` is what the loss reads of the reference, or None if the
    step should compute it.
    """

    batch: Batch
    inputs: dict[str, np.ndarray]
    reference: np.ndarray | None = None


@dataclass(frozen=True)
class StepResult:
    """The results of an optimiser step, for the metrics.

    `policy` and `reference` are what the loss read, float32, in the order of the batches: log-probs in nats, summed
    (responses,) or per token (tokens,), or the scores of a head; `reference` is None if the loss does not read it. `loss` is
    the mean over examples; `grad_norm` is measured before clipping, and `clipped` says whether that made it smaller; `skipped`
    is true, and `grad_norm` 0, if float16 loss scaling found an overflow and left the weights unchanged.
    """

    loss: float
    grad_norm: float
    policy: np.ndarray
    reference: np.ndarray | None
    skipped: bool = False
    clipped: bool = False


def joined(parts: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """Return the concatenated results of all passes, or None if there are none."""
    import numpy as np

    found = [part for part in parts if part is not None]
    return np.concatenate(found) if found else None


@dataclass(frozen=True)
class Sampling:
    """How to draw a token from the model's distribution.

    The logits are divided by `temperature`; 0 takes the most likely token. Then only the most likely tokens are kept, the
    fewest whose total probability reaches `top_p`. The defaults sample from the model's exact distribution.
    """

    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"--temperature {self.temperature:g}: expected at least 0, which takes the most likely token")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p:g}: expected above 0 and at most 1, which keeps all tokens")


OWN = Sampling()  # the model's own distribution


# Whether a response ends with the tokens that it has so far, for a reason that no single token shows.
Done = Callable[[Sequence[int]], bool]


def never() -> bool:
    """Return false, so that nothing stops a generation."""
    return False


class Generated(NamedTuple):
    """A generated continuation of a prompt.

    `ids` are the new tokens without the end token; `end` is the end token, or None if the limit or `done` came first. The
    limit counts the end token: without `done`, `end` is None exactly when there are as many `ids` as the limit allows.
    """

    ids: list[int]
    end: int | None

    @property
    def whole(self) -> tuple[int, ...]:
        """The tokens with the end token, if there is one."""
        return (*self.ids,) if self.end is None else (*self.ids, self.end)

    @classmethod
    def of(cls, tokens: list[int], end_ids: Sequence[int]) -> Generated:
        """Cut generated tokens at the first of `end_ids`."""
        at = next((i for i, token in enumerate(tokens) if token in end_ids), None)
        return cls(tokens, None) if at is None else cls(tokens[:at], tokens[at])


@dataclass(frozen=True)
class DenseWeight:
    """A weight that training had in fewer bits: its shape, (out, in), and a function that returns it in float32."""

    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


# Prompt and response ids of each response, for the readers of exported files.
Sequences = list[tuple[tuple[int, ...], tuple[int, ...]]]
