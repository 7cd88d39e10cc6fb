"""The plain layout, with literal arrays a reader can check."""

from __future__ import annotations

import numpy as np

from lite_dil.batch import Batch
from lite_dil.examples import Example
from lite_dil.layouts import plain

PAIRS = [Example((1, 2, 3), ((4, 5), (6,)), (1, -1)), Example((7,), ((8,), (9, 10, 11)), (1, -1))]


def test_batch_by_hand() -> None:
    batch = Batch.of(PAIRS)
    assert batch.prompt_of.tolist() == [0, 0, 1, 1]
    assert batch.signs.tolist() == [1, -1, 1, -1]
    assert batch.chosen.tolist() == [0, 2]
    assert batch.rejected.tolist() == [1, 3]
    assert batch.lengths.tolist() == [2, 1, 1, 3]
    assert (batch.pairs, batch.tokens) == (2, 5 + 4 + 2 + 4)


def test_plain_layout_by_hand() -> None:
    layout = plain(Batch.of(PAIRS), pad_id=99)
    assert layout.input_ids.tolist() == [[1, 2, 3, 4, 5], [1, 2, 3, 6, 99], [7, 8, 99, 99, 99], [7, 9, 10, 11, 99]]
    # Row 0: the last prompt token (column 2) predicts 4, column 3 predicts 5; row 1 starts at flat index 5; and so on.
    assert layout.hidden_index.tolist() == [2, 3, 7, 10, 15, 16, 17]
    assert layout.targets.tolist() == [4, 5, 6, 8, 9, 10, 11]
    assert layout.token_index.tolist() == [[0, 1, 0], [2, 0, 0], [3, 0, 0], [4, 5, 6]]
    assert layout.token_mask.tolist() == [[1, 1, 0], [1, 0, 0], [1, 0, 0], [1, 1, 1]]


def test_rows_are_padded_to_a_multiple() -> None:
    layout = plain(Batch.of(PAIRS), multiple=8)
    assert layout.input_ids.shape == (4, 8)
    assert layout.hidden_index.tolist() == [2, 3, 10, 16, 24, 25, 26]
    assert layout.input_ids.ravel()[layout.hidden_index].tolist() == [3, 4, 3, 7, 7, 9, 10]
    assert np.array_equal(layout.targets, plain(Batch.of(PAIRS)).targets)
