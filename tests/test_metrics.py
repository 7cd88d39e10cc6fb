"""Metrics and schedules by hand."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import config, examples

from lite_dil.metrics import pair_losses, pair_metrics
from lite_dil.schedule import Schedule, plan

# Two pairs, as chosen, rejected, chosen, rejected; f = policy - reference = 2, -1, 1, 3 as sums.
POLICY, REFERENCE = np.array([-8, -6, -4, -2], np.float32), np.array([-10, -5, -5, -5], np.float32)
LENGTHS, CHOSEN, REJECTED = np.array([4, 2, 2, 3], np.float32), np.array([0, 2]), np.array([1, 3])


def test_pair_metrics_by_hand() -> None:
    arrays = (POLICY, REFERENCE, LENGTHS, CHOSEN, REJECTED)
    sums = pair_metrics(*arrays, config(loss="dpo", beta=0.5))
    assert sums == {
        "rewards/chosen": 0.75,  # 0.5 * (2 + 1) / 2
        "rewards/rejected": 0.5,  # 0.5 * (-1 + 3) / 2
        "rewards/accuracies": 0.5,  # 2 > -1, but 1 < 3; the means would say 1.5 > 1
        "rewards/margins": 0.25,
        "logps/chosen": -6,
        "logps/rejected": -4,
        "log_ratio/chosen": 1.5,
        "log_ratio/rejected": 1,
    }
    means = pair_metrics(*arrays, config(loss="lsif"))
    assert means["log_ratio/chosen"] == 0.5  # (2 / 4 + 1 / 2) / 2
    assert means["log_ratio/rejected"] == 0.25  # (-1 / 2 + 3 / 3) / 2
    assert means["rewards/accuracies"] == 0.5


def test_pair_losses_by_hand() -> None:
    losses = pair_losses(config(loss="ukl", logp_reduction="sum", beta=2.0))
    # -2 * 2 + e^(2 * -1), -2 * 1 + e^(2 * 3)
    np.testing.assert_allclose(losses(POLICY, REFERENCE, LENGTHS, CHOSEN, REJECTED), [-4 + np.exp(-2), -2 + np.exp(6)])


def test_every_epoch_takes_every_pair_once_in_another_order() -> None:
    data = examples(10)
    schedule = Schedule(config(batch_size=2, gradient_accumulation_steps=2, epochs=2.0), data)
    assert (schedule.steps_per_epoch, schedule.steps) == (3, 6)
    orders = []
    for epoch in range(2):
        batches = [schedule.batches(3 * epoch + step) for step in (1, 2, 3)]
        assert [sum(batch.pairs for batch in step) for step in batches] == [4, 4, 2]
        orders.append([tuple(batch.prompts[i]) for step in batches for batch in step for i in range(batch.pairs)])
        assert sorted(orders[-1]) == sorted(example.prompt for example in data)
    assert orders[0] != orders[1]
    assert schedule.epoch(6) == 2
    assert Schedule(config(max_steps=5), data).steps == 5
    assert Schedule(config(epochs=0.5, batch_size=1, gradient_accumulation_steps=1), data).steps == 5


def test_batches_are_of_like_length() -> None:
    data = examples(9)
    assert [batch.pairs for batch in plan(data, "plain", 4, 10**6)] == [4, 4, 1]
    rows = [len(batch.prompts[0]) + int(batch.lengths.max()) for batch in plan(data, "plain", 1, 10**6)]
    assert rows == sorted((len(e.prompt) + max(map(len, e.responses)) for e in data), reverse=True)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_no_step_has_rate_0(kind: str) -> None:
    schedule = Schedule(config(lr_scheduler_type=kind, warmup_ratio=0.0, max_steps=7, learning_rate=1.0), examples(3))
    rates = [schedule.learning_rate(step) for step in range(1, 8)]
    assert rates[0] == 1
    assert min(rates) > 0
    assert rates == sorted(rates, reverse=True)
