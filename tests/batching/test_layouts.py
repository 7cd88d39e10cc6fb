"""The layouts, with literal arrays a reader can check, and how batches are cut into rows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from lite_dil.batching.batch import Batch
from lite_dil.batching.layouts import Segment, packed, plain, prefix
from lite_dil.batching.schedule import computed_tokens, plan
from lite_dil.data.encoder import Example

PAIRS = [Example((1, 2, 3), ((4, 5), (6,)), (1, -1)), Example((7,), ((8,), (9, 10, 11)), (1, -1))]


def test_batch_by_hand() -> None:
    batch = Batch.of(PAIRS)
    assert batch.prompt_of.tolist() == [0, 0, 1, 1]
    assert batch.signs.tolist() == [1, -1, 1, -1]
    assert batch.chosen.tolist() == [0, 2]
    assert batch.rejected.tolist() == [1, 3]
    assert batch.lengths.tolist() == [2, 1, 1, 3]
    assert (batch.examples, batch.tokens) == (2, 5 + 4 + 2 + 4)


def test_plain_layout_by_hand() -> None:
    layout = plain(Batch.of(PAIRS), pad_id=99)
    assert layout.input_ids.tolist() == [[1, 2, 3, 4, 5], [1, 2, 3, 6, 99], [7, 8, 99, 99, 99], [7, 9, 10, 11, 99]]
    # Row 0: the last prompt token (column 2) predicts 4, column 3 predicts 5; row 1 starts at flat index 5; and so on.
    assert layout.hidden_index.tolist() == [2, 3, 7, 10, 15, 16, 17]
    assert layout.own_index.tolist() == [3, 4, 8, 11, 16, 17, 18]
    assert layout.input_ids.ravel()[layout.own_index].tolist() == layout.targets.tolist()
    assert layout.end_index.tolist() == [1, 2, 3, 6]
    assert layout.targets.tolist() == [4, 5, 6, 8, 9, 10, 11]
    assert layout.token_index.tolist() == [[0, 1, 0], [2, 0, 0], [3, 0, 0], [4, 5, 6]]
    assert layout.token_mask.tolist() == [[1, 1, 0], [1, 0, 0], [1, 0, 0], [1, 1, 1]]


def test_rows_are_padded_to_a_multiple() -> None:
    layout = plain(Batch.of(PAIRS), multiple=8)
    assert layout.input_ids.shape == (4, 8)
    assert layout.hidden_index.tolist() == [2, 3, 10, 16, 24, 25, 26]
    assert layout.input_ids.ravel()[layout.hidden_index].tolist() == [3, 4, 3, 7, 7, 9, 10]
    assert np.array_equal(layout.targets, plain(Batch.of(PAIRS)).targets)


def test_packed_layout_by_hand() -> None:
    layout = packed(Batch.of(PAIRS), pad_id=99, multiple=4)
    assert layout.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 99]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 1, 2, 3, 0]]
    # The first token of both responses is predicted by the last prompt token: 4 and 6 by token 2, 8 and 9 by token 6.
    assert layout.hidden_index.tolist() == [2, 3, 2, 6, 6, 8, 9]
    assert layout.own_index.tolist() == [3, 4, 5, 7, 8, 9, 10]
    assert layout.end_index.tolist() == [1, 2, 3, 6]
    assert layout.targets.tolist() == [4, 5, 6, 8, 9, 10, 11]
    assert layout.segments == (Segment(0, 3, (2, 1)), Segment(6, 1, (1, 3)))
    assert np.array_equal(layout.token_index, plain(Batch.of(PAIRS)).token_index)


def test_prefix_layout_by_hand() -> None:
    layout = prefix(Batch.of(PAIRS), pad_id=99)
    assert layout.prompt_ids.tolist() == [[1, 2, 3], [99, 99, 7]]
    assert layout.prompt_mask.tolist() == [[True, True, True], [False, False, True]]
    assert layout.response_ids.tolist() == [[4, 5, 99], [6, 99, 99], [8, 99, 99], [9, 10, 11]]
    assert layout.owner.tolist() == [0, 0, 1, 1]
    assert layout.hidden_index.tolist() == [0, 1, 3, 6, 9, 10, 11]
    assert layout.targets.tolist() == [4, 5, 6, 8, 9, 10, 11]


def test_layouts_count_the_tokens_they_compute() -> None:
    batch = Batch.of(PAIRS)
    assert computed_tokens(PAIRS, "plain") == plain(batch).input_ids.size == 20
    assert computed_tokens(PAIRS, "packed") == packed(batch).input_ids.size == 11
    assert computed_tokens(PAIRS, "prefix") == prefix(batch).prompt_ids.size + prefix(batch).response_ids.size == 18


@pytest.mark.parametrize("layout", ["plain", "packed", "prefix"])
def test_rows_of_a_layout_hold_every_pair_once_within_their_limits(layout: str) -> None:
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, 40, (60, 3))
    data = [Example((i,) * p, ((7,) * w, (8,) * r), (1, -1)) for i, (p, w, r) in enumerate(lengths.tolist())]
    rows = plan(data, layout, 5, 150)
    assert sorted(int(prompt[0]) for row in rows for prompt in row.prompts) == list(range(60))
    for row in rows:
        here = [data[int(prompt[0])] for prompt in row.prompts]
        assert len(here) == 1 or (len(here) <= 5 and computed_tokens(here, layout) <= 150)
    # First-fit leaves little room: no row could have taken the next one in.
    for row, other in itertools.pairwise(rows):
        both = [data[int(prompt[0])] for prompt in (*row.prompts, *other.prompts)]
        assert len(both) > 5 or computed_tokens(both, layout) > 150


def test_a_row_holds_no_more_pairs_than_asked() -> None:
    assert [row.examples for row in plan([PAIRS[0]] * 7, "packed", 3, 10**6)] == [3, 3, 1]


def test_a_pair_longer_than_a_row_goes_alone() -> None:
    rows = plan([Example((1,) * 50, ((2,), (3,)), (1, -1)), *PAIRS], "packed", 8, 20)
    assert [row.examples for row in rows] == [1, 2]
