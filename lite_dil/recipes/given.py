"""What a program passes to a training besides options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lite_dil.data.rows import Rows
from lite_dil.generation.policy import Policy
from lite_dil.objectives.own import OwnLoss


@dataclass(frozen=True)
class Given:
    """Objects that no option can name.

    Attributes:
        policy: the policy to train; None loads one by the options.
        loss: the loss to train with; the options hold its identity.
        rewards: the functions of the reward by name; the options hold their digests.
        data, eval_data: rows that replace the options of these names.
        accept_changes: resume a run although its data or base model are not those that it began with.
    """

    policy: Policy | None = None
    loss: OwnLoss | None = None
    rewards: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    data: Rows | None = None
    eval_data: Rows | None = None
    accept_changes: bool = False


NOTHING_GIVEN = Given()
