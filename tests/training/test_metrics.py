"""Metrics and schedules by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from conftest import config, examples

from lite_dil.batching.batch import Batch
from lite_dil.batching.schedule import Schedule, plan
from lite_dil.data.encoder import Example
from lite_dil.training.metrics import Means, answer_metrics, derived

# Two pairs, as chosen, rejected, chosen, rejected; f = policy - reference = 2, -1, 1, 3 as sums.
POLICY, REFERENCE = np.array([-8, -6, -4, -2], np.float32), np.array([-10, -5, -5, -5], np.float32)
PAIRS = Batch.of([Example((1,), ((3,) * 4, (3,) * 2), (1, -1)), Example((2,), ((3,) * 2, (3,) * 3), (1, -1))])


def figures(batch: Batch, *arrays: np.ndarray, **changes: object) -> dict[str, float]:
    means = Means()
    answer_metrics(means, *arrays, batch, config(**changes))
    return derived(means.means())


def test_metrics_of_pairs_by_hand() -> None:
    assert figures(PAIRS, POLICY, REFERENCE, loss="dpo", beta=0.5) == {
        "rewards/chosen": 0.75,  # 0.5 * (2 + 1) / 2
        "rewards/rejected": 0.5,  # 0.5 * (-1 + 3) / 2
        "rewards/accuracies": 0.5,  # 2 > -1, but 1 < 3; the means would say 1.5 > 1
        "rewards/margins": 0.25,
        "logps/chosen": -6,
        "logps/rejected": -4,
        "log_ratio/chosen": 1.5,
        "log_ratio/rejected": 1,
    }
    means = figures(PAIRS, POLICY, REFERENCE, loss="lsif")
    assert means["log_ratio/chosen"] == 0.5  # (2 / 4 + 1 / 2) / 2
    assert means["log_ratio/rejected"] == 0.25  # (-1 / 2 + 3 / 3) / 2
    assert means["rewards/accuracies"] == 0.5


def test_metrics_of_answers_without_partners_by_hand() -> None:
    """Each side's mean is over its own answers, also where batches hold them in unequal numbers."""
    means, lone = Means(), [Example((i,), ((3,),), (sign,)) for i, sign in enumerate((1, 1, 1, -1))]
    for part, values in ((lone[:2], [2.0, 4.0]), (lone[2:], [6.0, -1.0])):
        answer_metrics(means, np.array(values), np.zeros(2), Batch.of(part), config(loss="kto", beta=0.5))
    found = derived(means.means())
    assert "rewards/accuracies" not in found
    assert (found["log_ratio/chosen"], found["log_ratio/rejected"]) == (4.0, -1.0)
    assert found["rewards/margins"] == 2.5  # 0.5 * 4 + 0.5 * 1
    means = Means()
    answer_metrics(means, np.zeros(2), np.zeros(2), Batch.of(lone[:2]), config(loss="kto"))
    assert "rewards/margins" not in derived(means.means())


def test_metrics_of_several_rejected_answers_compare_each() -> None:
    batch = Batch.of([Example((1,), ((3,), (3,), (3,)), (-1, 1, -1))])
    found = figures(batch, np.array([1.0, 2.0, 3.0]), np.zeros(3), loss="dpo", beta=1.0)
    assert (found["rewards/accuracies"], found["rewards/margins"]) == (0.5, 0.0)


def test_how_often_a_cap_acts_by_hand() -> None:
    assert "capped" not in figures(PAIRS, POLICY, REFERENCE, loss="lsif", logp_reduction="sum")
    found = figures(PAIRS, POLICY, REFERENCE, loss="lsif", logp_reduction="sum", log_ratio_cap=1.5)
    assert found["capped"] == 0.5  # of 2, -1, 1, 3
    far = figures(PAIRS, POLICY, np.array([-10, 80, -5, -5]), loss="f-dpo", divergence="forward_kl")
    assert far["capped"] == 0.25  # e^86
    assert "capped" not in figures(PAIRS, POLICY, REFERENCE, loss="f-dpo")


def test_how_many_responses_carry_an_exponential_loss_by_hand() -> None:
    share = "ratio/effective_share"
    equal = figures(PAIRS, REFERENCE, REFERENCE, loss="lsif")
    assert equal[share] == 1 and "ratio/mean" not in equal and "ratio/square" not in equal
    far = np.array([600, 0, 0, 0])  # one of four counts
    assert figures(PAIRS, REFERENCE + far, REFERENCE, loss="ukl", logp_reduction="sum")[share] == pytest.approx(0.25)
    some = figures(PAIRS, REFERENCE + np.array([math.log(3), 0, 0, 0]), REFERENCE, loss="lsif", logp_reduction="sum")
    assert some[share] == pytest.approx((6 / 4) ** 2 / (12 / 4), rel=1e-6)
    capped = figures(PAIRS, REFERENCE + far, REFERENCE, loss="lsif", logp_reduction="sum", log_ratio_cap=math.log(3))
    assert capped[share] == pytest.approx(some[share], rel=1e-6)
    assert share not in figures(PAIRS, POLICY, REFERENCE, loss="dpo")


def test_every_epoch_takes_every_pair_once_in_another_order() -> None:
    data = examples(10)
    schedule = Schedule(config(batch_size=2, gradient_accumulation_steps=2, epochs=2.0), data)
    assert (schedule.steps_per_epoch, schedule.steps) == (3, 6)
    orders = []
    for epoch in range(2):
        batches = [schedule.batches(3 * epoch + step) for step in (1, 2, 3)]
        assert [sum(batch.examples for batch in step) for step in batches] == [4, 4, 2]
        orders.append([tuple(batch.prompts[i]) for step in batches for batch in step for i in range(batch.examples)])
        assert sorted(orders[-1]) == sorted(example.prompt for example in data)
    assert orders[0] != orders[1]
    assert schedule.epoch(6) == 2
    assert Schedule(config(max_steps=5), data).steps == 5
    assert Schedule(config(epochs=0.5, batch_size=1, gradient_accumulation_steps=1), data).steps == 5


def test_batches_are_of_like_length() -> None:
    data = examples(9)
    assert [batch.examples for batch in plan(data, "plain", 4, 10**6)] == [4, 4, 1]
    rows = [len(batch.prompts[0]) + int(batch.lengths.max()) for batch in plan(data, "plain", 1, 10**6)]
    assert rows == sorted((len(e.prompt) + max(map(len, e.responses)) for e in data), reverse=True)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_no_step_has_rate_0(kind: str) -> None:
    schedule = Schedule(config(lr_scheduler_type=kind, warmup_ratio=0.0, max_steps=7, learning_rate=1.0), examples(3))
    rates = [schedule.learning_rate(step) for step in range(1, 8)]
    assert rates[0] == 1
    assert min(rates) > 0
    assert rates == sorted(rates, reverse=True)
