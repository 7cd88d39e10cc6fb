"""What a program hands to a training beside options."""

from __future__ import annotations

from dataclasses import dataclass

from lite_dil.data.rows import Rows
from lite_dil.generation.policy import Policy
from lite_dil.objectives.own import OwnLoss


@dataclass(frozen=True)
class Given:
    """Objects that no option names.

    Attributes:
        policy: is trained; None loads one as the options say.
        loss: is trained by; the options hold its identity.
        data, eval_data: are read instead of what the options of these names say.
    """

    policy: Policy | None = None
    loss: OwnLoss | None = None
    data: Rows | None = None
    eval_data: Rows | None = None


NOTHING_GIVEN = Given()
