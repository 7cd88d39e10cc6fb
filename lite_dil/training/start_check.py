"""Check before the first step that the untrained model equals its reference."""

from __future__ import annotations

import numpy as np

from lite_dil.backends.options import LoadOptions
from lite_dil.backends.probes import check_finite
from lite_dil.base.errors import UserError
from lite_dil.batching.batch import Batch
from lite_dil.training.passes import Passes

CHECKING = "checking that the untrained model is its own reference"


def starts_at_reference(options: LoadOptions) -> bool:
    """Return whether the untrained policy equals its reference; not with an initial adapter and the base as reference."""
    return not (options.init_adapter and options.reference == "base")


def check_start(passes: Passes, batch: Batch, model: str) -> None:
    """Raise UserError unless the log-ratio of the untrained `model` is exactly 0; otherwise every later figure is wrong.

    The reference's log-probs of the batch are cached afterwards.
    """
    backend = passes.backend

    def both(batch: Batch) -> np.ndarray:  # in the same pass: a split pass may differ in the last bits
        with backend.adapter_off():
            reference = backend.sequence_logps(batch)
        return np.stack([reference, backend.sequence_logps(batch)], -1)

    reference, policy = passes.run(both, batch).T
    check_finite(model, reference)
    passes.remember(batch, reference)
    worst = float(np.abs(policy - reference).max())
    if worst != 0:
        raise UserError(
            f"{model}: with the adapter on, the untrained model differs from its reference by {worst:.3g} nats; expected "
            "exactly 0. The model's forward pass is not deterministic, or its adapter cannot be switched off"
        )
