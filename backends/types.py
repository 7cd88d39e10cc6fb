"""What goes into a backend and what comes out of it: results of a step, sampling, answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from lite_dil.base.errors import UserError

if TYPE_CHECKING:  # the command line's help comes from here too, and numpy takes longer than the rest of it
    import numpy as np

    from lite_dil.batching.batch import Batch


POLICY, REFERENCE = "policy", "reference"  # the adapter that training starts with, and what it is compared with
END, EACH = "end", "each"  # where a head reads


@dataclass(frozen=True)
class Head:
    """A linear map from hidden states to `outputs` numbers, float32, on an adapter of its own.

    It reads the state at each response's last token (`END`), or at every response token (`EACH`), each token's own state and
    not the one that predicts it.
    """

    outputs: int
    at: str = END

    def __post_init__(self) -> None:
        if self.outputs < 1 or self.at not in (END, EACH):
            raise ValueError(f"{self}: expected at least 1 output, at {END!r} or {EACH!r}")


class MicroBatch(NamedTuple):
    """One forward and backward pass of a step.

    `inputs` are the loss's own, as numpy arrays. `reference` is what the loss reads of the reference, None where the step
    computes it.
    """

    batch: Batch
    inputs: dict[str, np.ndarray]
    reference: np.ndarray | None = None


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step leaves for the metrics.

    `policy` and `reference` are what the loss read, float32, in the order of the batches: log-probs in nats, summed,
    (responses,), or of each token, (tokens,), or the scores of a head; `reference` is None where the loss reads nothing of it.
    `loss` is the mean over the examples; `grad_norm` is taken before clipping; `skipped` is true, and `grad_norm` 0, where
    float16's loss scaling found an overflow and left the weights alone.
    """

    loss: float
    grad_norm: float
    policy: np.ndarray
    reference: np.ndarray | None
    skipped: bool = False


def joined(parts: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """Return what was read of all passes, or None where nothing was."""
    import numpy as np

    found = [part for part in parts if part is not None]
    return np.concatenate(found) if found else None


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the model's distribution.

    The logits are divided by `temperature`, of which 0 takes the likeliest token; then only the likeliest tokens are kept, the
    fewest whose probability reaches `top_p`. The defaults draw from exactly the model's own distribution.
    """

    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"--temperature {self.temperature:g}: expected at least 0, which takes the likeliest token")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p:g}: expected above 0 and at most 1, which cuts nothing off")


OWN = Sampling()  # the model's own distribution


def never() -> bool:
    """Return false: nothing stops a generation."""
    return False


class Generated(NamedTuple):
    """A generated continuation of a prompt.

    `ids` are the new tokens up to and without the end token; `end` is the end token that closed it, or None where it reached
    the limit first. The end token is one of the new tokens that the limit counts, so `end` is None exactly where there are as
    many `ids` as the limit allows.
    """

    ids: list[int]
    end: int | None

    @classmethod
    def of(cls, tokens: list[int], end_ids: Sequence[int]) -> Generated:
        """Cut what was generated at the first of `end_ids`."""
        at = next((i for i, token in enumerate(tokens) if token in end_ids), None)
        return cls(tokens, None) if at is None else cls(tokens[:at], tokens[at])


@dataclass(frozen=True)
class DenseWeight:
    """A weight that training had in fewer bits: its shape, (out, in), and what makes it in float32."""

    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


# Prompt and response of each answer, for what reads exported files.
Sequences = list[tuple[tuple[int, ...], tuple[int, ...]]]
