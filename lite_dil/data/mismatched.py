"""Prompts paired with responses to other prompts, from which kto estimates its reference point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lite_dil.base.errors import UserError
from lite_dil.data.encoder import Example, truncate
from lite_dil.data.store import StoreWriter


def mismatched(examples: Sequence[Example], loss: str, max_length: int) -> Sequence[Example]:
    """Return for each example its prompt with the responses of the next example with another prompt: kto's rows for z0.

    They are fixed for the data set, so that the reference's log-probs are computed once.
    """
    count, partner = len(examples), np.full(len(examples), -1)
    prompts = np.fromiter((hash(example.prompt) for example in examples), np.int64, count)
    for i in [*range(count - 1, -1, -1)] * 2:  # twice, since the next one after the last is among the first
        following = (i + 1) % count
        partner[i] = following if prompts[following] != prompts[i] else partner[following]
    if -1 in partner:
        raise UserError(f"--loss {loss} compares responses to different prompts, and all rows have the same prompt")
    found = StoreWriter()
    for example, other in zip(examples, partner.tolist(), strict=True):
        found.append(truncate(replace(examples[other], prompt=example.prompt, place=example.place), max_length)[0])
    return found.store()
