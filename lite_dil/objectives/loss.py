"""What a backend's step minimises: a pure function, and what it reads of the model."""

from __future__ import annotations

from typing import Any, Protocol

from lite_dil.objectives.losses import Array

# What a loss reads: log-probs summed over each response, (responses,); of each response token, (tokens,); or the outputs of a
# head, (responses, outputs) or (tokens, outputs). NOTHING is of the reference alone, which is then not computed.
SUMS, TOKENS, SCORES, NOTHING = "sums", "tokens", "scores", "nothing"


class Loss(Protocol):
    """A loss over a batch of responses.

    It is hashable and constant: one object for all the steps of a training, since a compiled step is kept for each.

    Attributes:
        reads: what `policy` holds: `SUMS`, `TOKENS` or `SCORES` of the adapter that is trained, with a gradient.
        reference: what `reference` holds: `SUMS`, `TOKENS` or `NOTHING`, without a gradient.
        token_inputs: names of the inputs that have one value a response token.
    """

    @property
    def reads(self) -> str:
        """See above."""

    @property
    def reference(self) -> str:
        """See above."""

    @property
    def token_inputs(self) -> tuple[str, ...]:
        """See above."""

    def __call__(self, policy: Array, reference: Array | None, inputs: dict[str, Any]) -> Array:
        """Return the loss summed over the batch's examples, a scalar; it is divided by the step's number of examples.

        All arrays are float32 or integers of the backend's own library. Arrays of tokens are in the order of the batch's
        responses. A backend may fill them up at their end, with zeros; ``inputs["present"]``, (tokens,) float32, which a loss
        that reads `TOKENS` is given beside its own inputs, is 1 on tokens and 0 there. A term that is not 0 by itself must be
        multiplied by it.
        """
