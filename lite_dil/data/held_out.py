"""Holding a part of the training data out, by prompt, so that no prompt is on both sides."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from lite_dil.base.errors import UserError
from lite_dil.data.dataset import DataSet, Picked

# Where --eval-fraction is not given: a share of the rows, at most so many, and none of fewer rows than these.
_SHARE, _MOST, _LEAST = 0.05, 200, 200


def wanted(rows: int, fraction: float | None) -> int:
    """Return how many of `rows` are to be held out; None takes the default."""
    if fraction is None:
        return 0 if rows < _LEAST else min(_MOST, round(_SHARE * rows))
    return round(fraction * rows)


def taken(prompts: np.ndarray, count: int) -> np.ndarray:
    """Return which rows to hold out, (rows,) bool: at most `count`, and each prompt with all its rows or none of them.

    Prompts are taken in the order of their digests `prompts`, (rows,) uint64, which is as good as a random one, and the same
    for any seed and order of the rows.
    """
    _, prompt_of, rows_of = np.unique(prompts, return_inverse=True, return_counts=True)
    small = np.flatnonzero(rows_of <= count)
    held = np.zeros(len(rows_of), bool)
    held[small[np.cumsum(rows_of[small]) <= count]] = True
    return np.asarray(held[prompt_of])


def split(data: DataSet, fraction: float | None) -> tuple[DataSet, DataSet | None]:
    """Return what is left to train on, and what is held out, None where nothing is; see `taken`.

    Raises:
        UserError: a fraction was given, and no prompt has so few rows.
    """
    count = wanted(len(data.examples), fraction)
    is_held = taken(data.names[:, 0], count)
    if not is_held.any():
        if fraction:
            raise UserError(
                f"--eval-fraction {fraction:g} of {len(data.examples)} rows is {count}, and no prompt has so few; give "
                "--eval-data"
            )
        return data, None
    order = data.examples.order if isinstance(data.examples, Picked) else np.arange(len(data.examples))
    rows, first = np.unique(order[is_held], return_index=True)  # a source's weight may take a row several times
    examples = Picked(data.store, rows)
    answers = Counter(sign for example in examples for sign in example.signs)
    training = replace(
        data, examples=Picked(data.store, order[~is_held]), names=data.names[~is_held], answers=data.answers - answers
    )
    names = data.names[is_held][first]
    return training, replace(
        data, examples=examples, names=names, answers=answers, prompts_cut=0, responses_cut=0, prompts_halved=0, sources=[]
    )
