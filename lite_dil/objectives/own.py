"""User-defined losses: functions of log-ratios, and their identity in a run's files.

A run's config.yaml holds ``own:NAME:KIND:REDUCTION:DIGEST``. Reports and exports need nothing more of a loss. To train
further, the functions must be given again; they are never loaded because a file names them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from lite_dil.base.errors import UserError
from lite_dil.objectives.losses import Array
from lite_dil.objectives.naming import CannotName, identify, place_of, source_of
from lite_dil.objectives.objective import Constants, Objective, Pairs, Sides

Function: TypeAlias = Callable[..., Array]

_OWN = re.compile(r"own:([\w.-]{1,60}):(pairs|sides|chosen):(sum|mean):([0-9a-f]{12})")
_LEARNING_RATE = 1e-4  # the same as every objective of the table


class OwnLoss:
    """What `PairLoss` and `SideLoss` share.

    Attributes:
        name: its name for people.
        identity: its name in a run's files.
        functions: its functions, in the given order.
        source: their source text; empty if `version` replaces it.
    """

    kind = ""

    def __init__(self, functions: Sequence[Function], reduction: str, name: str | None, version: str | None) -> None:
        made = f"dil.{type(self).__name__}"
        for function in functions:
            if not callable(function):
                raise UserError(f"{made}: expected a function of log-ratios, found {type(function).__name__}")
        if reduction not in ("sum", "mean"):
            raise UserError(f'{made}: reduction is {reduction!r}; expected "sum" or "mean"')
        self.functions, self.reduction = tuple(functions), reduction
        self.name = name or getattr(functions[0], "__name__", "").replace("<lambda>", "lambda")
        if not re.fullmatch(r"[\w.-]{1,60}", self.name, re.ASCII):
            raise UserError(f"{made}: {self.name!r} is not a valid name; give name=, with letters, digits, '_', '.' and '-'")
        try:
            digest = identify(functions, version)
        except CannotName as error:
            raise UserError(
                f"{made}: {place_of(functions[0])}: {error}, so a resumed run could not detect a changed loss; give name= and "
                "version=, and change the version with every change of the loss"
            ) from None
        self.source = "" if version is not None else "\n".join(dict.fromkeys(map(source_of, functions)))
        self.identity = f"own:{self.name}:{self.kind}:{reduction}:{digest}"

    @property
    def form(self) -> Sides | Pairs:
        """The loss in the form that the criterion takes."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}, {self.reduction} over tokens>"


class PairLoss(OwnLoss):
    """A user-defined loss on pairs: a chosen and a rejected response to the same prompt.

    `function` takes the log-ratios ``log pi(y|x) - log pi_ref(y|x)`` of the chosen and of the rejected responses, two float32
    arrays of shape (pairs,) in nats, and returns the loss of each pair, (pairs,). The arrays belong to the backend's library,
    torch or mlx.core, in training and in evaluation. The loss of a pair must not depend on other pairs, since a step may be
    split anywhere. The function is tried on four made-up values before a model is loaded.

    Args:
        reduction: whether a log-ratio is the "sum" over a response's tokens or their "mean".
        name: by default the function's name.
        version: identifies the function in a run's files. By default its source, its defaults and the outside values it uses
            identify it.

    Raises:
        UserError: part of the function cannot be hashed, and there is no `version`.
    """

    kind = "pairs"

    def __init__(
        self, function: Function, *, reduction: str = "sum", name: str | None = None, version: str | None = None
    ) -> None:
        super().__init__([function], reduction, name, version)

    @property
    def form(self) -> Pairs:
        """See `OwnLoss`."""
        (function,) = self.functions
        return Pairs(lambda chosen, rejected: function(chosen.log_ratio, rejected.log_ratio))


class SideLoss(OwnLoss):
    """A user-defined loss with one expectation per side, so that it needs no pairs.

    Each function takes the log-ratios of one side's responses, (responses,), and returns the loss of each; the rest is as for
    `PairLoss`. Without `rejected` it trains on chosen responses only.
    """

    def __init__(
        self,
        chosen: Function,
        rejected: Function | None = None,
        *,
        reduction: str = "mean",
        name: str | None = None,
        version: str | None = None,
    ) -> None:
        self.kind = "chosen" if rejected is None else "sides"
        super().__init__([chosen] if rejected is None else [chosen, rejected], reduction, name, version)

    @property
    def form(self) -> Sides:
        """See `OwnLoss`."""
        chosen, rejected = self.functions[0], self.functions[1] if len(self.functions) > 1 else None
        return Sides(
            lambda answers: chosen(answers.log_ratio),
            None if rejected is None else lambda answers: rejected(answers.log_ratio),
        )


def is_own(loss: str) -> bool:
    """Return whether `loss` is the identity of a user-defined loss, as a run's files hold it."""
    return _OWN.fullmatch(loss) is not None


def objective_of_identity(loss: str) -> Objective:
    """Return the objective that a user-defined loss's identity describes; without functions, its form raises UserError."""
    name, kind, reduction, digest = parts(loss)

    def form(constants: Constants) -> Any:
        raise UserError(missing(loss))

    return Objective(
        title="a user-defined loss",
        data=kind,
        form=form,
        reduction=reduction,
        beta=None,
        learning_rate=_LEARNING_RATE,
        formula=f"{name}, digest {digest}",
        use="",
        source="written for this run",
    )


def parts(loss: str) -> tuple[str, str, str, str]:
    """Return the name, kind, reduction and digest in a user-defined loss's identity."""
    found = _OWN.fullmatch(loss)
    assert found is not None
    return found[1], found[2], found[3], found[4]


def shown(loss: str) -> str:
    """Return a loss's name for people."""
    return parts(loss)[0] if is_own(loss) else loss


def missing(loss: str) -> str:
    """Return the message that the functions of a user-defined loss must be given."""
    return (
        f"--loss {shown(loss)} is a user-defined loss, whose code a run does not keep: give it again, as --loss FILE.py:NAME, "
        "or in Python as dil.train(..., loss=...)"
    )
