"""The protocol of the loss that a backend's step minimises: a pure function, and which outputs of the model it reads."""

from __future__ import annotations

from typing import Any, Protocol

from lite_dil.objectives.losses import Array

# What a loss reads: log-probs summed over each response, (responses,); log-probs of each response token, (tokens,); or the
# outputs of a head, (responses, outputs) or (tokens, outputs). NOTHING is for the reference only, which is then not computed.
SUMS, TOKENS, SCORES, NOTHING = "sums", "tokens", "scores", "nothing"


class Loss(Protocol):
    """A loss over a batch of responses.

    It is hashable and constant: a training uses one object for all its steps, since a step is compiled for each object.

    Attributes:
        reads: what `policy` holds: `SUMS`, `TOKENS` or `SCORES` of the trained adapter, with a gradient.
        reference: what `reference` holds: `SUMS`, `TOKENS` or `NOTHING`, without a gradient.
        token_inputs: names of the inputs that have one value per response token.
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

        All arrays are float32 or integers of the backend's own library. Token arrays are in the order of the batch's
        responses. A backend may pad them with zeros at the end; a loss that reads `TOKENS` also gets ``inputs["present"]``,
        (tokens,) float32, which is 1 on tokens and 0 on padding. Multiply by it any term that is not 0 on padding by itself.
        """
