"""Check before training that cached log-probs are the reference's: a cache may be of other weights, or of a broken kernel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lite_dil.backends.probes import check_finite
from lite_dil.base.errors import UserError
from lite_dil.base.streams import named
from lite_dil.batching.batch import Batch
from lite_dil.batching.schedule import Limits, plan
from lite_dil.data.encoder import Example
from lite_dil.training.passes import Passes

COMPARING = "comparing the reference cache with the model"
_LOOKED_AT = 1000  # examples among which cached ones are searched


def check_cache(passes: Passes, examples: Sequence[Example], limits: Limits, seed: int, model: str) -> None:
    """Raise UserError if cached log-probs of some examples, a pass at most, are not what `model` computes.

    This finds gross faults: between passes of other shapes the same model's values differ by rounding.
    """
    cache, backend = passes.cache, passes.backend
    drawn = named("training/reference-check", seed).permutation(len(examples))[:_LOOKED_AT].tolist()
    known = (examples[i] for i in drawn if cache.lookup(Batch.of([examples[i]])) is not None)
    some = [example for example, _ in zip(known, range(limits.examples), strict=False)]
    if not some:
        return
    batch = plan(some, backend.layout, *limits)[0]
    with backend.adapter_off():
        computed = passes.sequence_logps(batch)
    check_finite(model, computed)
    cached = cache.lookup(batch)
    assert cached is not None
    difference = np.abs(computed - cached)
    allowed = rounding(batch.lengths, backend.dtype_name)
    worst = int((difference / allowed).argmax())
    if difference[worst] > allowed[worst]:
        raise UserError(
            f"{cache.path} holds a log-prob of {cached[worst]:.6g} nats for a response of {batch.lengths[worst]:.0f} tokens, "
            f"for which the reference computes {computed[worst]:.6g}: {difference[worst]:.3g} apart, of which at most "
            f"{allowed[worst]:.2g} may be rounding. The cache was made with other weights, or was changed: remove that file, "
            "or give another folder with --reference-cache"
        )


def rounding(lengths: np.ndarray, dtype_name: str) -> np.ndarray:
    """Return how far passes of other shapes or layouts may bring a response's summed log-prob, (responses,), in nats.

    In bfloat16 SmolLM2-135M's differ by at most 0.18 times the root of the tokens, between plain and packed rows and batches
    of 1 and 8 pairs of HH (CPU; 0.081 nats a token of 3, 0.012 of 175). Six times that is allowed; other weights are farther
    off. float16 rounds less.
    """
    return 1e-4 * lengths if dtype_name == "float32" else np.sqrt(lengths)
