"""Leaving out examples whose responses have no end token: a reward model scores a response at that token."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from lite_dil.data.dataset import Picked
from lite_dil.data.encoder import Example


def ended(examples: Sequence[Example], ends: Collection[int]) -> Sequence[Example]:
    """Return the examples all of whose responses end with one of the tokens `ends`; ``--max-length`` cuts it off others."""
    whole = [all(response[-1] in ends for response in example.responses) for example in examples]
    return examples if all(whole) else Picked(examples, np.flatnonzero(whole))
