"""From log-probs to a loss: weights of the sides, what an objective may train on, kto's baseline."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import config, examples

from lite_dil.base.errors import UserError
from lite_dil.base.signs import CHOSEN, REJECTED
from lite_dil.batching.batch import Batch
from lite_dil.data.encoder import Example
from lite_dil.data.mismatched import mismatched
from lite_dil.objectives.accepts import check_data
from lite_dil.objectives.criterion import Criterion
from lite_dil.objectives.table import OBJECTIVES, losses_on


def lone(*signs: int, length: int = 2) -> list[Example]:
    """Answers without partners, each to a prompt of its own."""
    return [Example((i + 3,), ((5,) * length,), (sign,)) for i, sign in enumerate(signs)]


def loss(
    data: list[Example], f: list[float], part: list[Example] | None = None, baseline: float = 0.0, **changes: Any
) -> float:
    """The mean loss over `part` of the data, or all of it, at these summed log-ratios."""
    part = data if part is None else part
    batch, criterion = Batch.of(part), Criterion(config(**changes), data)
    return float(criterion(np.array(f), np.zeros(len(f)), criterion.inputs(batch, baseline))) / len(part)


def test_pairs_by_hand() -> None:
    data = [Example((1,), ((3,) * 4, (3,) * 2), (1, -1)), Example((2,), ((3,) * 2, (3,) * 3), (1, -1))]
    f = [2.0, -1.0, 1.0, 3.0]
    # -2 * 2 + e^(2 * -1), -2 * 1 + e^(2 * 3)
    expected = (-4 + np.exp(-2) - 2 + np.exp(6)) / 2
    assert loss(data, f, loss="ukl", logp_reduction="sum", beta=2.0) == pytest.approx(expected)
    # means over 4, 2, 2 and 3 tokens: -0.5 + e^-0.5, -0.5 + e^1
    assert loss(data, f, loss="ukl") == pytest.approx((-1 + np.exp(-0.5) + np.e) / 2)
    # --denominator both: the chosen answers count among pi_ref's samples, half of which they are
    both = (-3 + (np.exp(2) + np.exp(-1) + np.exp(1) + np.exp(3)) / 2) / 2
    assert loss(data, f, loss="ukl", logp_reduction="sum", denominator="both") == pytest.approx(both)
    weighted = (3 * -3 + 0.5 * (np.exp(-1) + np.exp(3))) / 2
    assert loss(data, f, loss="ukl", logp_reduction="sum", chosen_weight=3.0, rejected_weight=0.5) == pytest.approx(weighted)


def test_unequal_sides_weigh_by_their_share_of_the_data() -> None:
    """Three good answers and one bad one: E_good[-f] + E_bad[e^f], each the mean over its own side."""
    data = lone(1, 1, 1, -1)
    found = loss(data, [1.0, 2.0, 3.0, -1.0], loss="ukl", logp_reduction="sum")
    assert found == pytest.approx(-2 + np.exp(-1))
    # A batch of good answers alone keeps that weight, so that its mean over batches is the whole.
    parts = [
        loss(data, f, part, loss="ukl", logp_reduction="sum") for f, part in (([1.0, 2.0, 3.0], data[:3]), ([-1.0], data[3:]))
    ]
    assert (3 * parts[0] + parts[1]) / 4 == pytest.approx(found)
    both = -2 + (np.exp([1.0, 2.0, 3.0, -1.0]).sum()) / 4
    assert loss(data, [1.0, 2.0, 3.0, -1.0], loss="ukl", logp_reduction="sum", denominator="both") == pytest.approx(both)


@pytest.mark.parametrize("name", losses_on("sides"))
def test_unpaired_answers_of_equal_numbers_are_pairs(name: str) -> None:
    pairs = [Example((i,), ((5,) * 3, (6,) * 2), (1, -1)) for i in range(3)]
    apart = [Example(e.prompt, (r,), (s,)) for e in pairs for r, s in zip(e.responses, e.signs, strict=True)]
    f = [0.5, -1.0, 2.0, 0.3, -0.7, 1.1]
    assert loss(apart, f, baseline=0.2, loss=name) == pytest.approx(loss(pairs, f, baseline=0.2, loss=name))


def test_several_rejected_answers_share_their_side() -> None:
    data = [Example((1,), ((3,), (4,), (5,)), (1, -1, -1)), Example((2,), ((3,), (4,), (5,)), (1, -1, -1))]
    f = [1.0, 0.0, 2.0, 3.0, 1.0, -1.0]
    assert loss(data, f, loss="ukl") == pytest.approx(-2 + np.exp([0.0, 2.0, 1.0, -1.0]).mean())
    gaps = np.array([1.0, -1.0, 2.0, 4.0])
    assert loss(data, f, loss="dpo", beta=1.0) == pytest.approx(np.log1p(np.exp(-gaps)).mean())


def test_kto_by_hand() -> None:
    """1 - sigmoid(f - z0) on good, 1 - sigmoid(z0 - f) on bad answers, evened out: 2 good, 1 bad."""
    data = lone(1, 1, -1)
    sigmoid = 1 / (1 + np.exp(-np.array([1 - 0.5, 2 - 0.5, 0.5 + 1])))
    expected = (1 - sigmoid[:2]).mean() / 2 + (1 - sigmoid[2]) / 2
    assert loss(data, [1.0, 2.0, -1.0], baseline=0.5, loss="kto", beta=1.0) == pytest.approx(expected)
    weighted = 4 / 3 * (1 - sigmoid[:2]).mean() / 2 + (1 - sigmoid[2]) / 2
    assert loss(data, [1.0, 2.0, -1.0], baseline=0.5, loss="kto", beta=1.0, chosen_weight=4 / 3) == pytest.approx(weighted)


def test_ktos_rows_pair_each_prompt_with_answers_to_another() -> None:
    data = examples(4)
    data[1] = Example(data[0].prompt, data[1].responses, data[1].signs)  # the same prompt twice
    found = mismatched(data, "kto", 1024)
    assert [row.prompt for row in found] == [example.prompt for example in data]
    assert [row.responses for row in found] == [data[i].responses for i in (2, 2, 3, 0)]
    cut = mismatched([Example((1,) * 9, ((2,),), (1,)), Example((3,), ((4,) * 9,), (-1,))], "kto", 10)
    assert all(len(row.prompt) + len(row.responses[0]) <= 10 for row in cut)
    with pytest.raises(UserError, match="same"):
        mismatched(data[:2], "kto", 1024)


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_what_each_objective_may_train_on(name: str) -> None:
    needs, both = OBJECTIVES[name].data, {CHOSEN, REJECTED}
    check_data(name, "pairs", both, "F", False)
    cases = {
        ("unpaired", True): needs == "pairs",
        ("unpaired", False): needs != "chosen",  # only good answers
        ("demonstrations", False): needs != "chosen",
    }
    for (form, bad), refused in cases.items():
        signs = both if bad else {CHOSEN}
        if refused:
            with pytest.raises(UserError, match=f"--loss {name} needs .*F has"):
                check_data(name, form, signs, "F", False)
        else:
            check_data(name, form, signs, "F", False)
    if needs != "chosen":
        check_data(name, "demonstrations", {CHOSEN}, "F", True)
        for form in ("pairs", "unpaired"):
            with pytest.raises(UserError, match="--sample-rejected is for demonstrations"):
                check_data(name, form, both, "F", True)
    else:
        with pytest.raises(UserError, match="F has none"):
            check_data(name, "unpaired", {REJECTED}, "F", False)
